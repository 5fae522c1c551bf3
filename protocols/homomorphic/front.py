"""``Homomorphic``: the front door of the sums of ciphertexts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from choral.protocols.masked import Masked
from choral.protocols.seam import SumSession, SumSpec


@dataclass(frozen=True, kw_only=True)
class Homomorphic:
    """The server adds ciphertexts that it cannot read, and learns their sum; exact (BFV).

    Nobody holds a decryption key. Each party encrypts under a key of its own, fresh each round; the server gets the
    *sum of the keys* through the masked sum, and with it the sum of the vectors and nothing else. Trust: as
    ``Masked``, the server and up to ``corrupt`` parties colluding with it; and ring-LWE. What a party does for the
    long vector does not grow with its neighbours, nor what the server does with dropouts. Guarantee and argument:
    :mod:`choral.protocols.homomorphic.split`.

    min_survivors: fewer vectors than this are never summed; by default a majority.
    corrupt, dropouts, server: as in :class:`~choral.protocols.Masked`.

    Unit: one vector of one round. The sum itself may say much about one vector when few are in it; that is the matter
    of differential privacy.

    Raises (from ``open``): SpecError, when no threshold withstands those numbers at once, or no ring has room for the
    sum.
    """

    min_survivors: int | None = None
    corrupt: int | float | None = None
    dropouts: int | float | None = None
    server: Literal["semi-honest", "malicious"] = "malicious"

    @property
    def name(self) -> str:
        return "homomorphic"

    def open(self, spec: SumSpec) -> SumSession:
        from choral.protocols.homomorphic.split_sum import SplitSession

        keys = Masked(
            min_survivors=self.min_survivors,
            corrupt=self.corrupt,
            dropouts=self.dropouts,
            server=self.server,
        )
        return SplitSession(keys, spec)
