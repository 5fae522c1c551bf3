"""Flower as a carrier of a coordinator's requests: each goes to a node as a message, whose reply is looked for.

A node's name in Flower says where to send and no more: what is sent is signed for one site, and what a site answers is
signed where it matters. So a node under a wrong name can keep a site out of a round, and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from choral.network.door.client import OK
from choral.network.errors import PeerFailedError, PeerLostError, TransportError
from choral.network.flower.mod import RECORD, bytes_in, packed

log = logging.getLogger("choral.network")

_FIRST, _LONGEST = 0.1, 0.5  # seconds between two looks for replies
_TRIES = 3
_TTL = 60.0  # seconds that a message may be late before Flower drops it
_WHO = 120.0
_NODE_UNAVAILABLE = 5  # flwr.common.constant.ErrorCode
_REFUSED = 6  # MOD_FAILED_PRECONDITION: the same again would be, too


class FlowerGrid:
    """See the module, and `EngineAdapter`. names: of the sites, as they are registered with the SuperLink.

    more: other records of every message of an exchange that asks for a vector, set while it is under way.
    """

    more: Mapping[str, Any] = {}

    def __init__(self, grid: Any, names: Sequence[str]) -> None:
        self._grid, self._names = grid, tuple(names)
        self._numbered: dict[int, str] = {}  # of nodes without a name, in a simulation

    def carry(
        self, outbox: Mapping[str, bytes], *, seconds: float, reply_limit: int
    ) -> Iterator[tuple[str, bytes | TransportError]]:
        del reply_limit  # what is larger is refused by who asked
        nodes = self._nodes()
        for name in outbox:
            if name not in nodes:
                yield name, PeerLostError("no node of that name is connected to the SuperLink", peer=name)
        asked = {name: raw for name, raw in outbox.items() if name in nodes}
        for name, reply in self._exchange(nodes, asked, seconds):
            yield name, _answered(name, reply)

    def alive(self, names: frozenset[str]) -> frozenset[str]:
        return names & set(self._nodes())

    def _exchange(
        self, nodes: Mapping[Any, int], asked: Mapping[Any, bytes], seconds: float
    ) -> Iterator[tuple[Any, Any]]:
        """Each message's reply as it comes, within seconds of its being sent. A crashed ClientApp is asked again: a
        site answers a repetition alike.
        """
        waiting, tries = self._push(nodes, asked, seconds), dict.fromkeys(asked, 1)
        end, pause = time.monotonic() + seconds, _FIRST
        while waiting and time.monotonic() < end:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                name = waiting.pop(reply.metadata.reply_to_message_id, None)
                if name is None:
                    continue
                left = end - time.monotonic()
                if _again(reply) and tries[name] < _TRIES and left > 0:
                    tries[name] += 1
                    log.info("asking %s again: Flower says error %s", name, reply.error.code)
                    waiting |= self._push(nodes, {name: asked[name]}, left)
                else:
                    yield name, reply
            pause = _FIRST if replies else min(_LONGEST, pause * 1.2)
            if waiting:
                time.sleep(pause)

    def _push(self, nodes: Mapping[Any, int], asked: Mapping[Any, bytes], seconds: float) -> dict[str, Any]:
        """Whom each message that was sent is to, by its number."""
        from flwr.app import Message

        messages = [
            Message(packed(raw, self.more), dst_node_id=nodes[name], message_type="train", ttl=seconds + _TTL)
            for name, raw in asked.items()
        ]
        sent = list(self._grid.push_messages(messages)) if messages else []
        return {number: name for number, name in zip(sent, asked, strict=True) if number} if sent else {}

    def _nodes(self) -> dict[str, int]:
        """Who is connected, by name; nodes without one are asked which part of a simulation they are."""
        there = {int(node.node_id): str(node.name) for node in self._grid.get_nodes()}
        strange = {number: number for number, name in there.items() if not name and number not in self._numbered}
        if strange:
            for number, reply in self._exchange(strange, dict.fromkeys(strange, b""), _WHO):
                self._numbered[number] = self._name(_answered(str(number), reply))
        known = {number: name or self._numbered.get(number, "") for number, name in there.items()}
        return {name: number for number, name in known.items() if name in self._names}

    def _name(self, said: bytes | TransportError) -> str:
        """That of the site whose turn it is in the directory."""
        number = (
            bytes(said[1:]).decode("ascii", "replace") if isinstance(said, bytes) and said[:1] == bytes([OK]) else ""
        )
        return self._names[int(number)] if number.isdigit() and int(number) < len(self._names) else ""


def _again(reply: Any) -> bool:
    return reply.has_error() and reply.error.code not in (_NODE_UNAVAILABLE, _REFUSED)


def _answered(name: str, reply: Any) -> bytes | TransportError:
    """The reason of an error is not repeated: it may hold words of a ClientApp that saw data."""
    if reply.has_error():
        kind: Callable[..., TransportError] = (
            PeerLostError if reply.error.code == _NODE_UNAVAILABLE else PeerFailedError
        )
        return kind(f"Flower says error {reply.error.code}", peer=name)
    try:
        return bytes_in(reply.content)
    except (KeyError, TypeError, AttributeError):
        return PeerFailedError(f"what came back has no {RECORD!r} in it: is secure_sum_mod in its mods?", peer=name)
