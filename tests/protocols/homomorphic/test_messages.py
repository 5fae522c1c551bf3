"""The messages of the shared key: one form each, strictly decoded, within their stated sizes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from choral.protocols.errors import MessageError
from choral.protocols.homomorphic import messages as common
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.masking import messages as base

ID, KEY, HALF, WHOLE = bytes(16), bytes(16), bytes(32), bytes(64)
SEALED = bytes(48)


def largest(n: int) -> list[tuple[base.Message, int]]:
    """Each message at its largest for n parties, with the bytes of its body."""
    names = tuple(chr(0x10000 + place) * base.MAX_NAME for place in range(n))  # four bytes in each character
    most = (1 << 62) - 1
    setup = wire.KeySetup(
        ID, names, 1 << 31, "ckks", most, 1.5, 0.1, n, 1 << 16, (most,) * 8, most, most, "\U00010000" * base.MAX_NAME
    )
    big = (1 << 32) - 1
    return [
        (setup, 0),
        (wire.KeyHello(ID, HALF, HALF, WHOLE), 0),
        (wire.KeyHellos(ID, (wire.HelloEntry(HALF, HALF, WHOLE),) * n), 0),
        (wire.KeyDeal(ID, HALF, (SEALED,) * (n - 1), WHOLE), 0),
        (wire.KeyDealt(ID, HALF, SEALED, WHOLE), 0),
        (wire.KeyConfirm(ID, HALF, WHOLE), 0),
        (wire.KeyConfirmations(ID, (wire.ConfirmEntry(HALF, WHOLE),) * n), 0),
        (common.Ciphertext(ID, big, KEY, big, bytes(10**6)), 10**6),
        (wire.SumPiece(ID, big, KEY, bytes(-(-n // 8)), big, bytes(10**6)), 10**6 + n // 8 + 17),
        (wire.TotalPiece(ID, big, big, bytes(10**6)), 10**6),
    ]


@pytest.mark.parametrize("n", [2, 3, 300])
def test_messages_fit_their_limits_and_come_back(n: int) -> None:
    for message, extra in largest(n):
        kind = type(message)
        limit = wire.limit(kind, n) + extra
        raw = base.encode(message)
        assert len(raw) <= limit
        assert len(raw) > 0.5 * (limit - base.ENVELOPE), "a limit that allows twice the size is no limit"
        assert wire.read(kind, raw, sender="p1", limit=limit) == message
        with pytest.raises(MessageError, match="at most") as found:
            wire.read(kind, raw, sender="p1", limit=len(raw) - 1)
        assert found.value.blame == "p1"


def test_no_message_is_taken_for_another_kind() -> None:
    for message, _ in largest(3):
        for other, extra in largest(3):
            if type(other) is not type(message):
                with pytest.raises(MessageError):
                    wire.read(type(other), base.encode(message), sender="p1", limit=10**7 + extra)


def test_changed_bytes_are_another_message_or_none() -> None:
    rng = np.random.default_rng(1)
    for message, _ in largest(3):
        raw = base.encode(message)
        for _ in range(40):
            wrong = bytearray(raw[:400] if rng.random() < 0.2 else raw)
            wrong[int(rng.integers(0, min(len(wrong), 200)))] ^= int(rng.integers(1, 256))
            try:
                read = wire.read(type(message), bytes(wrong), sender="p1", limit=10**7)
            except MessageError:
                continue
            assert base.encode(read) == bytes(wrong)


def test_fields_have_their_sizes() -> None:
    for message in (
        wire.KeyHello(ID, HALF[1:], HALF, WHOLE),
        wire.KeyHello(ID, HALF, HALF, WHOLE[1:]),
        wire.KeyDealt(ID, HALF, SEALED + b"\0", WHOLE),
        wire.KeyConfirm(ID[1:], HALF, WHOLE),
        wire.TotalPiece(ID, 0, 0, b"x"),
        wire.TotalPiece(ID, 1, -1, b"x"),
        wire.TotalPiece(ID, 1, 1, b""),
    ):
        with pytest.raises(MessageError):
            wire.read(type(message), base.encode(message), sender="p1", limit=10**4)


def test_extra_fields_and_versions_are_refused() -> None:
    raw = base.encode(wire.KeyConfirm(ID, HALF, WHOLE))
    extra = bytes([base.VERSION]) + msgspec.msgpack.encode(["keyconfirm", ID, HALF, WHOLE, 1])
    for wrong in (bytes([base.VERSION + 1]) + raw[1:], raw + b"\0", extra, b""):
        with pytest.raises(MessageError):
            wire.read(wire.KeyConfirm, wrong, sender="p1", limit=10**4)


def test_the_common_decoder_takes_ciphertexts_only() -> None:
    ciphertext = common.Ciphertext(ID, 1, KEY, 0, b"body")
    assert common.read_ciphertext(base.encode(ciphertext), sender="p1", body=4) == ciphertext
    with pytest.raises(MessageError):
        common.read_ciphertext(base.encode(wire.TotalPiece(ID, 1, 0, b"body")), sender="p1", body=400)


@pytest.mark.parametrize("size", [1, 255, 256, 65_535, 65_536])
def test_a_ciphertext_has_one_form_only(size: int) -> None:
    raw = base.encode(common.Ciphertext(ID, 1, KEY, 0, bytes(size)))
    assert common.read_ciphertext(raw, sender="p1", body=size).body == bytes(size)
    head = raw[: len(raw) - size]
    width = {255: 2, 65_535: 3}.get(size, 2 if size == 1 else 3 if size < 65_536 else 5)
    others = [
        head[:-width] + bytes([0xC6]) + size.to_bytes(4, "big"),  # the body's length in more bytes than it needs
        head.replace(b"\x01\xc4", b"\xcc\x01\xc4", 1),  # so the round's number
        bytes([base.VERSION + 1]) + head[1:],
    ]
    for other in others:
        if other != head:
            with pytest.raises(MessageError) as found:
                common.read_ciphertext(other + bytes(size), sender="p1", body=size + 10)
            assert found.value.blame == "p1"
    for wrong in (raw + b"\0", raw[:-1], b"", raw[1:]):
        with pytest.raises(MessageError):
            common.read_ciphertext(wrong, sender="p1", body=size + 10)
