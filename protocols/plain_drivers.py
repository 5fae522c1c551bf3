"""The plain sum as drivers: a Begin down, a vector up. It protects nothing, and needs no session to be agreed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.modular_integers import PackingError, accumulator_dtype, lift, pack, packed_bytes, unpack
from choral.protocols.driver import (
    Agreed,
    Answer,
    NeedsVector,
    Patience,
    Randomness,
    Replies,
    RoundTerms,
    Traffic,
    Trip,
    check_patience,
    patience_at,
    used,
)
from choral.protocols.errors import (
    FaultyPartyError,
    FaultyServerError,
    LateVectorError,
    MessageError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.interface import SumResult, SumSpec
from choral.protocols.masking import messages
from choral.protocols.own_vector import checked, is_tensor, words

NO_TRAINING = RoundTerms()


class PlainPartyDriver:
    """See :class:`choral.protocols.driver.PartyDriver`. What it is asked for it sends, and the server sees it."""

    def __init__(self, spec: SumSpec, *, name: str, repeats: bool = True) -> None:
        """Raises: SpecError for a name that is not among the parties."""
        if name not in spec.members:
            raise SpecError(f"unknown party {checks.shown(name)}", hint="a party of the spec")
        self.name, self._spec = name, spec
        self._replies = Replies(kept=repeats)
        self._begin: messages.Begin | None = None
        self._asked: bytes | None = None

    def handle(self, raw: bytes) -> Answer:
        """Raises: MessageError; FaultyServerError for a round that was answered before, two models in one round, or
        other training terms than the spec's.
        """
        if (known := self._replies.get(key := Replies.key(raw if isinstance(raw, bytes) else b""))) is not None:
            return known
        begin = messages.to_party(raw, limit=messages.limit(messages.Begin))
        if not isinstance(begin, messages.Begin):
            raise MessageError("the server", f"a plain sum has no {type(begin).__name__}")
        before = self._begin
        if before is not None and before.session == begin.session and begin.round <= before.round:
            what = "it shows two models in" if begin.round == before.round and begin != before else "asked again for"
            raise FaultyServerError(f"{what} round {begin.round}")
        if self._spec.terms is not None and begin.terms != self._spec.terms:
            raise FaultyServerError(f"the training terms of round {begin.round} are not those of this party's sum")
        self._replies.forget()
        self._begin, self._asked = begin, key
        answer = NeedsVector(begin.session, begin.round, begin.exchange, begin.weights, begin.terms)
        self._replies.put(key, answer)
        return answer

    def supply(self, vector: Any) -> tuple[bytes, ...]:
        """Raises: InputError, after which a right one may follow; StateUsedError where none is asked for."""
        begin, asked = self._waiting()
        values = checked(vector, self._spec.length, self._spec.bound, self._spec.weight_bound)
        if is_tensor(values):
            values = values.cpu().numpy()
        packed = pack(words(values, self._spec.modulus_bits), self._spec.modulus_bits)
        answer = (messages.encode(messages.Upload(begin.session, begin.round, messages.to_pieces(packed))),)
        self._asked = None
        self._replies.put(asked, answer)
        return answer

    def decline(self) -> None:
        _, asked = self._waiting()
        self._asked = None
        self._replies.put(asked, ())

    def _waiting(self) -> tuple[messages.Begin, bytes]:
        if self._begin is None or self._asked is None:
            raise used("no vector is asked for")
        return self._begin, self._asked

    def public_state(self) -> bytes:
        """Nothing is agreed on that a restart could forget."""
        return b""

    def agreed(self) -> Agreed | None:
        """Its Begin; nobody signs it, and no party is told who survived."""
        return None if self._begin is None else Agreed(begin=messages.encode(self._begin))


class _Vectors:
    """Takes one vector from each party, and adds it up as it comes."""

    def __init__(self, spec: SumSpec, session: bytes, number: int) -> None:
        self._spec, self._session, self._number = spec, session, number
        self.total = np.zeros(spec.length, accumulator_dtype(spec.modulus_bits))
        self.senders: set[str] = set()

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(party for party in self._spec.parties if party not in self.senders)

    @property
    def heard(self) -> int:
        return len(self.senders)

    def receive(self, sender: str, raw: bytes) -> None:
        if sender not in self._spec.members:
            raise FaultyPartyError(str(sender)[: checks.MAX_NAME], "is not in the roster")
        size = packed_bytes(self._spec.length, self._spec.modulus_bits)
        message = messages.to_server(raw, sender=sender, limit=messages.limit(messages.Upload, size))
        if not isinstance(message, messages.Upload) or message.session != self._session:
            raise FaultyPartyError(sender, f"its {type(message).__name__} is of no session of this sum")
        if message.round != self._number:
            raise LateVectorError(sender)
        if sender in self.senders:
            return
        try:
            vector = unpack(messages.from_pieces(message.vector) or b"", self._spec.length, self._spec.modulus_bits)
        except PackingError as error:
            raise FaultyPartyError(sender, f"its vector is not as agreed: {error}") from None
        self.total += vector
        self.senders.add(sender)


class PlainServerDriver:
    """See :class:`choral.protocols.driver.ServerDriver`. It sees every vector."""

    def __init__(
        self, spec: SumSpec, *, randomness: Randomness, patience: Patience = None, quorum: int | None = None
    ) -> None:
        """Raises: SpecError."""
        self.spec = spec
        self._randomness, self._patience = randomness, check_patience(patience)
        self._quorum = checks.optional(quorum, "quorum", 1, len(spec.parties)) or 1
        self._session, self.number = b"", 0
        self._traffic = Traffic()
        self.result: SumResult | None = None
        self.disputes: Mapping[str, tuple[str, ...]] = {}

    def forget(self, party: str) -> bool:
        """There is nothing that it could have lost."""
        return party in self.spec.members

    def open(self) -> Iterator[Trip]:
        """No trips: there is nothing to agree on."""
        self._session, self.number, self.result = self._randomness(16), 0, None
        yield from ()

    def round(self, terms: RoundTerms = NO_TRAINING, *, lost: Iterable[str] = ()) -> Iterator[Trip]:
        """Raises: TooFewSurvivorsError where nobody sent a vector; StateUsedError before ``open``."""
        if not isinstance(terms, RoundTerms):
            raise SpecError(f"expected RoundTerms, got {checks.shown(terms)}")
        if not self._session:
            raise StateUsedError("the session is not open", hint="go through the trips of open()")
        self.number += 1
        self.result, gone = None, frozenset(lost)
        begin = messages.Begin(self._session, self.number, terms.exchange, terms.weights, terms.terms)
        outbox = dict.fromkeys((party for party in self.spec.parties if party not in gone), messages.encode(begin))
        stage = _Vectors(self.spec, self._session, self.number)
        for party, raw in outbox.items():
            self._traffic.down(party, raw)

        def take(sender: str, raw: bytes) -> None:
            stage.receive(sender, raw)
            self._traffic.up(sender, raw)

        patience = patience_at(self._patience, "vector")
        yield Trip("vector", outbox, stage, take=take, patience=patience, quorum=self._quorum)
        if not stage.senders:
            raise TooFewSurvivorsError("nobody sent a vector", survivors=0, needed=1, missing=self.spec.parties)
        up, down = self._traffic.take(self.spec.parties)
        self.result = SumResult(
            total=lift(stage.total, self.spec.modulus_bits),
            survivors=tuple(party for party in self.spec.parties if party in stage.senders),
            bytes_up=up,
            bytes_down=down,
        )
