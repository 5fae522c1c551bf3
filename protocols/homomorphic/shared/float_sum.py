"""Sums of floats under a shared key, for the parties alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from choral.protocols import argument_checks as checks
from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.shared import ckks
from choral.protocols.homomorphic.shared.secure_sum import SharedSession
from choral.protocols.homomorphic.shared.setup import Floats
from choral.protocols.in_process import NO_TRAINING, DriverRound
from choral.protocols.interface import Losses, SumResult, SumSpec
from choral.protocols.wire_format import MAX_PARTIES


@dataclass(frozen=True, kw_only=True)
class FloatSpec:
    """What is summed in floats: agreed on before the first round, checked again by each party.

    parties, length, encoding: as in :class:`~choral.protocols.interface.SumSpec`. bound: the largest absolute value
    that any party may send in any coordinate. precision: the largest absolute error of a coordinate of the sum.

    Raises: SpecError for values out of range.
    """

    parties: tuple[str, ...]
    length: int
    bound: float
    precision: float
    encoding: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", self.plain.length)
        for name in ("bound", "precision"):
            object.__setattr__(self, name, checks.positive(getattr(self, name), name))

    @property
    def plain(self) -> SumSpec:
        """Parties, length and encoding, as of integers."""
        return SumSpec(parties=self.parties, length=self.length, bound=1, encoding=self.encoding)


@dataclass(frozen=True, kw_only=True)
class FloatResult(SumResult):
    """One round's outcome, as the surviving parties have it and nobody else may.

    total: float64, shape (length,), within ``error_bound`` of the sum over ``survivors`` in each coordinate, but for a
    probability of 2^-64 over the encryption's errors.
    """

    total: NDArray[np.float64]  # type: ignore[assignment]
    error_bound: float


@dataclass(frozen=True, kw_only=True)
class FloatSum:
    """Sums of floats (CKKS) that the parties make with the help of a server that learns none of them.

    Not a :class:`~choral.protocols.interface.SecureSum`: it gives floats with a stated error, and gives them to the
    parties.
    **Do not show a total to anyone without the key**, the server above all: it contains the ciphertexts' errors, and
    with them and the ciphertexts anyone computes the key (IND-CPA^D, Li and Micciancio 2021; see
    :mod:`choral.protocols.homomorphic.shared.ckks`). Where the server is to have the sum, encode to integers and use
    ``Homomorphic``. Trust otherwise: as in :mod:`choral.protocols.homomorphic.shared.secure_sum`.
    """

    min_survivors: int | None = None

    def __post_init__(self) -> None:
        smallest = checks.optional(self.min_survivors, "min_survivors", 2, MAX_PARTIES)
        object.__setattr__(self, "min_survivors", smallest)

    def open(self, spec: FloatSpec) -> FloatSession:
        """Raises: SpecError when no ring has the precision, or for ``min_survivors`` out of range."""
        return FloatSession(spec, min_survivors=self.min_survivors)


class FloatSession(SharedSession):
    """A sum of floats set up for fixed parties; see :class:`FloatSum`."""

    def __init__(self, spec: FloatSpec, *, min_survivors: int | None = None) -> None:
        if not isinstance(spec, FloatSpec):
            raise SpecError(f"expected a FloatSpec, got {checks.shown(spec)}")
        super().__init__(spec.plain, min_survivors=min_survivors, floats=Floats(spec.bound, spec.precision))

    @property
    def statement(self) -> Mapping[str, Any]:
        plan: Any = self.plan
        return {
            **self.facts,
            "server_learns": "who took part and who dropped out, and no value",
            "error_bound": plan.error_bound,
            "error_failure_bits": ckks.FAILURE_BITS,
            "scale_bits": plan.scale_bits,
        }

    def begin(self) -> FloatRound:  # type: ignore[override]
        self.between_rounds()
        return FloatRound(self, Losses(None, self.spec.parties), NO_TRAINING)


class FloatRound(DriverRound):
    """One round. ``submit`` each present party's float64 vector once, then ``finish`` once."""

    _session: FloatSession

    def finish(self) -> FloatResult:
        """Every survivor gets the encrypted sum and opens it for itself; they all have the same total.

        Raises: TooFewSurvivorsError; GarbledSumError; StateUsedError the second time.
        """
        session = self._session
        for party in session.parties.values():
            party.total = None
        self.run_out()
        total, survivors = next(party.total for party in session.parties.values() if party.total is not None)
        up, down = session.counter.take(session.spec.parties)
        bound = float(session.plan.error_bound)
        return FloatResult(total=total, error_bound=bound, survivors=survivors, bytes_up=up, bytes_down=down)
