"""The messages of the masked sum, in the form of :mod:`choral.protocols.wire_format`.

Sizes in bytes, at most :func:`limit`; ENVELOPE covers the version, the kind, session, round and all headers:

| message | way | size |
|---|---|---|
| SumSetup | down | ENVELOPE + 1155 + 1025 n (names of 255 characters; one of c ASCII characters takes c + 2) |
| Hello | up | ENVELOPE + 100 |
| Hellos | down | ENVELOPE + 101 n |
| Reveal | up | ENVELOPE + 34 |
| Reveals | down | ENVELOPE + 34 n |
| Begin | down | ENVELOPE + 73 |
| Bundle | down | ENVELOPE + its parts |
| Advertise | up | ENVELOPE + 135 |
| Roster | down | ENVELOPE + 140 m |
| DealtShares | up | ENVELOPE + 68 + 158 m |
| Deliveries | down | ENVELOPE + 158 m |
| Upload | up | ENVELOPE + ceil(b d / 8) |
| Survivors | down | ENVELOPE + ceil(n / 8) |
| Confirm | up | ENVELOPE + 66 + 5 m (m: packets that did not open) |
| Confirmations | down | ENVELOPE + 72 m |
| Unmask | up | ENVELOPE + 143 + 41 m |

n: parties; b: modulus bits; d: length; m: entries in the message's list, at most k (k + 1 in Unmask on a complete
graph, where a party also reveals its own share; at most t in Confirmations). So a round whose keys rode on the one
before costs a party at most ceil(b d / 8) + 199 k + 574 bytes up and 298 k + 72 t + n / 8 + 457 down (Begin and Roster
travel as one Bundle), and 5 bytes up more for each packet that does not open.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from choral.protocols.errors import SERVER, FaultyServerError
from choral.protocols.wire_format import ENVELOPE as ENVELOPE
from choral.protocols.wire_format import MAX_NAME as MAX_NAME
from choral.protocols.wire_format import MAX_PARTIES as MAX_PARTIES
from choral.protocols.wire_format import VERSION as VERSION
from choral.protocols.wire_format import Bytes32, Entry, Index, Name, RoundNumber, SessionId, Signature, read
from choral.protocols.wire_format import Message as Message
from choral.protocols.wire_format import encode as encode

M = TypeVar("M", bound=Message)

PIECE = 2**32 - 1
"""Bytes in one piece of a packed vector: the longest byte string of msgpack. 2^31 values of 64 bits are five pieces."""

Share = Annotated[bytes, Meta(min_length=33, max_length=33)]
SealedShares = Annotated[bytes, Meta(min_length=82, max_length=82)]


class SumSetup(Message, frozen=True):
    """What a session sums, and under which protection. Every party signs its digest (in its Hello).

    roster: the parties' names. length: coordinates. bound: largest |value| of one party, weights included.
    neighbours, threshold: k and t. min_survivors: fewer vectors than this are never summed.
    corrupt, dropouts: how many parties of the roster may collude with the server, and may vanish, as k and t assume.
    cohort, directory: how the roster was made, and of how many parties: it is "everyone" (None), or the server's own
        choice ("chosen"), or a draw at random that the parties take the server's word for ("random").
    security_bits, correctness_bits: what a sparse graph achieves at least, statistically; every party computes it again
        from the other numbers. A complete graph achieves any.
    encoding: how values became integers (scale, clipping, weight cap), as text, so that all parties use the same.
    weight_bound: largest |value| of one party's last coordinate, where that is less than ``bound``.
    terms: digest of the training terms, which no Begin of this session may then change.
    """

    session: SessionId
    roster: Annotated[tuple[Name, ...], Meta(min_length=2, max_length=MAX_PARTIES)]
    length: Annotated[int, Meta(ge=1, le=1 << 31)]
    bound: Annotated[int, Meta(ge=1, lt=1 << 62)]
    modulus_bits: Annotated[int, Meta(ge=1, le=64)]
    neighbours: Annotated[int, Meta(ge=1, lt=MAX_PARTIES)]
    threshold: Annotated[int, Meta(ge=2, lt=MAX_PARTIES)]
    min_survivors: Annotated[int, Meta(ge=2, lt=MAX_PARTIES)]
    corrupt: Index
    dropouts: Index
    server: Literal["semi-honest", "malicious"]
    security_bits: Annotated[int, Meta(ge=1, le=128)] = 40
    correctness_bits: Annotated[int, Meta(ge=1, le=128)] = 20
    encoding: Annotated[str, Meta(max_length=MAX_NAME)] = ""
    cohort: Literal["everyone", "chosen", "random"] = "everyone"
    directory: Annotated[int, Meta(ge=2, le=1 << 40)] | None = None
    weight_bound: Annotated[int, Meta(ge=1, lt=1 << 62)] | None = None
    terms: Bytes32 | None = None

    @property
    def population(self) -> int:
        """How many parties the roster was taken from, as the server says."""
        return len(self.roster) if self.directory is None else self.directory

    @property
    def complete(self) -> bool:
        """Whether everyone masks with everyone. Then each party also holds a share of its own self-mask seed."""
        return self.neighbours == len(self.roster) - 1

    @property
    def holders(self) -> int:
        """How many parties hold shares of one party's seed: all n on a complete graph, else its k neighbours."""
        return len(self.roster) if self.complete else self.neighbours


class Hello(Message, frozen=True):
    """A party accepts the setup: its commitment to a nonce, signed."""

    session: SessionId
    commitment: Bytes32
    signature: Signature


class Hellos(Message, frozen=True):
    """Everybody's Hello, in roster order."""

    session: SessionId
    hellos: Annotated[tuple[HelloEntry, ...], Meta(max_length=MAX_PARTIES)]


class HelloEntry(Entry, frozen=True):
    commitment: Bytes32
    signature: Signature


class Reveal(Message, frozen=True):
    """The nonce that was committed to, sent only after all commitments were seen."""

    session: SessionId
    nonce: Bytes32


class Reveals(Message, frozen=True):
    """Everybody's nonce, in roster order."""

    session: SessionId
    nonces: Annotated[tuple[Bytes32, ...], Meta(max_length=MAX_PARTIES)]


class Begin(Message, frozen=True):
    """The server asks to take part in a round, and says what is trained: RoundTerms of :mod:`choral.protocols.driver`.

    Its digest is part of the masks and of what Confirm signs: two parties that were shown different ones have no sum.
    """

    session: SessionId
    round: RoundNumber
    exchange: Annotated[int, Meta(ge=0, lt=1 << 32)]
    weights: Bytes32
    terms: Bytes32


class Bundle(Message, frozen=True):
    """Messages to one party that travel as one. It takes them in this order, and answers the last."""

    parts: Annotated[tuple[bytes, ...], Meta(min_length=2, max_length=3)]


class Advertise(Message, frozen=True):
    """A party's two fresh X25519 public keys for one round, signed: for masks, and for the packets of shares."""

    session: SessionId
    round: RoundNumber
    mask: Bytes32
    transport: Bytes32
    signature: Signature


class RosterEntry(Entry, frozen=True):
    party: Index
    mask: Bytes32
    transport: Bytes32
    signature: Signature


class Roster(Message, frozen=True):
    """The keys of those neighbours that take part in this round, by ascending index."""

    session: SessionId
    round: RoundNumber
    entries: Annotated[tuple[RosterEntry, ...], Meta(max_length=MAX_PARTIES)]


class Packet(Entry, frozen=True):
    """Two sealed shares. In DealtShares ``party`` is whom they are for, in Deliveries whom they are from.

    seed_hash, key_hash: commitments to the two shares, by which the server recognises them when they are revealed.
    """

    party: Index
    seed_hash: Bytes32
    key_hash: Bytes32
    sealed: SealedShares


class DealtShares(Message, frozen=True):
    """A party's shares for each neighbour, and a commitment to the self-mask seed.

    own_hash: commitment to the share of the seed that it keeps itself; on a complete graph only.
    """

    session: SessionId
    round: RoundNumber
    seed_commitment: Bytes32
    own_hash: Bytes32 | None
    packets: Annotated[tuple[Packet, ...], Meta(max_length=MAX_PARTIES)]


class Deliveries(Message, frozen=True):
    """The shares that this party's neighbours made for it, by ascending index."""

    session: SessionId
    round: RoundNumber
    packets: Annotated[tuple[Packet, ...], Meta(max_length=MAX_PARTIES)]


class Upload(Message, frozen=True):
    """The masked vector, packed, in pieces of PIECE bytes; only the last one is shorter."""

    session: SessionId
    round: RoundNumber
    vector: Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=5)]


class Survivors(Message, frozen=True):
    """Whose vectors are in the sum: bit i % 8 (least significant first) of byte i // 8 is party i."""

    session: SessionId
    round: RoundNumber
    bitmap: Annotated[bytes, Meta(min_length=1, max_length=MAX_PARTIES // 8)]


class Confirm(Message, frozen=True):
    """A survivor's signature on the set of survivors and the Begin.

    unopened: the neighbours, ascending, whose packets did not open, so that this party holds no share of theirs.
    """

    session: SessionId
    round: RoundNumber
    signature: Signature
    unopened: Annotated[tuple[Index, ...], Meta(max_length=MAX_PARTIES)]


class Confirmation(Entry, frozen=True):
    party: Index
    signature: Signature


class Confirmations(Message, frozen=True):
    """Enough neighbours' signatures on the set of survivors, by ascending index."""

    session: SessionId
    round: RoundNumber
    entries: Annotated[tuple[Confirmation, ...], Meta(max_length=MAX_PARTIES)]


class Revealed(Entry, frozen=True):
    """One share of the secret of ``party``."""

    party: Index
    share: Share


class Following(Entry, frozen=True):
    """A later round's Advertise, riding on this round's last message."""

    round: RoundNumber
    mask: Bytes32
    transport: Bytes32
    signature: Signature


class Unmask(Message, frozen=True):
    """DealtShares of the survivors' self-mask seeds and of the dropped parties' mask keys, each by ascending index."""

    session: SessionId
    round: RoundNumber
    seeds: Annotated[tuple[Revealed, ...], Meta(max_length=MAX_PARTIES)]
    keys: Annotated[tuple[Revealed, ...], Meta(max_length=MAX_PARTIES)]
    following: Following | None


_FIXED = {SumSetup: 1155, Begin: 73, Hello: 100, Reveal: 34, Advertise: 135, DealtShares: 68, Confirm: 66, Unmask: 143}
_EACH = {
    SumSetup: 1025,
    Hellos: 101,
    Reveals: 34,
    Roster: 140,
    DealtShares: 158,
    Deliveries: 158,
    Upload: 1,
    Bundle: 1,
    Survivors: 1,
    Confirm: 5,
    Confirmations: 72,
    Unmask: 41,
}

ToServer = Hello | Reveal | Advertise | DealtShares | Upload | Confirm | Unmask
AfterSetup = Bundle | Hellos | Reveals | Begin | Roster | Deliveries | Survivors | Confirmations
ToParty = SumSetup | AfterSetup


def limit(kind: type[Message], entries: int = 0) -> int:
    """The largest size in bytes of a message with so many entries in its list, or bytes in its vector or bitmap."""
    return ENVELOPE + _FIXED.get(kind, 0) + _EACH.get(kind, 0) * entries


def to_pieces(packed: bytes) -> tuple[bytes, ...]:
    """A packed vector as it stands in Upload."""
    if len(packed) <= PIECE:
        return (packed,)
    return tuple(packed[start : start + PIECE] for start in range(0, len(packed), PIECE))


def from_pieces(pieces: tuple[bytes, ...]) -> bytes | None:
    """The packed vector, or None when it was cut in any other way than :func:`to_pieces` does."""
    if len(pieces) == 1:
        return pieces[0]
    whole = b"".join(pieces)
    return whole if [len(piece) for piece in to_pieces(whole)] == [len(piece) for piece in pieces] else None


def to_bitmap(parties: Iterable[int], n: int) -> bytes:
    """The set of party numbers below ``n``, as in Survivors: ceil(n / 8) bytes."""
    bitmap = bytearray(-(-n // 8))
    for party in parties:
        bitmap[party // 8] |= 1 << party % 8
    return bytes(bitmap)


def from_bitmap(bitmap: bytes, n: int) -> frozenset[int] | None:
    """The set, or None when the bitmap is not of ``n`` parties: another length, or a bit set beyond them."""
    bits = int.from_bytes(bitmap, "little")
    if len(bitmap) != -(-n // 8) or bits >> n:
        return None
    return frozenset(party for party in range(n) if bitmap[party // 8] >> party % 8 & 1)


def to_server(raw: bytes, *, sender: str, limit: int) -> ToServer:
    """A message that ``sender`` sent to the server. Raises MessageError, blaming it, for anything else."""
    message: ToServer = read(ToServer, raw, sender=sender, limit=limit)
    return message


def to_party(raw: bytes, *, limit: int) -> ToParty:
    """A message from the server. Raises MessageError, blaming the server, for anything else."""
    message: ToParty = read(ToParty, raw, sender="the server", limit=limit)
    return message


def expect(message: ToParty, kind: type[M]) -> M:
    """Raises: FaultyServerError for a message of another kind."""
    if not isinstance(message, kind):
        raise FaultyServerError(f"expected its {kind.__name__}, got its {type(message).__name__}")
    return message


def from_server(
    kind: type[Any], raw: bytes, session: bytes, limit: int, *, number: int = 0, known: Any = ToParty
) -> Any:
    """The one message that a state waits for. number: of its round. known: whatever may come in this protocol.

    Raises: MessageError; FaultyServerError for any other.
    """
    message = expect(read(known, raw, sender=SERVER, limit=limit), kind)
    if message.session != session:
        raise FaultyServerError(f"the {kind.__name__} is of another session")
    if number and message.round != number:
        raise FaultyServerError(f"the {kind.__name__} is of round {message.round}, not {number}")
    return message
