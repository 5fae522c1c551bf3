"""From vectors to integers and from their sum to the mean: what an exchange does between the parties and the server.

Each has two halves. `Codec` is the server's: what is summed, and what the sum decodes to. `PartyCodec` is one party's:
what the parties have agreed on, its own weight, its own noise, and nothing of any other party.

`WeightedCodec` averages by example counts or by parties, without noise of its own (record-level privacy has added its
noise inside the parties' training). `ClientCodec` clips each party's whole vector and averages with equal weights and
client-level noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch

from choral.errors import ConfigError
from choral.privacy import ClientPrivacyEngine, ClientRound, FixedPoint
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SumResult, SumSession, SumSpec
from choral.protocols.masking.policy import Policy, check_policy
from choral.trainers.algorithms.interface import Channel, ExchangeMean
from choral.trainers.task import arguments


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """value_bound, value_bits: the fixed-point range and resolution of an update's coordinates. A party whose update
        is beyond the range drops out; it is never clipped or wrapped. With ``Plain`` and no transcript there is no
        bound: what is beyond is sent as it is. Not used with ``ClientPrivacy``.
    weights: "examples" counts each party by its records, as the algorithms are published; a party says how many it
        has. "equal" counts every party alike, for parties that are not trusted: none can weigh more by its word.
        Client-level privacy always does. Refused where what is sent grows with the records: CoCoA+, FSVRG with its
        counts, noise in shares.
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


class Encoded(NamedTuple):
    """What a party sends. vector: int64. beyond: what the bound cut off, times the weight, where it is sent beside the
    integers. largest: absolute coordinate, where the server sees each vector anyway.
    """

    vector: Any
    beyond: torch.Tensor | None = None
    largest: float | None = None


class PartyCodec(Protocol):
    """One party's half, for one kind of vector."""

    def pay(self, exchange: Callable[[], bytes]) -> None:
        """Before anything is trained: what the exchange costs is written down, on disk, where that is its matter.

        exchange: gives the digest of what the party was told, which is hashed only where somebody asks for it.
        Raises: BudgetExceededError, LedgerError.
        """
        ...

    def encode(self, update: torch.Tensor) -> Encoded:
        """Raises: EncodingError for what does not fit what was agreed on; nothing is sent then."""
        ...

    def stand_in(self) -> Encoded | None:
        """What is sent where training failed; None where nothing is, and so the party is seen to drop out."""
        ...


class Codec(Protocol):
    """The server's half, one for a run and a channel; `begin` opens a sum, `decode` ends it."""

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

    def begin(self, present: tuple[str, ...], exchange: Callable[[], bytes]) -> None:
        """exchange: gives the digest of what every party was told."""
        ...

    def party(self, examples: int) -> PartyCodec:
        """The half of a party with so many records that this process plays, from what the parties agreed on."""
        ...

    def take(self, encoded: Encoded) -> None:
        """What a party sent beside its integers."""
        ...

    def decode(self, result: SumResult) -> ExchangeMean: ...


def fixed_point_of(channel: Channel, encoding: Encoding, cap: int) -> FixedPoint:
    """The encoding of one channel's vectors, from what all agree on. cap: no party weighs more."""
    bound, value_bits = encoding.value_bound, encoding.value_bits
    if channel.largest_count is not None:
        value_bits = max(channel.largest_count.bit_length(), 1) + 1
        bound = float((1 << (value_bits - 1)) - 1)  # so that the step is 1
    return FixedPoint(bound=bound, value_bits=value_bits, max_weight=cap if by_examples(channel, encoding) else 1)


def by_examples(channel: Channel, encoding: Encoding) -> bool:
    """Whether the mean's weights are example counts; else each party weighs 1."""
    return channel.weighing == "examples" and encoding.weights == "examples"


@dataclass(frozen=True, kw_only=True)
class WeightedPartyCodec:
    """A party's half of the weighted mean. weight: its own. in_clear: the server sees each vector; then what a
    coordinate has beyond the bound is sent beside the integers, as floating-point numbers.
    """

    encoding: FixedPoint
    weight: int
    in_clear: bool = False

    def pay(self, exchange: Callable[[], bytes]) -> None:
        """Without noise here there is nothing to pay for."""

    def encode(self, update: torch.Tensor) -> Encoded:
        if not self.in_clear:
            return Encoded(self.encoding.encode(update, self.weight))
        low, high = torch.aminmax(update)  # a sixteenth of the time that torch takes for the norm
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            return Encoded(self.encoding.encode(update, self.weight))  # which refuses what is not finite
        if largest <= self.encoding.bound:
            return Encoded(self.encoding.encode(update, self.weight), None, largest)
        inside = update.double().clamp(-self.encoding.bound, self.encoding.bound)
        beyond = update.double() - inside
        return Encoded(self.encoding.encode(inside, self.weight), beyond * self.weight, largest)

    def stand_in(self) -> None:
        """It sends nothing."""


class WeightedCodec:
    """The weighted mean of one channel in fixed point; the weights' sum travels as one more coordinate.

    Whole numbers are encoded as they are, so their sum is exact. cap: a power of two above every example count, which
    no party's weight may pass. roster: who takes part in one sum. in_clear: as the parties' half has it.
    """

    clip = None
    more_bytes = 0

    def __init__(
        self, channel: Channel, encoding: Encoding, *, cap: int, roster: tuple[str, ...], in_clear: bool = False
    ) -> None:
        self._in_clear = in_clear and channel.largest_count is None
        self._beyond: torch.Tensor | None = None  # of all who sent any, weighted
        self._largest = 0.0
        self._by_examples = by_examples(channel, encoding)
        self._roster, self._length = roster, channel.length
        self._encoding = fixed_point_of(channel, encoding, cap)

    @property
    def spec(self) -> SumSpec:
        return SumSpec(
            parties=self._roster,
            length=self._length + 1,
            bound=self._encoding.integer_bound,
            encoding=repr(self._encoding),
            weight_bound=self._encoding.max_weight,
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

    def begin(self, present: tuple[str, ...], exchange: Callable[[], bytes]) -> None:
        """Nothing is paid for here, whoever is present."""
        del present, exchange
        self._beyond, self._largest, self.more_bytes = None, 0.0, 0

    def party(self, examples: int) -> WeightedPartyCodec:
        weight = examples if self._by_examples else 1
        return WeightedPartyCodec(encoding=self._encoding, weight=weight, in_clear=self._in_clear)

    def take(self, encoded: Encoded) -> None:
        if encoded.largest is not None:
            self._largest = max(self._largest, encoded.largest)
        if (beyond := encoded.beyond) is not None:
            self.more_bytes = max(self.more_bytes, 12 * int(beyond.count_nonzero()))  # a number and its place
            self._beyond = beyond + (0.0 if self._beyond is None else self._beyond)

    def decode(self, result: SumResult) -> ExchangeMean:
        """Raises: EncodingError for a weight that so many survivors cannot have: some party made it up."""
        mean, weight = self._encoding.decode(result.total, len(result.survivors))
        return ExchangeMean(mean if self._beyond is None else mean + self._beyond.to(mean) / weight, weight)


class ClientPartyCodec:
    """A party's half of a sum with client-level privacy: it clips, and adds its own noise.

    begin: pays for the sum of the exchange with that digest, and says what all its clients are told. Where one process
    plays all clients, that was done for all of them when the sum was begun.
    """

    def __init__(self, begin: Callable[[bytes], ClientRound], length: int) -> None:
        self._begin, self._length = begin, length
        self._round: ClientRound | None = None

    def pay(self, exchange: Callable[[], bytes]) -> None:
        self._round = self._begin(exchange())

    def encode(self, update: torch.Tensor) -> Encoded:
        """Raises: ConfigError where nothing was paid for: each payment is for one vector."""
        vector = begun(self._round).encode(update)
        self._round = None
        return Encoded(vector)

    def stand_in(self) -> Encoded:
        """A change of nothing, with its share of the noise: who failed is what the promise hides, too."""
        return self.encode(torch.zeros(self._length))


def own_codec(privacy_engine: ClientPrivacyEngine) -> ClientPartyCodec:
    """The half of a party in a process of its own, whose ledger its engine has.

    The rotation is of the exchange's digest, so that all parties have one without being told another number; it is
    public, and the promise holds whatever it is.
    """
    return ClientPartyCodec(lambda exchange: privacy_engine.begin(rotation_seed(exchange)), privacy_engine.length)


def rotation_seed(exchange: bytes) -> bytes:
    """Of one sum's rotation; SEED_BYTES. exchange: the digest of what every party was told."""
    return hashlib.sha256(b"choral rotation 1" + exchange).digest()


def begun(found: ClientRound | None) -> ClientRound:
    """Raises: ConfigError."""
    if found is None:
        raise ConfigError("no round was begun")
    return found


class ClientCodec:
    """The mean of clipped updates, each party counted alike, with the noise of a :class:`ClientPrivacyEngine`."""

    largest = None
    more_bytes = 0

    def __init__(self, parties: tuple[str, ...], privacy_engine: ClientPrivacyEngine) -> None:
        self._parties, self._privacy_engine = parties, privacy_engine
        self._round: ClientRound | None = None
        self._sure: int | None = None  # survivors, of sums in which nobody confirms them

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
        """Noise that is shared out needs a sum that is not opened over fewer clients than it was sized for.

        It must withstand as many colluders, who know their own shares. In two trips nobody confirms who is in a sum: it
        is paid for as one over the fewest that it may hold, however many are said to have survived.
        """
        stated, engine = session.statement, self._privacy_engine
        # with Plain the server sees single vectors anyway
        if engine.privacy.noise != "distributed" or stated.get("name") == "plain":
            return
        opens, corrupt = stated.get("min_survivors"), stated.get("corrupt", 0)
        if opens is None or opens < engine.min_survivors:
            raise ConfigError(
                f"the secure sum may open sums of {opens} clients, but the noise is sized for {engine.min_survivors}",
                hint=f"give both min_survivors={engine.min_survivors}",
            )
        if corrupt < (colluders := engine.privacy.colluders):
            raise ConfigError(
                f"the secure sum withstands {corrupt} corrupt clients, but the noise {colluders} colluders, who know"
                " their shares",
                hint=f"give the secure sum corrupt={colluders}, or ClientPrivacy(colluders={corrupt})",
            )
        if stated.get("trips") == 2:
            self._sure = opens if self._sure is None else min(self._sure, opens)

    def begin(self, present: tuple[str, ...], exchange: Callable[[], bytes]) -> None:
        """Raises: TooFewSurvivorsError before anything is paid or sent; and as :meth:`ClientPrivacyEngine.begin`."""
        needed = self._privacy_engine.min_survivors
        if len(present) < needed:
            raise TooFewSurvivorsError(
                f"{len(present)} of {len(self._parties)} clients are left, expected at least {needed}",
                survivors=len(present),
                needed=needed,
                missing=tuple(name for name in self._parties if name not in present),
            )
        self._round = self._privacy_engine.begin(rotation_seed(exchange()))

    def party(self, examples: int) -> ClientPartyCodec:
        del examples  # all weigh alike
        return ClientPartyCodec(lambda _: begun(self._round), self._privacy_engine.length)

    def take(self, encoded: Encoded) -> None:
        """There is nothing beside the integers."""

    def decode(self, result: SumResult) -> ExchangeMean:
        survivors = len(result.survivors)
        mean = begun(self._round).decode(result.total, survivors, self._sure)
        return ExchangeMean(mean, self._privacy_engine.divisor(survivors))


def cap_of(largest: int) -> int:
    """A power of two above the largest party's example count."""
    return 1 << largest.bit_length()
