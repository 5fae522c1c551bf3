"""What the server tells a party of one exchange, as bytes, and the digest by which all parties see that it is the same.

The weights and the exchange's tensors travel as safetensors, the rest as JSON in their head; tensors that a party has
from an earlier round (:attr:`Exchange.kept`) are named and do not travel. The digest is of what the party computes
from, wherever it has it from: the number of the round, the channel, and each tensor's name, type, shape and values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError

from choral.protocols.driver import RoundTerms
from choral.protocols.errors import MessageError
from choral.trainers.algorithms.interface import Exchange
from choral.trainers.engines.rank_messages import packed, unpacked

_PURPOSE = b"choral exchange 1"
_MOST_TENSORS = 8  # of the size of the weights, at 8 bytes a number; no algorithm tells half as many
_HEAD = 1 << 16
_WEIGHTS, _NEW = "weights", "new "


class NotToldError(MessageError):
    """An exchange goes on from tensors that this party was never told."""


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: Annotated[int, Meta(ge=1, lt=1 << 32)]
    exchange: Annotated[int, Meta(ge=0, lt=1 << 32)]
    channel: Annotated[str, Meta(max_length=64)]
    kept: Annotated[tuple[str, ...], Meta(max_length=_MOST_TENSORS)]


@dataclass(frozen=True)
class Told:
    """One exchange as it was told. number: of the round. exchange: which sum of the round, from 0."""

    number: int
    exchange: int
    ask: Exchange

    @classmethod
    def of(cls, ask: Exchange, number: int, exchange: int) -> Told:
        return cls(number, exchange, ask)

    @cached_property
    def digest(self) -> bytes:
        """Of what a party computes from. Hashed once, when it is first asked for: not in a sum where nobody signs it.

        Whoever signs or keeps it asks before anybody trains.
        """
        return digest_of(self.ask, self.number)

    @property
    def bytes_down(self) -> int:
        """What each party must be told: the exchange's tensors, and the model where this is the first, or it moved."""
        told = [*self.ask.new.values(), *([self.ask.weights] if not self.exchange or self.ask.moved else [])]
        return 4 * sum(tensor.numel() for tensor in told)

    def terms(self, training: bytes) -> RoundTerms:
        """What the parties sign before they train. training: the digest of the training terms."""
        return RoundTerms(self.exchange, self.digest, training)

    def message(self, *, whole: bool = False) -> bytes:
        """whole: with the tensors that parties have from earlier, for one that has them no longer."""
        kept = {} if whole else self.ask.kept
        new = {**self.ask.kept, **self.ask.new} if whole else self.ask.new
        head = _Head(self.number, self.exchange, self.ask.channel, tuple(kept))
        tensors = {_WEIGHTS: self.ask.weights} | {_NEW + name: tensor for name, tensor in new.items()}
        raw: bytes = packed(msgspec.to_builtins(head), tensors).numpy().tobytes()
        return raw

    @classmethod
    def read(cls, raw: bytes, *, length: int, kept: Mapping[str, torch.Tensor]) -> Told:
        """What a party was told. length: of the weights. kept: the tensors that it was told before.

        Raises: MessageError for anything else than an exchange over such weights; NotToldError if one of `kept` is
            missing, as after a restart.
        """
        if len(raw) > (most := largest_told(length)):
            raise _refused(f"expected at most {most} bytes, got {len(raw)}")
        try:
            said, tensors = unpacked(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
            head = msgspec.convert(said, _Head)
        except (msgspec.MsgspecError, SafetensorError, LookupError, TypeError, ValueError):
            raise _refused("these bytes are no exchange") from None
        weights = tensors.get(_WEIGHTS)
        if weights is None or weights.dtype != torch.float32 or tuple(weights.shape) != (length,):
            raise _refused(f"expected weights of type float32 and shape ({length},)")
        if strange := [name for name in tensors if name != _WEIGHTS and not name.startswith(_NEW)]:
            raise _refused(f"it holds a tensor {strange[0]!r:.80} that is no part of an exchange")
        if missing := [name for name in head.kept if name not in kept]:
            raise NotToldError("the server", f"it goes on from {missing[0]!r:.80}, which this party was never told")
        ask = Exchange(
            channel=head.channel,
            weights=weights,
            new={name.removeprefix(_NEW): tensor for name, tensor in tensors.items() if name != _WEIGHTS},
            kept={name: kept[name] for name in head.kept},
        )
        return cls.of(ask, head.number, head.exchange)


def largest_told(length: int) -> int:
    """Bytes of a message over so many weights, at most."""
    return 8 * _MOST_TENSORS * (length + 1) + _HEAD


def digest_of(ask: Exchange, number: int) -> bytes:
    """SHA-256 of what a party computes from; 32 bytes."""
    digest = hashlib.sha256(_PURPOSE)
    _add(digest, msgspec.json.encode([number, ask.channel]))
    for name, tensor in [(_WEIGHTS, ask.weights), *sorted({**ask.kept, **ask.new}.items())]:
        plain = tensor.detach().cpu().contiguous()
        values: Any = plain.reshape(-1).view(torch.uint8).numpy()
        _add(digest, msgspec.json.encode([name, str(plain.dtype), list(plain.shape)]))
        _add(digest, memoryview(values))
    return digest.digest()


def _add(digest: Any, part: bytes | memoryview) -> None:
    """With its length in front, so that no two lists of parts are the same bytes."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _refused(what: str) -> MessageError:
    return MessageError("the server", what)
