"""The interface between trainers and secure sums: integer vectors in, their sum out.

A :class:`SecureSum` is a frozen configuration (``Plain()``, ``Masked(...)``). ``open`` turns it into a
:class:`SumSession` for fixed parties and a fixed vector; each training round is one :class:`SumRound`:

    session = Masked(min_survivors=2).open(SumSpec(parties=("north", "south", "east"), length=650, bound=2**30))
    summing = session.begin()                    # key exchange among all parties
    for party, vector in updates:                # int64, shape (length,), every |value| <= bound
        summing.submit(party, vector)            # a party that is never submitted has dropped out
    result = summing.finish()                    # the exact sum over the survivors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from choral.protocols import argument_checks as checks
from choral.protocols.errors import SpecError

if TYPE_CHECKING:
    import torch

    from choral.protocols.crypto.identity import Identity
    from choral.protocols.driver import Agreed, NeedsVector, PartyDriver, Patience, RoundTerms, ServerDriver
    from choral.protocols.masking.policy import Policy

IntVector = NDArray[np.int64]

Step = Literal["keys", "shares", "vector", "confirmation", "unmasking"]
"""What a party does in a round, in this order. A sum that has no such step passes over it."""

STEPS: tuple[Step, ...] = get_args(Step)


class Losses:
    """Who vanishes in a round that is rehearsed with failures, and the first step that it no longer takes.

    Raises: SpecError for who is not in the roster, or a step that is none.
    """

    def __init__(self, lost: Mapping[str, Step] | None, parties: tuple[str, ...]) -> None:
        if lost is not None and not isinstance(lost, Mapping):
            raise SpecError(f"expected who drops out as a mapping from parties to steps, got {checks.shown(lost)}")
        self._lost = {party: STEPS.index(step) for party, step in (lost or {}).items() if step in STEPS}
        for party, step in (lost or {}).items():
            if party not in parties or step not in STEPS:
                raise SpecError(
                    f"party {party!r} cannot be lost at {step!r}", hint=f"parties of the roster, at {', '.join(STEPS)}"
                )

    def takes(self, party: str, step: Step) -> bool:
        """Whether the party is still there for that step."""
        return STEPS.index(step) < self._lost.get(party, len(STEPS))


@dataclass(frozen=True, kw_only=True)
class SumSpec:
    """What is summed: agreed on before the first round, checked again by each party.

    parties: the roster, a tuple of distinct non-empty names, at least two. Two spellings of one name are one name.
    length: coordinates per vector, 1 to 2^31.
    bound: the largest absolute value that any party may send in any coordinate, a whole number. The modulus is sized
        from it, so that no sum of up to ``len(parties)`` vectors can wrap.
    directory: how many parties there are that the roster was taken from, at least as many as it has; None, and it has
        all of them. Who may collude is counted among these, not in the roster, which whoever made it may have filled
        with colluders.
    bits: None, and the sum is exact: the modulus is sized so that it cannot wrap. Or the modulus 2^bits, 1 to 64, at
        which the sum may wrap: the total is the representative in [-2^(bits-1), 2^(bits-1)) of the exact sum. For noise
        whose tails need not fit: reducing the *sum* reveals nothing more, and costs fewer bits than all the parties'
        bounds together. A protocol that cannot wrap may add exactly (``exact_bits``) and reduce, or not: whoever asked
        for ``bits`` reduces what it gets. It must never add up single vectors that were reduced as plain integers: how
        often they wrapped is no function of the sum.
    weight_bound: the largest absolute value of a party's last coordinate, where that is its weight: 1 to ``bound``. A
        bound of its own, since who sends a weight of the size of a whole value counts for many. None, and it has none.
    terms: 32 bytes, the digest of the training terms (algorithm, promise asked, code) that the parties sign with the
        session and that no round may change; None, and each round's Begin says them.
    encoding: how values became integers (scale, clipping, weight cap), as text of at most 255 characters. Part of what
        the parties agree on: one that encodes in another way must not join, as its vector would count for more or less.

    Raises: SpecError for anything of another type or outside these ranges, or when the modulus would pass 2^64.
    """

    parties: tuple[str, ...]
    length: int
    bound: int
    bits: int | None = None
    encoding: str = ""
    directory: int | None = None
    weight_bound: int | None = None
    terms: bytes | None = None

    @cached_property
    def members(self) -> frozenset[str]:
        """The roster, to look names up in."""
        return frozenset(self.parties)

    def __post_init__(self) -> None:
        if not isinstance(self.parties, tuple):
            raise SpecError(f"expected the parties as a tuple of names, got a {type(self.parties).__name__}")
        if len(self.parties) < 2:
            raise SpecError(f"expected at least 2 parties, got {len(self.parties)}: one party's sum is its own value")
        checks.names(self.parties, "the roster")
        checks.text(self.encoding, "the encoding")
        plain = {
            "length": checks.whole(self.length, "length", 1, 2**31),
            "bound": checks.whole(self.bound, "bound", 1, 2**64),
            "bits": checks.optional(self.bits, "bits", 1, 64),
            "directory": checks.optional(self.directory, "directory", len(self.parties), 1 << 40),
        }
        plain["weight_bound"] = checks.optional(self.weight_bound, "weight_bound", 1, plain["bound"] or 1)
        checks.digest(self.terms, "the terms")
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.exact_bits > 64:
            raise SpecError(
                f"{len(self.parties)} parties with values up to {self.bound} need {self.exact_bits} bits of modulus,"
                " over 64",
                hint="use fewer bits per value, a smaller weight cap, or fewer parties",
            )

    @property
    def population(self) -> int:
        """How many parties there are that the roster was taken from, itself included."""
        return len(self.parties) if self.directory is None else self.directory

    @property
    def exact_bits(self) -> int:
        """The least b with 2^b >= 2 n bound + 1: sums lie in [-n bound, n bound] and are lifted centred."""
        return (2 * len(self.parties) * self.bound).bit_length()

    @property
    def modulus_bits(self) -> int:
        """``exact_bits``, or the fewer ``bits`` at which the sum may wrap."""
        return self.exact_bits if self.bits is None else min(self.bits, self.exact_bits)

    @property
    def wraps_at(self) -> int | None:
        """The modulus bits when the sum can wrap, else None."""
        return self.modulus_bits if self.modulus_bits < self.exact_bits else None


def check_spec(spec: object) -> None:
    """Raises: SpecError for anything else than a SumSpec."""
    if not isinstance(spec, SumSpec):
        raise SpecError(f"expected a SumSpec, got {checks.shown(spec)}")


@dataclass(frozen=True, kw_only=True)
class SumResult:
    """One round's outcome.

    total: int64, shape (length,): the exact sum over the survivors.
    survivors: the parties whose vectors are in it, in roster order.
    bytes_up, bytes_down: bytes on the wire per party, in both directions, all messages of the round counted.
    """

    total: IntVector
    survivors: tuple[str, ...]
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]


class SumRound(Protocol):
    """One round. ``submit`` each present party once, then ``finish`` once; nothing can be used twice."""

    def needs(self, party: str) -> NeedsVector | None:
        """What the party was asked to compute its vector from, as all parties signed it; None where nobody compares."""
        ...

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """vector: int64, shape (length,), every |value| <= bound: a numpy array, or a torch tensor on any device."""
        ...

    def finish(self) -> SumResult:
        """Whoever was not submitted has dropped out."""
        ...


class SumSession(Protocol):
    """A secure sum set up for fixed parties; identities last, secrets are fresh each round."""

    @property
    def statement(self) -> Mapping[str, Any]:
        """JSON-able facts for the report: who must be trusted with what, threshold, neighbours, modulus bits."""
        ...

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> SumRound:
        """lost: to rehearse failures, who vanishes and the first step that it no longer takes. Who drops out
        at its vector or before must not be submitted; who drops out after it is in the sum.
        terms: what the round is computed from, which all parties of it must see alike; None, a sum without training.

        Raises: SpecError for a party or step that is none; TooFewSurvivorsError where too few are left to go on.
        """
        ...

    def agreed(self, party: str) -> Agreed | None:
        """What a party saw of its latest round; None where nothing is signed, or for one that was in none."""
        ...


class SecureSum(Protocol):
    """How integers become their sum, and who must be trusted."""

    @property
    def name(self) -> str: ...

    def open(self, spec: SumSpec, *, policy: Policy | None = None) -> SumSession:
        """policy: what the parties accept in this rehearsal, whatever these settings propose; by default what the
        settings ask for themselves.

        Raises: SpecError; PolicyError where the parties refuse.
        """
        ...

    def party_driver(
        self,
        spec: SumSpec,
        *,
        name: str,
        identity: Identity,
        policy: Policy,
        randomness: Callable[[int], bytes] = ...,
        store: Callable[[bytes], None] | None = None,
        state: bytes | None = None,
        purpose: str = "",
        repeats: bool = True,
    ) -> PartyDriver:
        """One party's half: :mod:`choral.protocols.driver`. Raises: SpecError; PolicyError."""
        ...

    def server_driver(
        self,
        spec: SumSpec,
        *,
        directory: Mapping[str, bytes],
        randomness: Callable[[int], bytes] = ...,
        patience: Patience = None,
        quorum: int | None = None,
    ) -> ServerDriver:
        """The server's half. Raises: SpecError."""
        ...
