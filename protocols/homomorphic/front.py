"""``Homomorphic``: the front door of the sums of ciphertexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from choral.protocols import argument_checks as checks
from choral.protocols.driver import PartyDriver, ServerDriver
from choral.protocols.errors import SpecError
from choral.protocols.interface import SumSession, SumSpec, check_spec
from choral.protocols.masking.masked import DriverFactory, Masked
from choral.protocols.masking.policy import PartyContext, Policy
from choral.protocols.masking.server.driver import ServerContext

Key = Literal["split", "shared"]
KEYS: tuple[Key, ...] = get_args(Key)


@dataclass(frozen=True, kw_only=True)
class Homomorphic(DriverFactory):
    """The server adds ciphertexts that it cannot read, and learns their sum; exact (BFV).

    key: who holds it.

        "split": nobody. Each party encrypts under a key of its own, fresh each round; the server gets the *sum of the
            keys* through the masked sum, and with it the sum of the vectors and nothing else. Trust: as ``Masked``, the
            server "malicious" or "semi-honest" and up to ``corrupt`` parties colluding with it; and ring-LWE. What a
            party does for the long vector does not grow with its neighbours, nor what the server does with dropouts.
            Guarantee and argument: :mod:`choral.protocols.homomorphic.split.party_and_server`.
        "shared": all parties hold one secret key, made afresh for each session; the server has none. Trust: the server
            follows the protocol and colludes with no party. **One party that gives the key away opens everybody's
            vectors.** A party that restarts has none, and answers again with the next session. Built on SEAL by way of
            TenSEAL. :mod:`choral.protocols.homomorphic.shared.secure_sum`.

    min_survivors: fewer vectors than this are never summed; by default a majority.
    corrupt, dropouts, server, cohort: as in :class:`~choral.protocols.Masked`; for a split key only.

    Unit: one vector of one round. The sum itself may say much about one vector when few are in it; that is the matter
    of differential privacy.

    Raises: SpecError for a setting of another type or out of range; from ``open`` also when no threshold withstands
    those numbers at once, no ring has room for the sum, or settings of a split key are given with a shared one.
    """

    key: Key = "split"
    min_survivors: int | None = None
    corrupt: int | float | None = None
    dropouts: int | float | None = None
    server: Literal["semi-honest", "malicious"] | None = None
    cohort: Literal["chosen", "random"] = "chosen"

    def __post_init__(self) -> None:
        checks.one_of(self.key, "key", KEYS)
        keys = self._keys()  # which checks the rest
        for name in ("min_survivors", "corrupt", "dropouts"):
            object.__setattr__(self, name, getattr(keys, name))

    @property
    def name(self) -> str:
        return "homomorphic"

    def _keys(self) -> Masked:
        """The masked sum of the keys, of a split one."""
        return Masked(
            min_survivors=self.min_survivors,
            corrupt=self.corrupt,
            dropouts=self.dropouts,
            server="malicious" if self.server is None else self.server,
            cohort=self.cohort,
        )

    def open(self, spec: SumSpec, *, policy: Policy | None = None) -> SumSession:
        """policy: the parties' own terms, by default what these settings ask for.

        Raises: SpecError; PolicyError where the parties refuse.
        """
        check_spec(spec)
        if self.key == "split":
            from choral.protocols.homomorphic.split.in_process import SplitSession

            return SplitSession(self._keys(), spec, policy)
        self._check_shared()
        from choral.protocols.homomorphic.shared.secure_sum import SharedSession

        return SharedSession(spec, min_survivors=self.min_survivors, policy=policy)

    def _party(self, spec: SumSpec) -> Callable[[PartyContext], PartyDriver]:
        if self.key == "split":
            from choral.protocols.homomorphic.split.party_driver import SplitPartyDriver

            return partial(SplitPartyDriver, self._keys(), spec)
        self._check_shared()
        from choral.protocols.homomorphic.shared.party_driver import SharedPartyDriver

        return SharedPartyDriver

    def _server(self, spec: SumSpec) -> Callable[[ServerContext], ServerDriver]:
        if self.key == "split":
            from choral.protocols.homomorphic.split.server_driver import SplitServerDriver

            return partial(SplitServerDriver, self._keys(), spec)
        self._check_shared()
        from choral.protocols.homomorphic.shared.server import SharedKey, SharedServerDriver

        return partial(SharedServerDriver, SharedKey(min_survivors=self.min_survivors), spec)

    def _check_shared(self) -> None:
        if self.corrupt or self.dropouts is not None or self.server == "malicious":
            raise SpecError(
                "a shared key withstands no corrupt party and no malicious server, and plans for no count of dropouts",
                hint='use key="split", or leave corrupt, dropouts and server out',
            )
