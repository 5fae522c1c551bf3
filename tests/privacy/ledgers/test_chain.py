"""The chain of hashes, against hashlib and json by themselves."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest

from choral.privacy.ledgers.hash_chain import GENESIS, BrokenChainError, ChainedLine, follow, lines


class Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    text: str


WORDS = tuple(Word(text=text) for text in ("a", "b", "ü", "d"))
DECODER = msgspec.json.Decoder(ChainedLine[Word])


def by_hand(texts: list[str]) -> tuple[bytes, str]:
    content, head = "", "0" * 64
    for text in texts:
        compact = {"ensure_ascii": False, "separators": (",", ":")}
        digest = hashlib.sha256(json.dumps([head, {"text": text}], **compact).encode()).hexdigest()
        content += json.dumps({"previous": head, "entry": {"text": text}, "digest": digest}, **compact) + "\n"
        head = digest
    return content.encode(), head


def test_lines_are_those_made_by_hand() -> None:
    assert lines(GENESIS, WORDS) == by_hand(["a", "b", "ü", "d"])
    first, head = lines(GENESIS, WORDS[:2])
    rest, last = lines(head, WORDS[2:])
    assert (first + rest, last) == lines(GENESIS, WORDS)
    assert lines(head, ()) == (b"", head)


def test_what_was_written_is_followed() -> None:
    content, head = lines(GENESIS, WORDS)
    found = list(follow(content, DECODER))
    assert tuple(entry for entry, _ in found) == WORDS
    assert found[-1][1] == head


def test_every_byte_counts() -> None:
    """Whichever byte is changed, that line or the one before it does not follow."""
    content, _ = lines(GENESIS, WORDS)
    for place in range(len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(BrokenChainError) as caught:
            list(follow(bytes(changed), DECODER))
        assert abs(caught.value.number - (content[:place].count(b"\n") + 1)) <= 1


def test_a_line_in_other_words_is_refused() -> None:
    """The same JSON with a space: only the one form that is written is read."""
    content, _ = lines(GENESIS, WORDS[:1])
    with pytest.raises(BrokenChainError, match="line 1"):
        list(follow(content.replace(b'{"previous":', b'{"previous": '), DECODER))


@pytest.mark.parametrize(
    ("change", "number", "undecoded"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b'{"previous"', b'{"more":1,"previous"')], 3, True),
        (lambda lines: [*lines[:2], lines[2].replace(b'{"text"', b'{"more":1,"text"')], 3, True),
        (lambda lines: [lines[0], b"", *lines[1:]], 2, True),
        (lambda lines: [lines[0], lines[1].replace(b'{"text":"b"', b'{"text":"c"'), *lines[2:]], 2, False),
        (lambda lines: lines[1:], 1, False),
        (lambda lines: [lines[0], *lines[2:]], 2, False),
        (lambda lines: [lines[0], lines[0]], 2, False),
        (lambda lines: [lines[0], lines[2], lines[1]], 2, False),
    ],
)
def test_the_line_that_is_not_as_it_was_written_is_named(change: Any, number: int, undecoded: bool) -> None:
    content, _ = lines(GENESIS, WORDS)
    changed = b"".join(line + b"\n" for line in change(content.splitlines()))
    with pytest.raises(BrokenChainError) as caught:
        list(follow(changed, DECODER))
    assert (caught.value.number, caught.value.undecoded) == (number, undecoded)


def test_what_follows_the_last_whole_line_is_not_read() -> None:
    content, _ = lines(GENESIS, WORDS)
    assert [entry for entry, _ in follow(content[:-1], DECODER)] == list(WORDS[:-1])
    assert list(follow(b"", DECODER)) == []
