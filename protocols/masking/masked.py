"""``Masked``: the settings of the masked sum, and its front door."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from choral.protocols import argument_checks as checks
from choral.protocols.contributors import ContributorSession
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import PartyDriver, Patience, Randomness, ServerDriver, Store
from choral.protocols.errors import SpecError
from choral.protocols.interface import SumSession, SumSpec, check_spec
from choral.protocols.masking import messages
from choral.protocols.masking.ahead.floor import dealt_ahead
from choral.protocols.masking.ahead.party_driver import AheadPartyDriver
from choral.protocols.masking.ahead.server_driver import AheadServerDriver
from choral.protocols.masking.in_process import MaskedSession
from choral.protocols.masking.parameters import (
    CORRECTNESS_BITS,
    SECURITY_BITS,
    SERVERS,
    Cohort,
    InfeasibleError,
    Parameters,
    choose,
    colluding,
    counted,
    least_threshold,
)
from choral.protocols.masking.party_driver import MaskedPartyDriver
from choral.protocols.masking.policy import DRAWS, PartyContext, Policy, check_policy
from choral.protocols.masking.server.driver import MaskedServerDriver, ServerContext


class DriverFactory(ABC):
    """The two halves of a sum whose parties are pinned; kinds of sums say which drivers they have."""

    @abstractmethod
    def _party(self, spec: SumSpec) -> Callable[[PartyContext], PartyDriver]:
        """Raises: SpecError for settings that this kind does not have."""

    @abstractmethod
    def _server(self, spec: SumSpec) -> Callable[[ServerContext], ServerDriver]:
        """Raises: SpecError for settings that this kind does not have."""

    def party_driver(
        self,
        spec: SumSpec,
        *,
        name: str,
        identity: Identity,
        policy: Policy,
        randomness: Randomness = secrets.token_bytes,
        store: Store | None = None,
        state: bytes | None = None,
        purpose: str = "",
        repeats: bool = True,
    ) -> PartyDriver:
        """One party's half. policy: what it accepts, its pinned directory included. spec: as this party knows it, which
        masks need not: all that is signed is held against the policy.

        store: is given the public state whenever it changes, ahead of what depends on it; state: such a state, to go on
        from after a restart. purpose: in the party's own words, where one identity takes part in several sums at a
        time, which must not be of the same vectors. repeats: whether the transport may ask for an answer twice.
        Raises: SpecError; PolicyError.
        """
        check_spec(spec)
        driver = self._party(spec)
        return driver(
            PartyContext(
                name=name,
                identity=identity,
                policy=policy,
                randomness=randomness,
                store=store,
                state=state,
                purpose=purpose,
                repeats=repeats,
            )
        )

    def server_driver(
        self,
        spec: SumSpec,
        *,
        directory: Mapping[str, bytes],
        randomness: Randomness = secrets.token_bytes,
        patience: Patience = None,
        quorum: int | None = None,
    ) -> ServerDriver:
        """The server's half. directory: the parties' public keys. patience: seconds that a trip is worth, or by its
        step; quorum: with how many answers it has enough when patience is over. Raises: SpecError.
        """
        check_spec(spec)
        driver = self._server(spec)
        return driver(ServerContext(directory=directory, randomness=randomness, patience=patience, quorum=quorum))


@dataclass(frozen=True, kw_only=True)
class Masked(DriverFactory):
    """The server learns the sum over the survivors and no single vector (Bonawitz et al. 2017, Bell et al. 2020).

    min_survivors: fewer vectors than this are never summed; 2 to n. Default: a majority of the parties, so that no
        round can be summed over two sets without a common party, or what ``dropouts`` leave where that is less. Where
        it is more, the threshold counts, and so do corrupt + 2, below which a sum could hold a single honest vector.
    corrupt: how many parties may collude with the server: a count (int), or a fraction (float, rounded up) of all the
        parties that there are (``spec.directory``), **not** of a roster that the server has made of some of them.
    dropouts: how many of the roster may vanish in a round; a count, or a fraction of the roster (float, rounded up):
        too few cost rounds, not privacy.
        Defaults: up to 10 parties (n - 1) // 3 of each, so that 3 parties withstand the server alone and one dropout,
        4 to 6 one colluder and one dropout, 10 three and three; for more parties one tenth of each; no more dropouts
        than ``min_survivors`` leaves room for, and in a cohort no more than the threshold does.
    server: "malicious" (it does what it likes) or "semi-honest" (it follows the protocol and looks at everything).
        The second allows more dropouts; signatures and consistency are checked in both.
    cohort: of a roster that is not everybody. "chosen": the server may have picked it to have all colluders in it.
        "random": it is taken on trust that the server drew it at random (*semi-honest in the choice of the cohort*),
        and a fraction, the default too, becomes what such a draw has but for 2^-40. Signed by the parties and stated.
    trips: of a round. 4; or 3, with keys and shares dealt a round ahead, on a complete graph (up to 64 parties); or 2,
        without the confirmation of the survivors too. Then the sum that is opened may be over other survivors than
        any party was shown: so many are asked for that at least ``min_survivors`` are in it, and two honest ones; by
        default as many as ``dropouts`` leave (of three parties, two), which costs nothing. The setup says how many
        honest ones at least, its ``floor`` (docs/two-trips.md). ``corrupt`` then costs more.
    contributors: publish no coordinate to which fewer parties contribute, at least corrupt + 2: they are counted first,
        in a sum of their own whose result is a release (:mod:`choral.protocols.contributors`). In rehearsals alone.
    block: so many coordinates in a row are counted together, such as the rows of an embedding. A party contributes to a
        block only where none of them is zero; what it touches in part it leaves out.

    Guarantee: what ``server`` and up to ``corrupt`` parties see together is independent of the other survivors' vectors
    but for their sum, under the assumptions of docs/secure-sums.md. Unit: one vector of one round. The sum itself may
    say much about one vector when few are in it; that is the matter of differential privacy.

    Raises: SpecError for a setting of another type or out of range; from ``open`` also when no threshold withstands
    those numbers at once, or ``min_survivors`` and ``dropouts`` together are more than the parties.
    """

    min_survivors: int | None = None
    corrupt: int | float | None = None
    dropouts: int | float | None = None
    server: Literal["semi-honest", "malicious"] = "malicious"
    cohort: Literal["chosen", "random"] = "chosen"
    contributors: int | None = None
    block: int = 1
    trips: Literal[2, 3, 4] = 4

    def __post_init__(self) -> None:
        checks.one_of(self.server, "server", SERVERS)
        checks.one_of(self.cohort, "cohort", DRAWS)
        smallest = checks.optional(self.min_survivors, "min_survivors", 2, messages.MAX_PARTIES)
        object.__setattr__(self, "min_survivors", smallest)
        least = checks.optional(self.contributors, "contributors", 2, messages.MAX_PARTIES)
        object.__setattr__(self, "contributors", least)
        object.__setattr__(self, "block", checks.whole(self.block, "block", 1, 2**20))
        if self.block > 1 and least is None:
            raise SpecError("block without contributors", hint="Masked(contributors=5, block=16) counts by rows of 16")
        object.__setattr__(self, "trips", checks.whole(self.trips, "trips", 2, 4))
        if self.trips == 2 and self.server != "malicious":
            raise SpecError(
                'two trips with server="semi-honest": that server needs no confirmation to be left out',
                hint='take trips=3, or server="malicious"',
            )
        if self.trips != 4 and least is not None:
            raise SpecError("contributors in two or three trips", hint="leave contributors out, or take trips=4")
        for name in ("corrupt", "dropouts"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, checks.share(value, name))

    @property
    def name(self) -> str:
        return "masked"

    def corrupt_of(self, population: int) -> int | float:
        """``corrupt``, or its default for so many parties."""
        if self.corrupt is not None:
            return self.corrupt
        return (population - 1) // 3 if population <= 10 else 0.1

    def parameters(self, n: int, population: int | None = None) -> Parameters:
        """The neighbours and threshold for a roster of ``n`` parties, of so many in all. Raises: SpecError."""
        if self.min_survivors is not None and self.min_survivors > n:
            raise SpecError(
                f"expected 2 <= min_survivors <= {n} parties, got {self.min_survivors}",
                hint="leave it out to have a majority of the parties",
            )
        population = n if population is None else population
        default = (n - 1) // 3 if n <= 10 else counted(0.1, n)
        corrupt = colluding(self.corrupt_of(population), population, n, self._how(n, population))
        dropouts = min(default, n - (self.min_survivors or 2)) if self.dropouts is None else self.dropouts
        if self.dropouts is None and population > n:
            dropouts = max(0, min(dropouts, n - least_threshold(n, corrupt, self.server), n - corrupt - 2))
        try:
            return choose(n, corrupt=corrupt, dropouts=dropouts, server=self.server)
        except SpecError as error:
            if population == n:
                raise
            raise InfeasibleError(
                f"{error} ({corrupt} of {population} parties may collude, and the server may have put them all into a"
                f" roster of {n})"
                if self.cohort == "chosen"
                else f"{error} ({corrupt} colluders may be in a roster of {n} drawn from {population} parties)",
                hint="ask everybody or more parties; say how many may collude at most (corrupt, a count); or take the"
                ' server\'s word that it draws at random (cohort="random")',
            ) from None

    def _how(self, n: int, population: int) -> Cohort:
        return "everyone" if population == n else self.cohort

    def setup(self, spec: SumSpec, *, session: bytes) -> messages.SumSetup:
        """The terms that every party signs. session: 16 fresh random bytes. Raises: SpecError."""
        self._refuse_contributors()
        n = len(spec.parties)
        chosen = self.parameters(n, spec.population)
        left = n - chosen.dropouts
        wanted = min(n // 2 + 1, left) if self.min_survivors is None else self.min_survivors
        if wanted > left:
            raise SpecError(
                f"{chosen.dropouts} dropouts leave {left} of {n} parties, fewer than min_survivors = {wanted}",
                hint="expect fewer dropouts, or accept a smaller sum",
            )
        if chosen.corrupt + 2 > left:
            raise SpecError(
                f"{chosen.corrupt} corrupt and {chosen.dropouts} dropouts of {n} parties may leave one honest vector"
                " in the sum",
                hint="expect fewer corrupt parties or fewer dropouts",
            )
        whole = spec.population == n
        setup = messages.SumSetup(
            session=session,
            roster=spec.parties,
            length=spec.length,
            bound=spec.bound,
            modulus_bits=spec.modulus_bits,
            neighbours=chosen.neighbours,
            threshold=chosen.threshold,
            min_survivors=max(2, wanted, chosen.threshold, chosen.corrupt + 2),
            corrupt=chosen.corrupt,
            dropouts=chosen.dropouts,
            server=self.server,
            security_bits=SECURITY_BITS,
            correctness_bits=CORRECTNESS_BITS,
            encoding=spec.encoding,
            cohort=self._how(n, spec.population),
            directory=None if whole else spec.population,
            weight_bound=spec.weight_bound,
            terms=spec.terms,
        )
        if self.trips == 4:
            return setup
        there = n - max(1, chosen.dropouts) if self.dropouts is None else left
        return dealt_ahead(setup, self.trips, self.min_survivors, there)

    def policy(self, spec: SumSpec) -> Policy:
        """What these settings ask of a setup, as a party holds them that was given the settings and the spec.

        From these alone, never from a setup: what the server proposes is what it is held against.
        """
        return Policy(
            corrupt=self.corrupt_of(spec.population),
            cohort=self.cohort,
            server=self.server,
            minimum_cohort=self.min_survivors or 2,
            maximum_modulus_bits=spec.modulus_bits,
            maximum_bound=spec.bound,
            maximum_length=spec.length,
            wraps_at=spec.wraps_at,
            encoding=spec.encoding,
            maximum_weight=spec.weight_bound,
            terms=spec.terms,
        )

    def open(self, spec: SumSpec, *, policy: Policy | None = None) -> SumSession:
        """policy: the parties' own terms, by default those of :meth:`policy`. Its directory is filled in here, where
        identities are made.

        Raises: SpecError; PolicyError where the parties refuse.
        """
        if self.contributors is None:
            return MaskedSession(self, spec, policy)
        check_spec(spec)
        own = None if policy is None else check_policy(policy)

        def adding(over: SumSpec) -> SumSession:
            """Opened over all of them or not at all."""
            least = max(len(over.parties), 2 if own is None else own.minimum_cohort)
            terms = _with(own, encoding=over.encoding, minimum_cohort=least)
            return MaskedSession(self._of_everyone(over), over, terms)

        def counting(over: SumSpec) -> SumSession:
            """Of words of counts, which have nothing to do with the bounds of values."""
            words = {"maximum_bound": over.bound, "maximum_modulus_bits": over.modulus_bits, "maximum_weight": None}
            counts = _with(own, encoding=over.encoding, wraps_at=over.wraps_at, **words)
            return MaskedSession(replace(self, contributors=None, block=1), over, counts)

        # What is refused of the second sum is refused now, before counts are released.
        setup = self._of_everyone(spec).setup(spec, session=bytes(16))
        if own is not None:
            own.check_vector(setup.length, setup.bound, setup.modulus_bits, setup.encoding, setup.weight_bound)
        corrupt = self.parameters(len(spec.parties), spec.population).corrupt
        return ContributorSession(
            spec, self.contributors, corrupt=corrupt, counting=counting, adding=adding, block=self.block
        )

    def _of_everyone(self, over: SumSpec) -> Masked:
        return replace(self, contributors=None, block=1, min_survivors=len(over.parties), dropouts=0)

    def _party(self, spec: SumSpec) -> Callable[[PartyContext], PartyDriver]:
        del spec
        self._refuse_contributors()
        return MaskedPartyDriver if self.trips == 4 else partial(AheadPartyDriver, self.trips)

    def _refuse_contributors(self) -> None:
        if self.contributors is not None:
            raise SpecError(
                "contributors of parties in processes of their own: two sums in the place of one, which a rehearsal in"
                " one process alone makes",
                hint="leave contributors out, or rehearse with federate",
            )

    def _server(self, spec: SumSpec) -> Callable[[ServerContext], MaskedServerDriver]:
        self._refuse_contributors()
        if self.trips == 4:
            return partial(MaskedServerDriver, self, spec)
        return partial(AheadServerDriver, self.trips, self, spec)


def _with(own: Policy | None, **terms: Any) -> Policy | None:
    """A party's own terms, for another vector; None stays what the settings ask for."""
    return None if own is None else replace(own, **terms)
