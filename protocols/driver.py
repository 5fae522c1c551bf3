"""The two halves of a secure sum as messages: bytes in, bytes out; no socket, no clock, randomness as an argument.

A party feeds every message from the server to its :class:`PartyDriver` and sends back what it answers; the server goes
through the :class:`Trip`\\ s of its :class:`ServerDriver`, whichever way messages travel:

    driver = Masked().server_driver(spec, ...)                   driver = Masked().party_driver(spec, name="north", ...)
    for trip in driver.open():                                   while raw := receive():
        send(trip.outbox)                                            answer = driver.handle(raw)
        while not trip.enough(waited()):                             if isinstance(answer, NeedsVector):
            trip.receive(*next_reply())                                  answer = driver.supply(train(answer))
    for trip in driver.round(RoundTerms(...)):                       send(*answer)
        ...
    driver.result

A transport may lose, delay, repeat and reorder messages. The outbox may be sent again to whoever is still waited for;
the same bytes get the same answer, and a party that drops out is asked again at the next round.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from choral.protocols import argument_checks as checks
from choral.protocols.errors import ProtocolError, SpecError, StateUsedError
from choral.protocols.interface import IntVector, Step, SumResult

if TYPE_CHECKING:
    import torch

Randomness = Callable[[int], bytes]
"""``randomness(n)``: n secret uniform bytes, never the same twice. ``secrets.token_bytes`` outside tests."""

Store = Callable[[bytes], None]
"""Keeps a party's public state where a restart finds it. When it returns, the bytes must be safe (fsync)."""

TripStep = Literal["hello", "reveal"] | Step
"""What the parties are asked for: the first two while a session opens."""
TRIP_STEPS: tuple[TripStep, ...] = ("hello", "reveal", *get_args(Step))

LONGEST = 10
"""Times its patience that a trip lasts at most, for a quorum to be there."""

NONE = bytes(checks.DIGEST_BYTES)


@dataclass(frozen=True)
class RoundTerms:
    """What every party of a round must see alike; opaque here, made by whoever trains.

    exchange: which of a training round's sums, from 0. weights: digest of what the vectors are computed from (the
    weights, and the exchange's other tensors). terms: digest of the training terms (algorithm, promise asked, code).
    All zeros: a sum without training.

    Raises: SpecError for anything else than a number from 0 and two digests of 32 bytes.
    """

    exchange: int = 0
    weights: bytes = NONE
    terms: bytes = NONE

    def __post_init__(self) -> None:
        object.__setattr__(self, "exchange", checks.whole(self.exchange, "the exchange", 0, (1 << 32) - 1))
        for name in ("weights", "terms"):
            if (value := getattr(self, name)) is None:
                raise SpecError(f"expected {name} as a digest of {checks.DIGEST_BYTES} bytes, got None")
            checks.digest(value, name)


@dataclass(frozen=True)
class NeedsVector:
    """All is agreed: train now, from just these weights and under just these terms, and ``supply`` the vector.

    session: names the session. Others as in :class:`RoundTerms`; whoever trains compares them with what it was given.
    """

    session: bytes
    round: int
    exchange: int
    weights: bytes
    terms: bytes


Answer = tuple[bytes, ...] | NeedsVector


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What a party saw of its latest round, for its receipt: public bytes, nothing of any vector.

    begin: the round's Begin as it was sent. setup, session: the digests that every party signed, roster: the parties in
    their order; empty in a sum that nobody signs. survivors: whose vectors are in the sum; None where it did not
    come so far that enough parties signed the set. keys, signatures: of those whose confirmation of just this set,
    round and Begin was verified here, by name.
    """

    begin: bytes
    setup: bytes = b""
    session: bytes = b""
    roster: tuple[str, ...] = ()
    survivors: tuple[str, ...] | None = None
    keys: Mapping[str, bytes] = field(default_factory=dict)
    signatures: Mapping[str, bytes] = field(default_factory=dict)


class PartyDriver(Protocol):
    """A party's half. Not for several threads at once; its secrets stay in the process that made it."""

    def handle(self, raw: bytes) -> Answer:
        """Take one message from the server: what to send back, in order (maybe nothing), or that it is time to train.

        The same bytes again get the same answer, for as long as their round lasts.
        Raises: ProtocolError, by name; the party is then out of that round at most, and answers the next one.
        """
        ...

    def supply(self, vector: IntVector | torch.Tensor) -> tuple[bytes, ...]:
        """The vector that was asked for last; who trains beside ``handle`` must drop one that a later Begin overtook.

        Raises: InputError, after which a right one may follow; StateUsedError.
        """
        ...

    def decline(self) -> None:
        """Sit out: no vector for this round. The party answers the next one."""
        ...

    def public_state(self) -> bytes:
        """What a restarted party goes on from; no secret is in it."""
        ...

    def agreed(self) -> Agreed | None:
        """What its latest round came to, as it was seen here; None before the first."""
        ...


class ServerDriver(Protocol):
    """The server's half."""

    result: SumResult | None
    """Of the last round, once its trips are over; None before, and after one that failed."""
    disputes: Mapping[str, tuple[str, ...]]
    """Of the last round: by dealer, who said that the shares it dealt them do not open."""

    def open(self) -> Iterator[Trip]:
        """The trips of an opening. Raises (from the iterator): TooFewSurvivorsError."""
        ...

    def round(self, terms: RoundTerms = ..., *, lost: Iterable[str] = ()) -> Iterator[Trip]:
        """The trips of a round. lost: who is not asked in it, as it is known to be gone; at the next one it is.

        Resume the iterator when a trip has ``enough``, or when patience is over: who has not answered drops out.
        Raises (from the iterator): TooFewSurvivorsError, and what else ends a sum; the driver is ready for the next.
        """
        ...

    def forget(self, party: str) -> bool:
        """A party was started anew, between two rounds. Whether it takes part in the next one of the open session."""
        ...


class Trip:
    """A message to each of some parties, and their answers to it.

    step: what they are asked for. outbox: the bytes by party; to send again to those in ``waiting`` does no harm.
    faults: by party, why its last message was refused; a refused message changes nothing. patience: seconds that it is
    worth to wait for all of them; None, without end, whoever is silent.
    """

    def __init__(
        self,
        step: TripStep,
        outbox: Mapping[str, bytes],
        stage: CollectingStage,
        *,
        take: Callable[[str, bytes], None] | None = None,
        patience: float | None = None,
        quorum: int = 1,
    ) -> None:
        self.step = step
        self.outbox = dict(outbox)
        self.patience = patience
        self.faults: dict[str, ProtocolError] = {}
        self._stage = stage
        self.take = stage.receive if take is None else take
        self._quorum = quorum

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who was asked and has not answered."""
        return tuple(party for party in self._stage.waiting if party in self.outbox)

    def receive(self, sender: str, raw: bytes) -> None:
        """Take a message from ``sender``, as whom the transport authenticated it."""
        try:
            self.take(sender, raw)
        except ProtocolError as error:
            self.faults[str(sender)[: checks.MAX_NAME]] = error

    def enough(self, waited: float = 0.0) -> bool:
        """Whether to go on: all have answered; or, after ``waited`` seconds, patience is over and a quorum is there.

        Where no quorum comes, LONGEST times the patience is the end: with a patience, nobody waits for ever.
        """
        if not self.waiting:
            return True
        if self.patience is None or waited < self.patience:
            return False
        return self._stage.heard >= self._quorum or waited >= LONGEST * self.patience


class Traffic:
    """Bytes on the wire per party and way, since they were taken last."""

    def __init__(self) -> None:
        self._up: Counter[str] = Counter()
        self._down: Counter[str] = Counter()

    def up(self, party: str, raw: bytes) -> bytes:
        self._up[party] += len(raw)
        return raw

    def down(self, party: str, raw: bytes) -> None:
        self._down[party] += len(raw)

    def take(self, parties: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Up and down."""
        up, down = ({party: count[party] for party in parties} for count in (self._up, self._down))
        self._up.clear()
        self._down.clear()
        return up, down


class CollectingStage(Protocol):
    """What a server collects in one trip."""

    @property
    def waiting(self) -> tuple[str, ...]: ...

    @property
    def heard(self) -> int: ...

    def receive(self, sender: str, raw: bytes) -> None: ...


Patience = float | Mapping[TripStep, float] | None


def patience_at(patience: Patience, step: TripStep) -> float | None:
    """The seconds for one step of those that were given for all, or for each."""
    return patience.get(step) if isinstance(patience, Mapping) else patience


def check_patience(patience: Any) -> Patience:
    """Raises: SpecError for anything else than None, seconds above 0, or a mapping of such by step."""
    each = patience if isinstance(patience, Mapping) else {"vector": patience}
    for step, seconds in each.items():
        if step not in TRIP_STEPS:
            raise SpecError(f"expected patience by step, got {checks.shown(step)}", hint=", ".join(TRIP_STEPS))
        if seconds is not None:
            checks.positive(seconds, "patience")
    return patience  # type: ignore[no-any-return]


@dataclass(repr=False)
class Replies:
    """The answers that a party gave in the current round, by the digest of what it was asked; public bytes only.

    kept: whether any are. Where no transport may ask twice, long vectors need not be held.
    """

    kept: bool = True
    _answers: dict[bytes, Answer] = field(default_factory=dict)

    @staticmethod
    def key(raw: bytes) -> bytes:
        return hashlib.sha256(raw).digest()

    def get(self, key: bytes) -> Answer | None:
        return self._answers.get(key)

    def put(self, key: bytes, answer: Answer) -> None:
        """What was put under the same key is replaced, however many there are: a NeedsVector by what was supplied."""
        if self.kept and (key in self._answers or len(self._answers) < MOST_REPLIES):
            self._answers[key] = answer

    def forget(self) -> None:
        """With the next round, or session: what was asked before is then refused."""
        self._answers.clear()


MOST_REPLIES = 16
"""A round has five; so many may be asked for in one more form, by a server that does as it likes."""


def used(what: str) -> StateUsedError:
    return StateUsedError(what, hint="after a refusal, wait for the next round")
