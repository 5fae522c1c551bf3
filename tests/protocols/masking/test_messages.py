"""The wire format: one encoding per message, sizes and trips as the docstrings say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols import Masked, SumSpec
from choral.protocols.crypto.modular_integers import packed_bytes
from choral.protocols.errors import MessageError
from choral.protocols.masking import messages, signing
from choral.protocols.wire_format import claims_to_be

VERSION = bytes([messages.VERSION])
ID, H, SIG = b"s" * 16, b"h" * 32, b"g" * 64
SAMPLES: dict[str, Any] = {
    "SumSetup": messages.SumSetup(
        ID, ("a", "b", "ç"), 5, 9, 6, 2, 2, 2, 0, 0, "malicious", 40, 20, "step 1", weight_bound=5, terms=H
    ),
    "Hello": messages.Hello(ID, H, SIG),
    "Hellos": messages.Hellos(ID, (messages.HelloEntry(H, SIG),) * 3),
    "Reveal": messages.Reveal(ID, H),
    "Reveals": messages.Reveals(ID, (H, H)),
    "Begin": messages.Begin(ID, 7, 300, H, H),
    "Bundle": messages.Bundle((b"one", b"other")),
    "Advertise": messages.Advertise(ID, 7, H, H, SIG),
    "Roster": messages.Roster(ID, 7, (messages.RosterEntry(300, H, H, SIG),)),
    "DealtShares": messages.DealtShares(ID, 7, H, None, (messages.Packet(1, H, H, b"x" * 82),)),
    "Deliveries": messages.Deliveries(ID, 7, (messages.Packet(1, H, H, b"x" * 82),)),
    "Upload": messages.Upload(ID, 7, (b"vector",)),
    "Survivors": messages.Survivors(ID, 7, b"\x07"),
    "Confirm": messages.Confirm(ID, 7, SIG, (1, 300)),
    "Confirmations": messages.Confirmations(ID, 7, (messages.Confirmation(2, SIG),)),
    "Unmask": messages.Unmask(ID, 7, (messages.Revealed(0, b"s" * 33),), (), messages.Following(8, H, H, SIG)),
}
UP = {"Hello", "Reveal", "Advertise", "DealtShares", "Upload", "Confirm", "Unmask"}


def decode(kind: str, raw: bytes, limit: int = 1 << 20) -> Any:
    return messages.to_server(raw, sender="a", limit=limit) if kind in UP else messages.to_party(raw, limit=limit)


def test_there_is_a_sample_of_every_message() -> None:
    kinds = {kind.__name__ for kind in messages.Message.__subclasses__() if kind.__module__ == messages.__name__}
    assert kinds == set(SAMPLES)


@pytest.mark.parametrize("kind", SAMPLES)
def test_round_trip_version_and_direction(kind: str) -> None:
    raw = messages.encode(SAMPLES[kind])
    assert decode(kind, raw) == SAMPLES[kind]
    assert decode(kind, raw, limit=len(raw)) == SAMPLES[kind]
    with pytest.raises(MessageError, match="at most"):
        decode(kind, raw, limit=len(raw) - 1)
    with pytest.raises(MessageError, match="version 2"):
        decode(kind, b"\x01" + raw[1:])
    other = "SumSetup" if kind in UP else "Hello"
    with pytest.raises(MessageError):
        decode(other, raw)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_message_claims_to_be_of_its_kind_and_of_no_other(kind: str) -> None:
    raw = messages.encode(SAMPLES[kind])
    assert [name for name, sample in SAMPLES.items() if claims_to_be(type(sample), raw)] == [kind]
    assert not claims_to_be(type(SAMPLES[kind]), raw[1:])
    assert not claims_to_be(type(SAMPLES[kind]), None)


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_prefix_and_every_extension_is_refused(kind: str) -> None:
    raw = messages.encode(SAMPLES[kind])
    for end in range(len(raw)):
        with pytest.raises(MessageError):
            decode(kind, raw[:end])
    for tail in (b"\0", b"\xc0", raw):
        with pytest.raises(MessageError):
            decode(kind, raw + tail)


@pytest.mark.parametrize("kind", SAMPLES)
def test_missing_extra_and_misplaced_fields_are_refused(kind: str) -> None:
    fields = msgspec.msgpack.decode(messages.encode(SAMPLES[kind])[1:])
    for changed in (
        fields[:-1],
        [*fields, 0],
        [*fields, None],
        [fields[0], *fields[:0:-1], 3],
        fields[1:],
        {},
        0,
        None,
    ):
        with pytest.raises(MessageError):
            decode(kind, VERSION + msgspec.msgpack.encode(changed))
    for place in range(1, len(fields)):
        for wrong in ("text", -1, 1.5, True, b"", b"x" * 31, [[]], {"a": 1}, 1 << 63):
            fits = isinstance(wrong, bytes) and place == 3 and (kind == "Upload" or (kind == "Survivors" and wrong))
            fits = fits or (wrong == "text" and fields[place] == "step 1")  # SumSetup's free text
            if fields[place] == wrong or fits:
                continue
            with pytest.raises(MessageError):
                decode(kind, VERSION + msgspec.msgpack.encode([*fields[:place], wrong, *fields[place + 1 :]]))


def test_only_the_canonical_encoding_is_accepted() -> None:
    raw = messages.encode(SAMPLES["Advertise"])
    place = raw.index(b"\x07", 20)
    assert raw[place - 1 : place] == b"s"  # the round number 7, one byte
    longer = raw[:place] + b"\xcc\x07" + raw[place + 1 :]
    assert msgspec.msgpack.decode(longer[1:]) == msgspec.msgpack.decode(raw[1:])
    with pytest.raises(MessageError, match="canonical"):
        decode("Advertise", longer)


def test_deep_nesting_and_huge_headers_cost_nothing() -> None:
    for bomb in (
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff" * 10,
        b"\xc6\xff\xff\xff\xff",
        b"\x95\xa5hello" + b"\x91" * 99_999,
    ):
        for kind in ("Hello", "SumSetup"):
            with pytest.raises(MessageError):
                decode(kind, VERSION + bomb)


def test_an_error_does_not_quote_what_was_sent() -> None:
    raw = VERSION + msgspec.msgpack.encode(["private text", 1])
    with pytest.raises(MessageError) as caught:
        decode("Hello", raw)
    assert "private" not in str(caught.value)


def test_bitmaps() -> None:
    for n in (1, 7, 8, 9, 64):
        for members in (set(), {0}, {n - 1}, set(range(n))):
            assert messages.from_bitmap(messages.to_bitmap(members, n), n) == members
            assert len(messages.to_bitmap(members, n)) == -(-n // 8)


@pytest.mark.parametrize(("n", "neighbours", "threshold"), [(2, 1, 2), (9, 8, 6), (40, 39, 25), (150, 20, 14)])
def test_sizes_and_trips_are_what_the_docstrings_say(
    network: Callable[..., Any], n: int, neighbours: int, threshold: int
) -> None:
    net = network(n, neighbours=neighbours, threshold=threshold, length=1001, min_survivors=max(threshold, 2)).open()
    drops = {"p1": "upload"} if n > 2 else {}
    net.round({name: [1] * 1001 for name in net.names}, drops=drops)
    setup = net.setup
    lists = {
        "Hellos": n,
        "Reveals": n,
        "Roster": neighbours,
        "DealtShares": neighbours,
        "Deliveries": neighbours,
        "Upload": packed_bytes(1001, setup.modulus_bits),
        "Survivors": -(-n // 8),
        "Confirmations": threshold - setup.complete,
        "Unmask": neighbours + setup.complete,
    }
    seen: Counter[tuple[str, str, str]] = Counter()
    for way, _, name, raw in net.sent:
        message = (
            messages.to_server(raw, sender=name, limit=1 << 20)
            if way == "up"
            else messages.to_party(raw, limit=1 << 20)
        )
        kind = type(message)
        seen[way, kind.__name__, name] += 1
        if kind is messages.SumSetup:
            assert len(raw) <= messages.ENVELOPE + 64 + sum(2 + len(party) for party in setup.roster)
            continue
        entries = lists.get(kind.__name__, 0)
        bound = messages.limit(kind, entries)
        per_entry_slack = 4 if kind not in (messages.Upload, messages.Survivors, messages.Reveals) else 0
        rides = 143 if kind is messages.Unmask else 0  # no key for a later round rode along
        own = 34 if kind is messages.DealtShares and not setup.complete else 0
        assert bound - messages.ENVELOPE - per_entry_slack * entries - rides - own <= len(raw) <= bound, kind
    assert set(seen.values()) == {1}
    # Trips of a party that stays: 2 to open the session and 5 for a round, each one message up and one down.
    up = [kind for way, kind, name in seen if (way, name) == ("up", "p0")]
    assert up == ["Hello", "Reveal", "Advertise", "DealtShares", "Upload", "Confirm", "Unmask"]
    down = [kind for way, kind, name in seen if (way, name) == ("down", "p0")]
    assert down == ["SumSetup", "Hellos", "Reveals", "Roster", "Deliveries", "Survivors", "Confirmations"]


def test_each_step_allows_for_as_many_entries_as_its_message_has(
    network: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = set(), messages.limit
    monkeypatch.setattr(messages, "limit", lambda kind, n=0: asked.add((kind.__name__, n)) or real(kind, n))
    net = network(20).open()
    net.round({name: [1, 2, 3] for name in net.names})
    assert {(name, n) for name, n in asked if n} == {
        ("SumSetup", 20),
        ("Hellos", 20),
        ("Reveals", 20),
        ("Roster", 19),
        ("DealtShares", 19),
        ("Deliveries", 19),
        ("Upload", packed_bytes(3, net.setup.modulus_bits)),
        ("Survivors", 3),
        ("Confirmations", 19),
        ("Unmask", 20),
    }


@pytest.mark.parametrize("n", [3, 20, 100])
def test_bytes_per_round_are_counted_and_within_the_formula(n: int) -> None:
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(n)), length=500, bound=2**15)
    session = Masked().open(spec)
    k, t = session.statement["neighbours"], session.statement["threshold"]
    vectors = {party: [place] * 500 for place, party in enumerate(spec.parties)}
    packed = packed_bytes(500, spec.modulus_bits)
    for number in range(2):
        summing = session.begin()
        for party, vector in vectors.items():
            summing.submit(party, np.array(vector))
        result = summing.finish()
        if number == 0:
            continue  # the first also counts the opening
        for party in spec.parties:
            assert packed + 199 * k < result.bytes_up[party] + 4 * 2 * k + 400
            assert result.bytes_up[party] <= packed + 199 * k + 574
            assert result.bytes_down[party] <= 298 * k + 72 * t + n / 8 + 457
            assert result.bytes_down[party] > 284 * k


def test_the_largest_setup_fits_its_limit() -> None:
    names = tuple("\U0001f3e5" * 254 + letter for letter in "ab")  # 4 bytes a character
    spec = SumSpec(parties=names, length=2**31, bound=2**12, encoding="\U0001f3e5" * 255, terms=H)
    raw = messages.encode(Masked().setup(spec, session=b"\xff" * 16))
    assert messages.limit(messages.SumSetup, 2) - 130 < len(raw) <= messages.limit(messages.SumSetup, 2)


def test_a_long_vector_travels_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE", 100)
    for length in (1, 99, 100, 101, 200, 450):
        packed = bytes(range(256)) * 2
        pieces = messages.to_pieces(packed[:length])
        assert [len(piece) for piece in pieces[:-1]] == [100] * (len(pieces) - 1)
        assert messages.from_pieces(pieces) == packed[:length]
    for odd in ((b"", b""), (b"x" * 99, b"x"), (b"x" * 100, b""), (b"x" * 101, b"x"), (b"x" * 50, b"x" * 50)):
        assert messages.from_pieces(odd) is None


def test_a_sum_of_vectors_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE", 100)
    summing = Masked().open(SumSpec(parties=("a", "b", "c"), length=200, bound=10)).begin()
    for party in ("a", "b", "c"):
        summing.submit(party, np.arange(200, dtype=np.int64) % 11)
    assert np.array_equal(summing.finish().total, 3 * (np.arange(200) % 11))


def test_the_longest_vector_has_five_pieces_and_fits_the_envelope() -> None:
    """2^31 values of 64 bits. Headers of byte strings from 2^16 bytes on are equally long."""
    assert -(-packed_bytes(2**31, 64) // messages.PIECE) == 5
    raw = messages.encode(messages.Upload(ID, 2**32 - 1, (bytes(70_000),) * 5))
    assert len(raw) <= messages.limit(messages.Upload, 350_000)
    SumSpec(parties=("a", "b"), length=2**31, bound=2**61)


def test_a_share_is_hashed_as_every_digest_is() -> None:
    """What is kept of a round, so as not to be framed anew for each share, changes no hash."""
    for kind, place in (("seed", 0), ("key", 300), ("seed", 9)):
        parts = (b"s" * 32, 7 + place, place, place + 1, bytes([place % 251]) * 33)
        assert signing.share_hash(*parts[:2], kind, *parts[2:]) == signing.digest(f"share/{kind}", *parts)
