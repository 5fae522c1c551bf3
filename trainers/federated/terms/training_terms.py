"""What a training is, as every party must hold it alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from choral.privacy import ClientPrivacyEngine, SharesPlan
from choral.trainers.algorithms.interface import Algorithm, FederationInfo
from choral.trainers.federated.codec import ClientCodec, Encoding, PartyCodec, WeightedCodec, own_codec
from choral.trainers.federated.record_shares.codec import SharesCodec
from choral.trainers.federated.terms.site_metrics import CHANNEL, metrics_codec

_PURPOSE = b"choral training terms 1"


@dataclass(frozen=True, kw_only=True)
class TrainingTerms:
    """What a training is, as every party must hold it alike; its digest is signed with the sum's session.

    federation, encoding: with the bounds and the cap of weights, which are agreed on, not read off anybody's counts.
    privacy: the promise asked, as a run's record has it. shapes: of the model's parameters. rounds: at most. code: what
    is run (:func:`~choral.trainers.federated.terms.task_code.code_of`). shares: the plan of noise in shares, where the
    promise is of it. metrics: of the parties' own evaluations, whose sums are released in the clear. clients: of a
    promise to clients, what keeps it on this side, with a ledger of its own; no part of what is agreed on.
    """

    algorithm: Algorithm
    federation: FederationInfo
    encoding: Encoding
    privacy: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    rounds: int
    code: str
    shares: SharesPlan | None = None
    metrics: tuple[str, ...] = ()
    clients: ClientPrivacyEngine | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """As JSON: what a party is asked to agree to. What it accepts of a sum (its policy) is its own matter."""
        encoding = self.encoding
        more: dict[str, Any] = {} if self.shares is None else {"shares": asdict(self.shares)}
        more |= {"metrics": list(self.metrics)} if self.metrics else {}
        return more | {
            "algorithm": self.algorithm.record(),
            "releases": [asdict(release) for release in self.algorithm.releases],
            "federation": asdict(self.federation),
            "encoding": {
                "value_bound": encoding.value_bound,
                "value_bits": encoding.value_bits,
                "weights": encoding.weights,
            },
            "privacy": dict(self.privacy) if self.privacy is not None else None,
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "rounds": self.rounds,
            "code": self.code,
        }

    def codec(self, channel: str, roster: tuple[str, ...] = ()) -> WeightedCodec | SharesCodec | ClientCodec:
        """Both halves of the mean of a channel, from what was agreed on alone. roster: of a sum."""
        if channel == CHANNEL:
            return metrics_codec(self.metrics, self.encoding, self.federation.largest, roster)
        if self.clients is not None:
            return ClientCodec(roster, self.clients)
        if self.shares is not None:
            return SharesCodec(roster, self.shares)
        made = self.algorithm.channels(self.federation)[channel]
        return WeightedCodec(made, self.encoding, cap=self.federation.largest, roster=roster)

    def party_codecs(self, examples: int, *, judged: int = 0) -> dict[str, PartyCodec]:
        """By channel, the half of a party in a process of its own, with so many records, and held-out ones to judge."""
        weight = {CHANNEL: judged}
        return {
            channel: self.codec(channel).party(weight.get(channel, examples))
            if self.clients is None or channel == CHANNEL
            else own_codec(self.clients)
            for channel in self.channels
        }

    def has(self, channel: str, exchange: int) -> bool:
        """Whether a round's exchange of this number, from 0, may be of that channel. They come in order of the
        algorithm, with those of once for all or without; then the sum of the parties' own evaluations.
        """
        if channel == CHANNEL:
            return bool(self.metrics) and 1 <= exchange <= len(self._orders[0])
        return any(order[exchange : exchange + 1] == (channel,) for order in self._orders)

    @cached_property
    def _orders(self) -> tuple[tuple[str, ...], ...]:
        """The channels of a round, exchange by exchange: with those that are once for the whole run, and without."""
        made = self.algorithm.channels(self.federation)
        rest = {name: each for name, each in made.items() if not each.once}
        return tuple(tuple(name for name, each in some.items() for _ in range(each.sums)) for some in (made, rest))

    @property
    def channels(self) -> tuple[str, ...]:
        """Of the algorithm, and of the parties' own evaluations if those are summed."""
        return (*self.algorithm.channels(self.federation), *([CHANNEL] if self.metrics else []))

    @cached_property
    def text(self) -> bytes:
        """The record as it is hashed: JSON, its keys in order."""
        return msgspec.json.encode(self.record(), order="deterministic")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of a word of what it is, and that text; 32 bytes."""
        return hashlib.sha256(_PURPOSE + self.text).digest()
