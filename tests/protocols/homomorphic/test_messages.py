"""The messages of the shared key: one form each, strictly decoded, within their stated sizes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from choral.protocols.errors import MessageError
from choral.protocols.homomorphic import messages as common
from choral.protocols.homomorphic.shared import key_messages
from choral.protocols.wire_format import ENVELOPE, VERSION, Message, encode, read

ID, KEY, HALF, WHOLE = bytes(16), bytes(16), bytes(32), bytes(64)
SEALED = bytes(48)


def largest(n: int) -> list[tuple[Message, int]]:
    """Each message at its largest for n parties, with the bytes of what it carries."""
    big = (1 << 32) - 1
    return [
        (key_messages.KeyDeal(ID, HALF, (SEALED,) * n, WHOLE), n),
        (key_messages.KeyConfirm(ID, HALF, WHOLE), n),
        (key_messages.KeyConfirmations(ID, (key_messages.ConfirmEntry(HALF, WHOLE),) * n), n),
        (common.Ciphertext(ID, big, KEY, big, bytes(10**6)), 10**6),
        (key_messages.EncryptedSum(ID, big, bytes(-(-n // 8)), (bytes(10**6),) * 16), 16 * 10**6 + n // 8 + 1),
        (key_messages.OpenedSum(ID, big, (bytes(10**6),) * 16), 16 * 10**6),
    ]


def limit(kind: type[Message], entries: int) -> int:
    return ENVELOPE + entries if kind is common.Ciphertext else key_messages.limit(kind, entries)


@pytest.mark.parametrize("n", [2, 3, 300])
def test_messages_fit_their_limits_and_come_back(n: int) -> None:
    for message, entries in largest(n):
        kind = type(message)
        most = limit(kind, entries)
        raw = encode(message)
        assert len(raw) <= most
        assert len(raw) > 0.5 * (most - ENVELOPE), "a limit that allows twice the size is no limit"
        assert read(kind, raw, sender="p1", limit=most) == message
        with pytest.raises(MessageError, match="at most") as found:
            read(kind, raw, sender="p1", limit=len(raw) - 1)
        assert found.value.blame == "p1"


def test_no_message_is_taken_for_another_kind() -> None:
    for message, _ in largest(3):
        for other, _ in largest(3):
            if type(other) is not type(message):
                with pytest.raises(MessageError):
                    read(type(other), encode(message), sender="p1", limit=10**8)


def test_changed_bytes_are_another_message_or_none() -> None:
    rng = np.random.default_rng(1)
    for message, _ in largest(3):
        raw = encode(message)
        for _ in range(40):
            wrong = bytearray(raw[:400] if rng.random() < 0.2 else raw)
            wrong[int(rng.integers(0, min(len(wrong), 200)))] ^= int(rng.integers(1, 256))
            try:
                found = read(type(message), bytes(wrong), sender="p1", limit=10**8)
            except MessageError:
                continue
            assert encode(found) == bytes(wrong)


def test_fields_have_their_sizes() -> None:
    for message in (
        key_messages.KeyDeal(ID, HALF[1:], (SEALED,), WHOLE),
        key_messages.KeyDeal(ID, HALF, (SEALED,), WHOLE[1:]),
        key_messages.KeyDeal(ID, HALF, (SEALED + b"\0",), WHOLE),
        key_messages.KeyDeal(ID, HALF, (), WHOLE),
        key_messages.KeyConfirm(ID[1:], HALF, WHOLE),
        key_messages.OpenedSum(ID, 0, (b"x",)),
        key_messages.OpenedSum(ID, 1, ()),
        key_messages.OpenedSum(ID, 1, (b"x",) * 17),
        key_messages.EncryptedSum(ID, 1, b"", (b"x",)),
        common.Ciphertext(ID, 1, KEY, -1, b"x"),
        common.Ciphertext(ID, 1, KEY, 0, b""),
    ):
        with pytest.raises(MessageError):
            read(type(message), encode(message), sender="p1", limit=10**4)


def test_extra_fields_and_versions_are_refused() -> None:
    raw = encode(key_messages.KeyConfirm(ID, HALF, WHOLE))
    extra = bytes([VERSION]) + msgspec.msgpack.encode(["keyconfirm", ID, HALF, WHOLE, 1])
    for wrong in (bytes([VERSION + 1]) + raw[1:], raw + b"\0", extra, b""):
        with pytest.raises(MessageError):
            read(key_messages.KeyConfirm, wrong, sender="p1", limit=10**4)


def test_the_common_decoder_takes_ciphertexts_only() -> None:
    ciphertext = common.Ciphertext(ID, 1, KEY, 0, b"body")
    assert common.read_ciphertext(encode(ciphertext), sender="p1", body=4) == ciphertext
    with pytest.raises(MessageError):
        common.read_ciphertext(encode(key_messages.OpenedSum(ID, 1, (b"body",))), sender="p1", body=400)


@pytest.mark.parametrize("size", [1, 255, 256, 65_535, 65_536])
def test_a_ciphertext_has_one_form_only(size: int) -> None:
    raw = encode(common.Ciphertext(ID, 1, KEY, 0, bytes(size)))
    assert common.read_ciphertext(raw, sender="p1", body=size).body == bytes(size)
    head = raw[: len(raw) - size]
    width = {255: 2, 65_535: 3}.get(size, 2 if size == 1 else 3 if size < 65_536 else 5)
    others = [
        head[:-width] + bytes([0xC6]) + size.to_bytes(4, "big"),  # the body's length in more bytes than it needs
        head.replace(b"\x01\xc4", b"\xcc\x01\xc4", 1),  # so the round's number
        bytes([VERSION + 1]) + head[1:],
    ]
    for other in others:
        if other != head:
            with pytest.raises(MessageError) as found:
                common.read_ciphertext(other + bytes(size), sender="p1", body=size + 10)
            assert found.value.blame == "p1"
    for wrong in (raw + b"\0", raw[:-1], b"", raw[1:]):
        with pytest.raises(MessageError):
            common.read_ciphertext(wrong, sender="p1", body=size + 10)
