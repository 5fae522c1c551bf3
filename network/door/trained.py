"""What a site's process and the engine's component say to each other of a vector that is trained in the engine.

    component -> site    a coordinator's signed request
    site -> component    `WANTED`, and the weights to train from: float32, little-endian, one tensor after the other
    component -> site    `handed`: the same request, how many examples there were, the weights after the training
    site -> component    the reply for the coordinator, as always

Standard library only. A request that comes again, after its vector was taken, gets the reply that it got: no second
vector of a round is ever sent.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from choral.network.door.client import OK

WANTED = b"choral train 1\n"
_MAGIC = b"choral trained 1\n"
_HEAD = struct.Struct(f"!{len(_MAGIC)}sQQ")
OVERHEAD = _HEAD.size


class Trained(NamedTuple):
    """What the engine's process made: the weights after its training, float32 as they are in memory, little-endian."""

    examples: int
    weights: bytes | memoryview


def handed(request: bytes, trained: Trained) -> bytes:
    """A request with what was trained for it."""
    return b"".join((_HEAD.pack(_MAGIC, len(request), trained.examples), request, trained.weights))


def taken(raw: memoryview) -> tuple[memoryview, Trained | None]:
    """The request, and what was trained for it, if anything."""
    if bytes(raw[: len(_MAGIC)]) != _MAGIC or len(raw) < _HEAD.size:
        return raw, None
    _, size, examples = _HEAD.unpack(raw[: _HEAD.size])
    end = _HEAD.size + size
    return raw[_HEAD.size : end], Trained(examples, raw[end:])


def wanted(answer: bytes) -> bytes | None:
    """The weights to train from, if the answer of the door asks for that."""
    head = bytes([OK]) + WANTED
    return answer[len(head) :] if answer.startswith(head) else None
