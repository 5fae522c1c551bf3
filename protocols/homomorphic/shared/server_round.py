"""A round at the server of a sum under a shared key: ciphertexts added as they come; :mod:`.server` has more.

Memory: the encrypted sum, 16 bytes per coefficient and prime, which is 16 per coordinate where values go two to a
coefficient of two primes; and the raw bytes of vectors that are not complete yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from choral.protocols.crypto.modular_integers import PackingError, lift, packed_bytes, unpack
from choral.protocols.errors import (
    FaultyPartyError,
    LateVectorError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.homomorphic.messages import Ciphertext
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.party_round import modulus_bits
from choral.protocols.homomorphic.shared.seal_files import CiphertextError
from choral.protocols.homomorphic.shared.setup import Plan
from choral.protocols.interface import IntVector
from choral.protocols.masking import messages as base
from choral.protocols.masking import signing as transcript


@dataclass(frozen=True)
class Terms:
    """What the server knows of a session; all of it is public. session, commitment: once they are fixed."""

    setup: wire.KeySetup
    plan: Plan
    directory: Mapping[str, bytes]
    signatures: transcript.Signatures
    session: bytes = b""
    commitment: bytes = b""

    @property
    def roster(self) -> tuple[str, ...]:
        return self.setup.roster

    def signed(self, party: int, message: bytes, signature: bytes) -> bool:
        return self.signatures.valid(self.directory[self.roster[party]], message, signature)

    def place(self, sender: str) -> int:
        """Raises: FaultyPartyError for who is not in the roster."""
        try:
            return self.roster.index(sender)
        except ValueError:
            raise FaultyPartyError(sender, "is not in the roster") from None


class Adding:
    """Adds ciphertexts as they come."""

    def __init__(self, known: Terms, number: int) -> None:
        self._terms = known
        self._number = number
        self._key = terms.key_id(known.session, known.commitment, number)
        self._ring = terms.ring_of(known.plan.parameters)
        self._blocks = terms.blocks_of(known.plan, known.setup.length)
        self._sum: list[Any] = [None] * self._blocks
        self._pieces: dict[int, list[bytes]] = {}
        self._complete: set[int] = set()
        self._closed = False

    @property
    def complete(self) -> tuple[str, ...]:
        """Whose vectors are there, in roster order."""
        return tuple(self._terms.roster[party] for party in sorted(self._complete))

    def receive(self, sender: str, raw: bytes) -> None:
        """Check a piece, whole, and add it.

        Raises: MessageError, FaultyPartyError, LateVectorError; then nothing has changed.
        """
        known, size = self._terms, self._terms.plan.parameters.seeded_bytes
        party = known.place(sender)
        per_piece = terms.fresh_per_piece(known.plan)
        message = wire.read(Ciphertext, raw, sender=sender, limit=wire.limit(Ciphertext) + per_piece * size)
        if message.session != known.setup.session:
            raise FaultyPartyError(sender, "its Ciphertext is of another session")
        if message.round != self._number:
            raise FaultyPartyError(sender, f"its Ciphertext is of round {message.round}, not {self._number}")
        if message.key != self._key:
            raise FaultyPartyError(sender, "its Ciphertext is under another key than this round's")
        if self._closed:
            raise LateVectorError(sender)
        had = self._pieces.get(party, [])
        if party in self._complete or message.index != len(had):
            raise FaultyPartyError(sender, f"its Ciphertext has piece {message.index} out of order, or twice")
        start = message.index * per_piece
        count = min(per_piece, self._blocks - start)
        if len(message.body) != count * size:
            raise FaultyPartyError(sender, f"expected {count} ciphertexts of {size} bytes in piece {message.index}")
        loaded = self._loaded(message.body, sender)
        for place, ciphertext in enumerate(loaded, start):
            if self._sum[place] is None:
                self._sum[place] = ciphertext
            else:
                self._ring.evaluator.add_inplace(self._sum[place], ciphertext)
        if start + count == self._blocks:
            self._complete.add(party)
            self._pieces.pop(party, None)
        else:
            self._pieces[party] = [*had, message.body]

    def _loaded(self, body: bytes, sender: str) -> list[Any]:
        size, view = self._terms.plan.parameters.seeded_bytes, memoryview(body)
        try:
            return [self._ring.load_fresh(view[at : at + size]) for at in range(0, len(body), size)]
        except CiphertextError as error:
            raise FaultyPartyError(sender, f"its Ciphertext is none: {error}") from None

    def close(self) -> Totalling | Relayed:
        """End the round for those who have not sent everything. Raises: StateUsedError; TooFewSurvivorsError."""
        if self._closed:
            raise StateUsedError("the stage Adding is closed")
        self._closed = True
        known = self._terms
        if len(self._complete) < known.setup.min_survivors:
            missing = tuple(name for place, name in enumerate(known.roster) if place not in self._complete)
            needed = known.setup.min_survivors
            raise TooFewSurvivorsError("vectors sent", survivors=len(self._complete), needed=needed, missing=missing)
        for party in list(self._pieces):
            bodies = self._pieces.pop(party)
            gone = (one for body in bodies for one in self._loaded(body, known.roster[party]))
            for place, ciphertext in enumerate(gone):
                self._ring.evaluator.sub_inplace(self._sum[place], ciphertext)
        closed = Closed(known, self._number, self._key, tuple(sorted(self._complete)), self._sum)
        return Totalling(closed) if known.setup.scheme == "bfv" else Relayed(closed)


@dataclass(frozen=True)
class Closed:
    """The encrypted sum of a round over ``survivors``, places in the roster."""

    terms: Terms
    number: int
    key: bytes
    survivors: tuple[int, ...]
    sum: list[Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.terms.roster[party] for party in self.survivors)

    def pieces(self) -> Iterator[bytes]:
        """SumPieces, made one by one."""
        known = self.terms
        ring, bitmap = terms.ring_of(known.plan.parameters), base.to_bitmap(self.survivors, len(known.roster))
        step = terms.sums_per_piece(known.plan)
        for index, start in enumerate(range(0, len(self.sum), step)):
            body = b"".join(ring.dump_sum(ciphertext) for ciphertext in self.sum[start : start + step])
            yield base.encode(wire.SumPiece(known.setup.session, self.number, self.key, bitmap, index, body))


@dataclass(frozen=True)
class Total:
    """A finished round. total: int64, shape (length,), as ``decryptor`` reported it."""

    total: IntVector
    survivors: tuple[str, ...]
    decryptor: str


class Relayed:
    """CKKS: the sum goes to the survivors, and nothing comes back."""

    def __init__(self, closed: Closed) -> None:
        self.survivors = closed.names
        self._closed = closed

    def pieces(self) -> Iterator[bytes]:
        """The SumPieces for every survivor, the same for each."""
        return self._closed.pieces()


class Totalling:
    """Waits for the sum in clear from the one survivor that was asked for it."""

    def __init__(self, closed: Closed) -> None:
        self._known = closed
        self._number = closed.number
        self._decryptor = ""
        self._total = np.empty(0, np.int64)
        self._done = 0
        self.survivors = closed.names

    def ask(self, decryptor: str | None = None) -> tuple[str, Iterator[bytes]]:
        """Whom to send the SumPieces to, and these: by default the first survivor; again to ask another one.

        Raises: SpecError for who is no survivor.
        """
        name = self.survivors[0] if decryptor is None else decryptor
        if name not in self.survivors:
            raise SpecError(f"{name!r} is no survivor of this round: it refuses to open a sum without its vector")
        self._decryptor, self._done = name, 0
        self._total = np.empty(self._known.terms.setup.length, np.int64)
        return name, self._known.pieces()

    def receive(self, sender: str, raw: bytes) -> None:
        """Raises: MessageError, FaultyPartyError; then nothing has changed."""
        setup = self._known.terms.setup
        bits = modulus_bits(setup)
        step = terms.values_per_piece(bits)
        limit = wire.limit(wire.TotalPiece) + packed_bytes(min(step, setup.length), bits)
        message = wire.read(wire.TotalPiece, raw, sender=sender, limit=limit)
        if sender != self._decryptor:
            raise FaultyPartyError(sender, "was not asked for the sum")
        if message.session != setup.session or message.round != self._number:
            raise FaultyPartyError(sender, f"its sum is of another session or round than {self._number}")
        if message.index * step != self._done or self._done >= setup.length:
            raise FaultyPartyError(sender, f"piece {message.index} of its sum is out of order")
        count = min(step, setup.length - self._done)
        try:
            values = lift(unpack(message.body, count, bits), bits)
        except PackingError as error:
            raise FaultyPartyError(sender, f"its sum is not packed as agreed: {error}") from None
        largest = len(self.survivors) * setup.bound
        if int(values.max()) > largest or int(values.min()) < -largest:
            raise FaultyPartyError(sender, f"its sum has a value that {len(self.survivors)} vectors cannot add up to")
        self._total[self._done : self._done + count] = values
        self._done += count

    def close(self) -> Total:
        """Raises: StateUsedError unless the whole sum was reported."""
        if not self._decryptor or self._done < self._total.size:
            raise StateUsedError("the sum was not reported yet", hint="ask another survivor")
        return Total(self._total, self.survivors, self._decryptor)
