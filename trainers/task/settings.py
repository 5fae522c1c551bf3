"""Settings of a job that its task needs: how the data is split, how a party trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from choral.errors import ConfigError
from choral.trainers.task import arguments
from choral.trainers.task.learning_rate import Schedule


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the data is divided among the parties."""

    kind: Literal["dirichlet", "key", "shards", "iid"] = "dirichlet"
    """By label: dirichlet, or shards (two each, of a few labels); key: the data's own (page, ...); iid: at random."""
    parties: int = 10
    """Number of parties; with a key the data says how many."""
    alpha: float = 0.5
    """Dirichlet concentration of the labels: small is very unequal, large is alike."""
    test_fraction: float = 0.2
    """Share of the records held out for the evaluation."""
    min_records: int = 10
    """Fewest records of a party; a Dirichlet draw is repeated until it holds, parties by key are left out."""
    min_classes: int = 2
    """Fewest classes that a party may have; 1 allows parties of a single class."""
    reshuffle: bool = False
    """Deal the records out again at random, to each party as many as it has: unequal, but IID."""

    def __post_init__(self) -> None:
        arguments.one_of(self.kind, "split.kind", ("dirichlet", "key", "shards", "iid"))
        arguments.own_numbers(self, "Split")
        arguments.flag(self.reshuffle, "split.reshuffle")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"expected 0 < split.test_fraction < 1, got {self.test_fraction:g}", hint="e.g. 0.2")
        if self.parties < 1:
            raise ConfigError(f"expected split.parties >= 1, got {self.parties}", hint="at least 2 to federate")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model is trained, at each party and in the cloud."""

    rounds: int = 20
    """Training rounds; the cloud makes as many passes over the data."""
    local_epochs: int = 1
    """Passes over a party's data in one round."""
    batch_size: int = 16
    """Records per step; with differential privacy the expected number."""
    learning_rate: float = 0.5
    """Step size of SGD."""
    weight_decay: float = 0.0
    """lambda of the term lambda/2 |w|^2: SGD's weight decay, and the algorithm's ridge where that is not set."""
    hidden: int = 32
    """Width of the hidden layer; 0 trains a linear model."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the model while it trains; bf16 by torch.autocast, weights and updates stay float32."""
    compile: bool = False
    """Compile the model (torch.compile); not for private arms."""
    schedule: Schedule = field(default_factory=Schedule)
    start: Path | None = None
    """Weights to start from (.safetensors), of the same model; by default the seed makes them."""

    def __post_init__(self) -> None:
        arguments.own_numbers(self, "Training")
        arguments.flag(self.compile, "training.compile")
        arguments.instance(self.schedule, "training.schedule", Schedule, "Schedule(kind=...)")
        for name in ("rounds", "local_epochs", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"expected training.{name} >= 1, got {value}", hint="whole numbers from 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"expected training.learning_rate > 0, got {self.learning_rate:g}", hint="e.g. 0.1")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"expected training.weight_decay >= 0, got {self.weight_decay:g}", hint="0 leaves it out")
        if self.hidden < 0:
            raise ConfigError(f"expected training.hidden >= 0, got {self.hidden}", hint="0 is a linear model")


LabelKind = Literal["class", "number", "count"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Your own table in the place of a task: a CSV or Parquet file with a record a row. `choral init` writes this part.

    What is said of columns here must be known without looking at the records, as a codebook says it: what is read off
    the records is a release of its own, which no epsilon below would count.
    """

    path: Path | None = None
    """CSV file with a header, in UTF-8, or Parquet file (.parquet)."""
    key: str | tuple[str, ...] = ()
    """Column, or columns, that say whose a row is: each value is a party. Without it, split deals the rows out."""
    label: str = ""
    """Column that is to be predicted."""
    kind: LabelKind = "class"
    """What the label is: one of a few classes, a number (squared error), or a count of events (Poisson)."""
    classes: tuple[str, ...] = ()
    """Classes of the label, as the file writes them; without them the label must be 0, 1, 2, ..."""
    features: tuple[str, ...] = ()
    """Columns to learn from; by default all but key and label."""
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns of words, each with all its words; a last word "*" stands for any other."""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest value of a column of numbers: it is scaled to -1 ... 1, and what is beyond is cut off."""
    bounds_from: Literal["public", "records"] = "public"
    """Where bounds, categories and classes come from. With "records" nothing is trained with differential privacy."""
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns of numbers that may lack a value, each with the words for it, such as "" or "NA"; one more feature says
    that it lacks. A value that lacks in another column is an error, which names its line."""
    delimiter: str = ","
    """Between the fields of a CSV file."""
    standardise: Literal["none", "private"] = "none"
    """private: centre and scale the features that have bounds by means and deviations of all parties' records, computed
    once in a secure sum; a private configuration pays for them. Of a task of your own, Task(bounds=...) has the bounds.
    """
    standardise_share: float = 0.2
    """The share of privacy.epsilon that those means and deviations may spend. The training has the rest."""

    def __post_init__(self) -> None:
        if not 0 < self.standardise_share < 1:
            raise ConfigError(
                f"expected data.standardise_share between 0 and 1, got {self.standardise_share:g}", hint="0.2 is usual"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,) if isinstance(self.key, str) else tuple(self.key)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model of a table of your own; its hidden layer is training.hidden wide. Other tasks bring their own."""

    kind: Literal["linear", "mlp", "table"] | None = None
    """linear; mlp: one hidden layer; table: that, with a learnt vector for each word of a category. By default linear
    where training.hidden is 0, else mlp."""
    embedding: int = 8
    """Of table: the most numbers that a word becomes."""

    def __post_init__(self) -> None:
        if self.embedding < 1:
            raise ConfigError(f"expected model.embedding >= 1, got {self.embedding}", hint="8 is usual")


Kind = Literal[
    "fedavg", "fedprox", "scaffold", "fedadam", "fedyogi", "fednova", "fedsgd", "fsvrg", "dane", "gd", "cocoa"
]


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """The federated algorithm. What is not set is the algorithm's own default; what it does not have is refused."""

    kind: Kind | None = None
    """Algorithm of federated training; fedavg if nothing else is said. See docs/algorithms.md."""
    mu: float | None = None
    """fedprox, dane: weight of the proximal term."""
    server_rate: float | None = None
    """scaffold, fedadam, fedyogi: step size of the server."""
    batch_size: int | None = None
    """fedsgd: records that a step draws on average, at all parties together."""
    steps_per_round: int | None = None
    """fedsgd: secure sums in a round, each with a step of the server."""
    learning_rate: float | None = None
    """fedsgd: step size of the server."""
    optimizer: Literal["sgd", "adam"] | None = None
    """fedsgd: what the server steps with."""
    momentum: float | None = None
    """fedsgd: of the server's sgd."""
    beta1: float | None = None
    """fedadam, fedyogi, fedsgd: decay of the first moment."""
    beta2: float | None = None
    """fedadam, fedyogi, fedsgd: decay of the second moment."""
    tau: float | None = None
    """fedadam, fedyogi, fedsgd: how adaptive the server is; smaller is more."""
    max_steps: int | None = None
    """fednova: the most local steps in a round."""
    reference: int | None = None
    """fednova: the usual number of local steps, to which changes are scaled before they are rounded."""
    rate: float | None = None
    """gd: step size."""
    ridge: float | None = None
    """gd, fsvrg, dane, cocoa: lambda of the term lambda/2 |w|^2 in the objective."""
    step: float | None = None
    """fsvrg, dane: step size of variance-reduced steps."""
    passes: int | None = None
    """fsvrg, dane, cocoa: passes over a party's records in a round."""
    scaled: bool | None = None
    """fsvrg: scale by feature counts (S and A); linear models only."""
    over_examples: bool | None = None
    """fsvrg: divide the step by the party's example count."""
    mean: Literal["examples", "parties"] | None = None
    """fsvrg, dane: how the mean of the updates weighs."""
    gradient_scale: float | None = None
    """fsvrg: factor of gradients, so that one clipping norm suits both releases."""
    eta: float | None = None
    """dane: weight of the global gradient."""
    solver: Literal["newton", "svrg"] | None = None
    """dane: exact for convex losses, or variance-reduced passes."""
