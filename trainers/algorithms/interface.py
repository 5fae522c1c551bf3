"""The interface between a federated algorithm, the secure sum, and whoever computes at the parties.

An algorithm is a frozen configuration with three short methods. For each round `round` is a generator at the server:
it yields an :class:`Exchange` for every secure sum that it wants, is sent the :class:`ExchangeMean` of what the parties
answered, and returns the next weights. At a party, `work` says what to compute (data, one of the classes of
:data:`Work`) and `answer` what is sent of the result, one flat vector:

    server:  exchange = yield Exchange(channel="update", weights=w)      broadcast
    party:   work(party, exchange)           -> Train(pull=mu)             what the trainer is to do
    trainer: do([(name, work), ...])         -> Done(vector=w_k - w)     the whole cohort at once, or one by one
    party:   answer(party, exchange, done)   -> vector, shape (length,)  into the secure sum
    server:  mean = (yield ...)              -> ExchangeMean(value, weight)

So an algorithm knows nothing of models, an engine nothing of algorithms, and neither of protocols. The objective is
f(w) = sum_k (n_k / n) F_k(w), F_k the mean loss of party k's n_k records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch

from choral.errors import ConfigError
from choral.trainers.task import arguments

Source = Literal["fit", "derived", "data"]


@dataclass(frozen=True, kw_only=True)
class Release:
    """One thing that becomes known with every round: to the server, and (as far as the next model shows it) to all.

    channel: of the exchange that carries it. what: the value, per party, that is summed.
    source: "fit": made by the party's own training loop, whose steps record-level privacy makes noisy and charges.
        "derived": a function of other releases, of public values and of the party's earlier ones: costs nothing more.
        "data": read from the records outside that loop, so record-level privacy does not cover it.
    once: for the whole run, rather than in every round.
    """

    channel: str
    what: str
    source: Source
    once: bool = False


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What the vectors of one kind of exchange are; agreed on before the first round.

    length: coordinates. weighing: the mean's weights, the parties' example counts or 1 each.
    largest_count: None for real numbers within the run's value_bound; else whole numbers from 0 to this, whose sum is
        exact.
    once: not part of every round. sums: exchanges of this kind in a round.
    """

    length: int
    weighing: Literal["examples", "parties"] = "examples"
    largest_count: int | None = None
    once: bool = False
    sums: int = 1


@dataclass(frozen=True, kw_only=True)
class FederationInfo:
    """What all know of a federation before its first round.

    parties: how many there are. length: coordinates d of the weights. examples: of all parties together.
    largest: a power of two above the largest party's example count. value_bound: of real coordinates that are sent.
    weight: of all parties together in a mean by examples; the number of parties where every party counts alike.
    """

    parties: int
    length: int
    examples: int
    largest: int
    value_bound: float
    weight: int


class ExchangeMean(NamedTuple):
    """What the server learns from one exchange: the weighted mean, float64, shape (length,), and the total weight."""

    value: torch.Tensor
    weight: float


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One secure sum: what the parties are told, and on which channel they answer.

    weights: the global weights, shape (d,), told once in a round, and again where they `moved` since. new: other
        tensors that are sent with it.
    kept: tensors that the parties have from an earlier round, so that they cost no bytes now.
    """

    channel: str
    weights: torch.Tensor
    new: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moved: bool = False

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.new[name] if name in self.new else self.kept[name]


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server's view of one round. state: its own tensors, kept from round to round and in the run's folder.

    pace: what the task's schedule multiplies learning rates by in this round.
    """

    federation: FederationInfo
    number: int
    state: MutableMapping[str, torch.Tensor]
    pace: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Party:
    """One party's view of one exchange. state: its own tensors; what `answer` puts there counts if it survives."""

    name: str
    examples: int
    federation: FederationInfo
    number: int
    state: MutableMapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Train:
    """The user's own loop from the weights w_t; each step's gradient g becomes g + shift + pull (w - w_t).

    counts: the algorithm reads something off the number of steps, so that nothing else may move the weights.
    """

    shift: torch.Tensor | None = None
    pull: float = 0.0
    counts: bool = False

    @property
    def corrects(self) -> bool:
        return self.shift is not None or self.pull != 0.0


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The gradient of F_k at the exchange's weights.

    Where the party adds noise in shares: the vector of its next step, int64, of all of its records.
    """


@dataclass(frozen=True, kw_only=True)
class Svrg:
    """Passes over the records in random order, w <- w - step (S (g_i(w) - g_i(w_t)) + direction + pull (w - w_t)).

    g_i: gradient of record i's loss. shares: phi^j, the share of all records that touch coordinate j, shape (d,); then
    S = diag(phi^j / phi_k^j), phi_k^j the same share at this party, and 1 where it is 0. None: S is the identity.
    """

    direction: torch.Tensor
    step: float
    shares: torch.Tensor | None = None
    pull: float = 0.0
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Minimise:
    """What passes of Svrg with the same arguments lead to: the w, to float precision, at which
    grad F_k(w) - grad F_k(w_t) + direction + pull (w - w_t) = 0. For convex F_k only.
    """

    direction: torch.Tensor
    pull: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Touch:
    """How many of the party's records touch each coordinate: n_k^j, whole numbers, shape (d,). Linear models only."""


@dataclass(frozen=True, kw_only=True)
class Ascend:
    """Passes of dual coordinate ascent on the party's block, for ridge-regularised binary logistic regression.

    dual: the block, shape (n_k,). ridge: lambda. examples: n. slack: sigma', how much the blocks are over-counted.
    """

    dual: torch.Tensor
    ridge: float
    examples: int
    slack: float
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The gradients at the exchange's weights of a Poisson batch, each record drawn with probability `rate`.

    Their sum over `rate` n_k; or, where the party adds noise in shares, the vector of its next step, int64: there the
    draw is the operating system's, and `rate` and `step` are not used. step: of the round, so that each draws anew.
    row: of all steps of the run, alike at all parties of a sum, which sign the exchange that it follows from.
    """

    rate: float
    step: int
    row: int


Work = Train | Gradient | Batch | Svrg | Minimise | Touch | Ascend


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a trainer made of one work.

    vector: shape (d,): Train, Svrg, Minimise: w_k - w_t. Gradient, Batch: the gradient. Touch: the counts. Ascend: the
        change of the primal weights that the block's change brings.
    steps: of the user's optimizer (Train). path: the sum of their learning rates if it is plain SGD with one rate, so
        that w_t - w_k is path times a mean of gradients; else None. dual: the block after Ascend, shape (n_k,).
    """

    vector: torch.Tensor
    steps: int = 0
    path: float | None = None
    dual: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """What a trainer could not make of one work: the party drops out of the round. error: why, for the user alone."""

    error: Exception


class LocalTrainer(Protocol):
    """Who computes at the parties: one model for all in turn, a whole cohort at once, or a closed form."""

    @property
    def length(self) -> int:
        """Coordinates d of the flat weights."""
        ...

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        """Yield (party, what was made of its work), in the order of `orders`; all are of one kind of work.

        weights: float32, shape (d,). `orders` may be read ahead as far as an engine likes; each result is used before
        the next is asked for, so memory need not grow with the cohort.
        A party whose work cannot be done is yielded as `Failed`, and the next one is begun: with DivergedError, naming
        the party, for results that are not finite; with TaskError for work that this trainer or this model cannot do.
        Raises: what ends the run for all, such as a ledger that cannot be trusted.
        """
        ...


Rounds = Generator[Exchange, ExchangeMean, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What server and parties do with updates. Subclasses are frozen dataclasses of hyper-parameters.

    kind: the name in settings and in run.json. needs_loss: uses the gradients of single records or of all, so the
    task must have a `loss`. in_shares: all that is released is sums of single records' gradients at weights that were
    told, one step at a time, so that noise may be added in shares. paced: the server's learning rate follows the task's
    schedule. remembers: server or parties keep tensors between rounds. keeps: parties do.
    """

    kind: ClassVar[str]
    needs_loss: ClassVar[bool] = False
    in_shares: ClassVar[bool] = False
    paced: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    client_hint: ClassVar[str] = "use FedAvg, FedProx, FedAdam or FedYogi"

    @property
    def releases(self) -> tuple[Release, ...]:
        """Everything that the exchanges of a round tell, for the ledger."""
        raise NotImplementedError

    @property
    def by_records(self) -> bool:
        """Whether what a party sends tells of its number of records, so that no weights of the mean make all alike."""
        return False

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        """The kinds of exchange, in the order of a round."""
        return {"update": Channel(length=federation.length)}

    def share_steps(self, examples: int) -> tuple[int, int]:
        """Where noise may be added in shares: B, the records that a step draws on average of so many of all parties
        together, and how many steps a round has. Raises: ConfigError for a B that does not fit.
        """
        raise NotImplementedError

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        """The server's part. weights: float32, shape (d,); so is what it returns."""
        raise NotImplementedError

    def work(self, party: Party, ask: Exchange) -> Work:
        """The party's part: what its trainer is to compute."""
        return Train()

    def answer(self, party: Party, ask: Exchange, done: Done) -> torch.Tensor:
        """What it sends of it, shape (length of the channel,)."""
        return done.vector

    def record(self) -> dict[str, Any]:
        """Kind and hyper-parameters, for run.json."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


def updated(weights: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """weights + change, in the type and on the device of the weights."""
    return weights + change.to(weights.dtype).to(weights.device)


def check_positive(algorithm: Algorithm, *names: str) -> None:
    """Raises: ConfigError unless all hyper-parameters are numbers, as declared, and these are finite and above 0."""
    arguments.own_numbers(algorithm, type(algorithm).__name__)
    for name in names:
        if not 0 < getattr(algorithm, name) < float("inf"):
            raise ConfigError(
                f"{algorithm.kind}: {name} is {getattr(algorithm, name)}, expected a finite number > 0",
                hint="see docs/algorithms.md for what each is",
            )


def check_not_negative(algorithm: Algorithm, *names: str) -> None:
    """Raises: as :func:`check_positive`, of these unless they are finite and at least 0."""
    arguments.own_numbers(algorithm, type(algorithm).__name__)
    for name in names:
        if not 0 <= getattr(algorithm, name) < float("inf"):
            raise ConfigError(
                f"{algorithm.kind}: {name} is {getattr(algorithm, name)}, expected a finite number >= 0",
                hint="see docs/algorithms.md for what each is",
            )


def check_below_one(algorithm: Algorithm, *names: str) -> None:
    """Raises: as :func:`check_positive`, of these, such as the decay of a moment, unless they are in [0, 1)."""
    arguments.own_numbers(algorithm, type(algorithm).__name__)
    for name in names:
        if not 0 <= getattr(algorithm, name) < 1:
            raise ConfigError(f"{algorithm.kind}: {name} is {getattr(algorithm, name)}, expected 0 <= {name} < 1")
