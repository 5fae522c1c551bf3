"""From vectors to integers and from their sum to the mean: what an exchange does between the parties and the server.

`WeightedCodec` averages by example counts or by parties, without noise of its own (record-level privacy has added its
noise inside the parties' training). `ClientCodec` clips each party's whole vector and averages with equal weights and
client-level noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from choral.errors import ConfigError
from choral.privacy import (
    ClientPrivacyEngine,
    ClientRound,
    FixedPoint,
    PrivacyEngine,
    Spent,
)
from choral.privacy.client_level.client import HOLDER
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SumResult, SumSession, SumSpec
from choral.protocols.masking.policy import Policy, check_policy
from choral.trainers.algorithms.interface import Channel, Mean
from choral.trainers.task import arguments


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """value_bound, value_bits: the fixed-point range and resolution of an update's coordinates. A party whose update
        is beyond the range drops out; it is never clipped or wrapped. With ``Plain`` and no transcript there is no
        bound: what is beyond is sent as it is. Not used with ``ClientPrivacy``.
    weights: "examples" counts each party by its records, as the algorithms are published; a party says how many it
        has. "equal" counts every party alike, for parties that are not trusted: none can weigh more by its word.
        Client-level privacy always does.
    policy: what the parties of this rehearsal accept, whatever ``secure_sum`` proposes: ``Policy(corrupt=..., ...)``,
        as a site has it, so that what would be refused there is refused here. Its directory is filled in, and its
        encoding too where it has none. By default the parties hold what is proposed against ``secure_sum``'s settings.

    Raises: ConfigError for a value of another type or out of range; SpecError for another policy.
    """

    value_bound: float = 16.0
    value_bits: int = 28
    weights: Literal["examples", "equal"] = "examples"
    policy: Policy | None = None

    def __post_init__(self) -> None:
        bound = arguments.number(self.value_bound, "value_bound", "the largest coordinate of an update, such as 16")
        bits = arguments.whole_number(self.value_bits, "value_bits", 2, "bits of a coordinate, such as 28")
        FixedPoint(bound=bound, value_bits=bits, max_weight=1)  # which refuses what is out of range
        object.__setattr__(self, "value_bound", bound)
        object.__setattr__(self, "value_bits", bits)
        arguments.one_of(self.weights, "weights", ("examples", "equal"))
        if self.policy is not None:
            check_policy(self.policy)


class Codec(Protocol):
    """One for a run and a channel; `begin` opens a sum, each present party encodes once, the server decodes once."""

    @property
    def spec(self) -> SumSpec: ...

    @property
    def fixed_point(self) -> dict[str, float | int]:
        """Of the encoding, for the run's record."""
        ...

    @property
    def clip(self) -> float | None:
        """The clipping norm of whole updates in the next round; None if they are not clipped."""
        ...

    @property
    def largest(self) -> float | None:
        """The largest absolute coordinate of the latest sum's vectors, where the server sees each of them anyway."""
        ...

    @property
    def more_bytes(self) -> int:
        """What the busiest party sent beside its integers."""
        ...

    def check(self, session: SumSession) -> None:
        """Raises: ConfigError if the secure sum may do what this codec's promise excludes."""
        ...

    def begin(self, present: tuple[str, ...]) -> None: ...

    def encode(self, party: str, update: torch.Tensor) -> Any: ...

    def stand_in(self, party: str) -> Any:
        """What is sent for a party whose training failed; None where it sends nothing, and so is seen to drop out."""
        ...

    def decode(self, result: SumResult) -> Mean: ...

    def spent(self) -> dict[str, Spent]:
        """What each data owner has spent."""
        ...


class WeightedCodec:
    """The weighted mean of one channel in fixed point; the weights' sum travels as one more coordinate.

    Whole numbers are encoded as they are, so their sum is exact. cap: a power of two above every example count. roster:
    who takes part in one sum; both by default of all whose ``examples`` are given. in_clear: the server sees each
    vector; then what a coordinate has beyond the bound is sent beside the integers, as floating-point numbers.
    """

    clip = None
    more_bytes = 0

    def __init__(
        self,
        examples: Mapping[str, int],
        channel: Channel,
        *,
        bound: float,
        value_bits: int,
        privacy_engines: Mapping[str, PrivacyEngine],
        cap: int | None = None,
        roster: tuple[str, ...] | None = None,
        in_clear: bool = False,
    ) -> None:
        self._in_clear = in_clear and channel.largest_count is None
        self._beyond: torch.Tensor | None = None  # of all who sent any, weighted
        self._largest = 0.0
        if channel.largest_count is not None:
            value_bits = max(channel.largest_count.bit_length(), 1) + 1
            bound = float((1 << (value_bits - 1)) - 1)  # so that the step is 1
        self._weights = examples if channel.weighing == "examples" else None
        self._roster = tuple(examples) if roster is None else roster
        # The cap is a public setup parameter, so it is a power of two rather than the largest party's exact count.
        cap = cap_of(max(examples.values())) if cap is None else cap
        most = cap if channel.weighing == "examples" else 1
        self._encoding = FixedPoint(bound=bound, value_bits=value_bits, max_weight=most)
        self._length, self._privacy_engines = channel.length, privacy_engines

    @property
    def spec(self) -> SumSpec:
        return SumSpec(
            parties=self._roster,
            length=self._length + 1,
            bound=self._encoding.integer_bound,
            encoding=repr(self._encoding),
        )

    @property
    def fixed_point(self) -> dict[str, float | int]:
        codec = self._encoding
        return {
            "bound": codec.bound,
            "value_bits": codec.value_bits,
            "max_weight": codec.max_weight,
            "error_bound": codec.error_bound,
        }

    def check(self, session: SumSession) -> None:
        """Any sum will do."""

    @property
    def largest(self) -> float | None:
        return self._largest if self._in_clear else None

    def begin(self, present: tuple[str, ...]) -> None:
        """Nothing is paid for here, whoever is present."""
        del present
        self._beyond, self._largest, self.more_bytes = None, 0.0, 0

    def encode(self, party: str, update: torch.Tensor) -> Any:
        weight = self._weights[party] if self._weights is not None else 1
        return self._encoding.encode(self._within(update, weight) if self._in_clear else update, weight)

    def _within(self, update: torch.Tensor, weight: int) -> torch.Tensor:
        """The update cut off at the bound; what is beyond it is kept for the mean."""
        largest = float(torch.linalg.vector_norm(update, torch.inf))
        if not math.isfinite(largest):
            return update  # which is refused
        self._largest = max(self._largest, largest)
        if largest <= self._encoding.bound:
            return update
        inside = update.double().clamp(-self._encoding.bound, self._encoding.bound)
        beyond = update.double() - inside
        self.more_bytes = max(self.more_bytes, 12 * int(beyond.count_nonzero()))  # a number and its place
        self._beyond = beyond * weight + (0.0 if self._beyond is None else self._beyond)
        return inside

    def stand_in(self, party: str) -> None:
        """It sends nothing."""

    def decode(self, result: SumResult) -> Mean:
        """Raises: EncodingError for a weight that so many survivors cannot have: some party made it up."""
        mean, weight = self._encoding.decode(result.total, len(result.survivors))
        return Mean(mean if self._beyond is None else mean + self._beyond.to(mean) / weight, weight)

    def spent(self) -> dict[str, Spent]:
        return {name: engine.spent() for name, engine in self._privacy_engines.items()}


class ClientCodec:
    """The mean of clipped updates, each party counted alike, with the noise of a :class:`ClientPrivacyEngine`."""

    largest = None
    more_bytes = 0

    def __init__(self, parties: tuple[str, ...], privacy_engine: ClientPrivacyEngine) -> None:
        self._parties, self._privacy_engine = parties, privacy_engine
        self._round: ClientRound | None = None

    @property
    def spec(self) -> SumSpec:
        scheme = self._privacy_engine.scheme
        return SumSpec(
            parties=self._parties,
            length=scheme.padded,
            bound=scheme.bound,
            bits=scheme.bits,
            encoding=self._privacy_engine.encoding,
        )

    @property
    def fixed_point(self) -> dict[str, float | int]:
        scheme = self._privacy_engine.scheme
        plain: dict[str, float | int] = {"coordinates": scheme.padded}
        return plain | {"value_bits": scheme.bits} if scheme.bits else plain

    @property
    def clip(self) -> float | None:
        return self._privacy_engine.clip

    def check(self, session: SumSession) -> None:
        """Noise that is shared out needs a sum that is not opened over fewer clients than it was sized for."""
        opens = session.statement.get("min_survivors")
        hides = session.statement.get("name") != "plain"  # with Plain the server sees single vectors anyway
        if (
            self._privacy_engine.privacy.noise == "distributed"
            and hides
            and (opens is None or opens < self._privacy_engine.min_survivors)
        ):
            raise ConfigError(
                f"the secure sum may open sums of {opens} clients, but the noise is sized for"
                f" {self._privacy_engine.min_survivors}",
                hint=f"give both min_survivors={self._privacy_engine.min_survivors}",
            )

    def begin(self, present: tuple[str, ...]) -> None:
        """Raises: TooFewSurvivorsError before anything is paid or sent; and as :meth:`ClientPrivacyEngine.begin`."""
        needed = self._privacy_engine.min_survivors
        if len(present) < needed:
            raise TooFewSurvivorsError(
                f"{len(present)} of {len(self._parties)} clients are left, expected at least {needed}",
                survivors=len(present),
                needed=needed,
                missing=tuple(name for name in self._parties if name not in present),
            )
        self._round = self._privacy_engine.begin()

    def encode(self, party: str, update: torch.Tensor) -> Any:
        del party
        return self._current.encode(update)

    def stand_in(self, party: str) -> Any:
        """A change of nothing, with its share of the noise: who failed is what the promise hides, too."""
        return self.encode(party, torch.zeros(self._privacy_engine.length))

    def decode(self, result: SumResult) -> Mean:
        survivors = len(result.survivors)
        return Mean(self._current.decode(result.total, survivors), survivors)

    def spent(self) -> dict[str, Spent]:
        return {HOLDER: self._privacy_engine.spent()}

    @property
    def _current(self) -> ClientRound:
        if self._round is None:
            raise ConfigError("no round was begun")
        return self._round


def cap_of(largest: int) -> int:
    """A power of two above the largest party's example count."""
    return 1 << largest.bit_length()
