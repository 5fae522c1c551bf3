"""Sums of floats under a shared key, for the parties alone."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from choral.protocols import argument_checks as checks
from choral.protocols.errors import SpecError, StateUsedError
from choral.protocols.homomorphic.shared import ckks
from choral.protocols.homomorphic.shared.in_process import Parties, encrypt_and_send, facts_of, make_setup, smallest_sum
from choral.protocols.homomorphic.shared.party_round import Encrypted, Keyed
from choral.protocols.homomorphic.shared.server_round import Totalling
from choral.protocols.homomorphic.shared.setup import SharedPolicy
from choral.protocols.interface import SumSpec
from choral.protocols.masking.messages import MAX_PARTIES


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
        whole = SumSpec(parties=self.parties, length=self.length, bound=1, encoding=self.encoding)
        object.__setattr__(self, "length", whole.length)
        for name in ("bound", "precision"):
            object.__setattr__(self, name, checks.positive(getattr(self, name), name))


@dataclass(frozen=True, kw_only=True)
class FloatResult:
    """One round's outcome, as the surviving parties have it and nobody else may.

    total: float64, shape (length,), within ``error_bound`` of the sum over ``survivors`` in each coordinate, but for a
    probability of 2^-64 over the encryption's errors. bytes_up, bytes_down: on the wire per party.
    """

    total: NDArray[np.float64]
    error_bound: float
    survivors: tuple[str, ...]
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]


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


class FloatSession:
    """A sum of floats set up for fixed parties; see :class:`FloatSum`."""

    def __init__(self, spec: FloatSpec, *, min_survivors: int | None = None) -> None:
        if not isinstance(spec, FloatSpec):
            raise SpecError(f"expected a FloatSpec, got {checks.shown(spec)}")
        self.spec = spec
        n, bound, precision = len(spec.parties), spec.bound, spec.precision
        self.plan = ckks.choose(n, bound, spec.length, precision)
        smallest, session = smallest_sum(n, min_survivors), secrets.token_bytes(16)
        setup = make_setup(
            spec.parties,
            spec.length,
            spec.encoding,
            self.plan,
            smallest,
            session,
            magnitude=bound,
            precision=precision,
        )
        own = SharedPolicy(minimum_cohort=min_survivors or 2, maximum_length=spec.length, encoding=spec.encoding)
        self._parties = Parties(setup, own)

    @property
    def statement(self) -> Mapping[str, Any]:
        facts = {
            "trust": (
                "All parties hold one secret key, the server has none and must never see a decrypted sum. The server"
                " follows the protocol but looks at everything, and colludes with no party: one party that does opens"
                f" the vectors of all {len(self.spec.parties)}. Each party trusts its pinned directory of identities,"
                " which in this in-process run was made by the process itself."
            ),
            "server_learns": "who took part and who dropped out, and no value",
            "error_bound": self.plan.error_bound,
            "error_failure_bits": ckks.FAILURE_BITS,
            "scale_bits": self.plan.scale_bits,
        }
        return {**facts_of(self._parties), **facts}

    def begin(self) -> FloatRound:
        return FloatRound(self._parties, self.plan)


class FloatRound:
    """One round. ``submit`` each present party once, then ``finish`` once."""

    def __init__(self, parties: Parties, plan: ckks.CkksPlan) -> None:
        self._parties = parties
        self._plan = plan
        self._number, self._adding = parties.begin()
        self._keyed: dict[str, Keyed] = {}
        self._encrypted: dict[str, Encrypted] = {}
        self._finished = False

    def submit(self, party: str, vector: NDArray[np.float64]) -> None:
        """vector: float64, shape (length,), every |value| <= bound.

        Raises: SpecError for an unknown party; StateUsedError the second time; InputError for another vector.
        """
        self._parties.check_current(self._number)
        setup = self._parties.setup
        if party not in setup.roster:
            raise SpecError(f"unknown party {party!r}", hint="parties are fixed when the session is opened")
        if self._finished or party in self._encrypted:
            raise StateUsedError(f"{party} has submitted its vector of this round, or the round is finished")
        self._encrypted[party] = encrypt_and_send(self._parties, self._adding, self._keyed, self._number, party, vector)

    def finish(self) -> FloatResult:
        """Every survivor gets the encrypted sum and opens it for itself; they all have the same total.

        Raises: TooFewSurvivorsError; GarbledSumError; StateUsedError the second time.
        """
        self._parties.check_current(self._number)
        if self._finished:
            raise StateUsedError("this round is finished")
        self._finished = True
        relayed, parties = self._adding.close(), self._parties
        total = np.empty(0)
        for party in relayed.survivors:
            if isinstance(relayed, Totalling):
                raise SpecError("a sum of floats was expected")
            total, _ = self._encrypted[party].read(parties.down(party, relayed.pieces()))
        up, down = parties.traffic.take(parties.setup.roster)
        return FloatResult(
            total=total,
            error_bound=self._plan.error_bound,
            survivors=relayed.survivors,
            bytes_up=up,
            bytes_down=down,
        )
