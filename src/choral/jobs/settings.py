"""The settings of a job: one set of names for TOML files and command-line flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from choral.audits.costs.job import Job
from choral.audits.costs.prices import PriceSettings
from choral.audits.findings.context import Context
from choral.errors import ConfigError
from choral.toml_files import parse_toml, read_toml
from choral.trainers.federated.participation import Participation
from choral.trainers.task.settings import AlgorithmSettings, DataSettings, ModelSettings, Split, Training

if TYPE_CHECKING:
    from choral.privacy import Privacy

Unit = Literal["record", "client"]
Neighbours = Literal["zero out one record", "replace one record"]
SumKind = Literal["plain", "masked", "homomorphic"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """The promise: differential privacy for each record in each party, or for each party (client) as a whole."""

    epsilon: float | None = None
    """Budget of each data owner for the whole run, or of each client; None trains without differential privacy."""
    delta: float = 1e-5
    """Probability outside the promise; must be well below 1 / (records of the smallest party)."""
    max_grad_norm: float = 1.0
    """Clipping norm of each record's gradient."""
    unit: Unit = "record"
    """Whose presence is hidden: a record's (noise in each party's training) or a client's (in the sum of updates)."""
    neighbours: Neighbours = "zero out one record"
    """What a record may be changed to unnoticed: an empty one, or, with more noise, any other. For records alone."""
    records_per_person: int | None = None
    """The most records that one person holds, if known: what they are promised together is then printed."""
    noise: Literal["distributed", "local", "central"] = "distributed"
    """Who adds the noise: of clients, each a share, each all of it, or the server. Of records, each party a share with
    algorithms fedsgd and gd, which take no other; with others each party all of its own, whatever is said here."""
    clip: float = 1.0
    """Clipping norm of a client's whole update; where it starts with quantile."""
    quantile: float | None = None
    """Quantile of the clients' norms that the clipping norm follows; None keeps it fixed."""
    mechanism: Literal["discrete_gaussian", "skellam", "buffered", "banded", "tree"] = "discrete_gaussian"
    """Law of client-level noise that clients add: discrete_gaussian or skellam. Of records buffered, banded or tree:
    fixed batches, and noise that is correlated over steps; in shares banded alone. Else their noise is independent."""
    bands: int | None = None
    """Of banded noise: 1 to the batches of a pass; by default at most 32."""
    bits: int = 20
    """Bits of a coordinate of the sum with client-level noise."""
    min_survivors: int | None = None
    """Clients that distributed noise is sized for; by default as for the secure sum, or a majority. Of records, as for
    the secure sum."""
    colluders: int = 1
    """Clients, or parties, whose share of the noise the adversary may know."""
    sample_rate: float | None = None
    """Of central noise for clients: the chance of each to be in a cohort, which a trusted server keeps secret."""
    noise_multiplier: float | None = None
    """Of clients: the noise of each sum over the clipping norm. By default the least that epsilon has room for; to be
    given where sites have spent before, each of whose reviews says what it has room for."""

    def for_records(self, given: Mapping[str, Any]) -> Privacy:
        """The promise, with all else that is given. Raises: ConfigError for bands of other noise, and as it does."""
        from choral.privacy import CorrelatedPrivacy, Privacy

        if self.mechanism in ("buffered", "banded", "tree"):
            return CorrelatedPrivacy(**given, mechanism=self.mechanism, bands=self.bands)
        if self.bands is not None:
            raise ConfigError(f"privacy.bands = {self.bands} is of banded noise", hint='privacy.mechanism = "banded"')
        return Privacy(**given)

    @property
    def client_mechanism(self) -> Literal["discrete_gaussian", "skellam"]:
        """Raises: ConfigError for noise that only records have."""
        if self.mechanism in ("discrete_gaussian", "skellam") and self.bands is None:
            return self.mechanism
        raise ConfigError(
            f"privacy.mechanism = {self.mechanism!r} or bands is for records, and this arm's unit is the client",
            hint='"discrete_gaussian" or "skellam", without bands',
        )


@dataclass(frozen=True, kw_only=True)
class SumSettings:
    """The secure sum between the parties.

    All but ``value_bound``, ``value_bits`` and ``weights`` is for sums that hide vectors.
    """

    kind: SumKind = "masked"
    """plain: the server sees each update; masked, homomorphic: only the sum."""
    key: Literal["split", "shared"] = "split"
    """Who holds the key of a homomorphic sum: nobody (split) or every party (shared: honest server, no colluder)."""
    min_survivors: int | None = None
    """Fewest parties whose sum may be opened; by default chosen from the number of parties."""
    corrupt: int | None = None
    """Parties that may work with the server; by default a third of all, or a tenth of more than ten."""
    cohort: Literal["chosen", "random"] = "chosen"
    """Of a round that asks some: the server may have chosen every corrupt party, or is trusted to draw at random."""
    dropouts: int | None = None
    """Parties that may vanish in a round; by default as many."""
    server: Literal["semi-honest", "malicious"] | None = None
    """What the server may do: look at everything, or also lie. By default it may lie; with a shared key it must not."""
    contributors: int | None = None
    """Of a masked sum: leave out coordinates to which fewer parties contribute. How many do is then known to all. In
    rehearsals alone, without noise and weight decay."""
    block: int = 1
    """Of contributors: so many coordinates in a row are counted together, such as the rows of an embedding; a party
    leaves out what it touches in part."""
    trips: Literal[2, 3, 4] | None = None
    """Of a round of a masked sum; by default four, and over Flower two where no sum is smaller for it. Three deal keys
    a round ahead; two leave out the survivors' confirmation too, so that a lying server may have fewer honest parties
    in the sum, which is stated."""
    robust: Literal["median", "trimmed", "geometric"] | None = None
    """Sum in random groups, and join the groups' means by this rule, which a minority of groups cannot move far. Hides
    a party among its group alone. In rehearsals alone."""
    group: int = 5
    """Of robust: parties in a group, at least."""
    attackers: float = 0.05
    """Of robust: the share of the parties that is assumed to poison, for what the report says of it."""
    value_bound: float = 16.0
    """Largest absolute value of an update's coordinate; a party with a larger one drops out, but for a plain sum."""
    value_bits: int = 28
    """Fixed-point bits per coordinate, before weights and parties are counted in."""
    weights: Literal["examples", "equal"] = "examples"
    """What a party counts for: its records, by its own word, or as much as every other."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What else the final model is evaluated on, beside the whole of the held-out records."""

    per_party: bool = False
    """Also at each party, on the records that it holds out: in the clear, not covered by any privacy promise."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Attacks that `compare` makes on its configurations; that it audits their runs goes without saying."""

    canaries: int = 0
    """Canary records in one more training of each configuration, for a lower bound on epsilon; each in by a coin. Not
    in those that white_box attacks."""
    white_box: int = 0
    """Canary gradients in a data owner's private training, which are looked for in every step that it releases."""
    clients: int = 0
    """Canary clients in one more training of each configuration whose promise is for each client; each in by a coin."""
    probe: bool = False
    """Also run private configurations' trainer on probe records; hold noise, sampling and clipping to its ledger."""

    def __post_init__(self) -> None:
        for name in ("canaries", "white_box", "clients"):
            if (count := getattr(self, name)) and count < 20:
                raise ConfigError(f"expected audit.{name} >= 20, got {count}", hint="500 can show epsilon of 4")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What the report says beside what was measured."""

    tolerance: float = 0.05
    """How much worse than the baseline, in the first metric, a configuration may be to be recommended."""
    on_device: Literal["no", "pt2", "onnx"] = "no"
    """Also time, on one core, the exported model's inference, one local epoch, and one on the full data, as a device
    would have to do: the model as a .pt2 file, or as that and as ONNX (needs the extra choral[onnx]). Some seconds."""
    context: Context = field(default_factory=Context)
    job: Job = field(default_factory=Job)

    def __post_init__(self) -> None:
        if not 0.0 <= self.tolerance < math.inf:
            raise ConfigError(f"expected report.tolerance >= 0, got {self.tolerance}", hint="0.05 is five points")


@dataclass(frozen=True, kw_only=True)
class SitesSettings:
    """What is agreed on of parties at sites of their own, and never counted. For `choral serve` alone."""

    records: int | None = None
    """Records of all sites together; what a site counts for, and what noise is sized by, follows from it."""
    largest: int | None = None
    """The most records that one site may have."""
    metrics: Literal["none", "in the clear, no epsilon"] = "none"
    """Whether the sum of the sites' own evaluations is published, which no promise covers."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The coordinator of `choral serve`: where it listens, and how many seconds it waits for whom."""

    job: str = ""
    """Name of the job, as sites approve it; by default the settings file's."""
    identity: Path | None = None
    """The coordinator's certificate, NAME.crt, with its key NAME.key beside it."""
    host: str = ""
    """Address to listen at; by default all of the machine's."""
    port: int = 8443
    """Port to listen at; 0 takes one that is free, and prints it."""
    wait: float = 600.0
    """For all sites to come and take the job, and, in a later round, for as many as the secure sum needs."""
    quorum: int | None = None
    """With how many sites to begin when that time is over; by default with none fewer than all."""
    training: float = 3600.0
    """For the sites' vectors: they train before they answer."""
    step: float = 60.0
    """For every other answer."""
    away: float = 20.0
    """For a site whose connection broke to come back; the round goes on without it then."""
    rehearsal: bool = False
    """Whoever serves runs all the sites too, as `choral poc` does: the manifest says so, and other sites sign none."""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """What a configuration is tuned over: every combination is trained once, the least held-out loss wins."""

    learning_rate: tuple[float, ...] = ()
    """Learning rates to try."""
    batch_size: tuple[int, ...] = ()
    """Batch sizes to try."""
    validation_fraction: float = 0.2
    """Share of each party's training records held out for the choice."""

    @property
    def grid(self) -> dict[str, tuple[float | int, ...]]:
        return {name: values for name in ("learning_rate", "batch_size") if (values := getattr(self, name))}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the same task. What is not set here is taken from the rest of the file."""

    centralized: bool = False
    """Pool the data in the cloud instead of federating."""
    private: bool = False
    """Train with differential privacy, as [privacy] says."""
    unit: Unit | None = None
    """Unit of a private configuration."""
    secure_sum: SumKind | None = None
    """Secure sum of a federated configuration."""
    batch_size: int | None = None
    """Batch size of this configuration."""
    learning_rate: float | None = None
    """Learning rate of this configuration."""
    reshuffle: bool | None = None
    """Whether this configuration's records are dealt out again, as split.reshuffle says."""
    tune: Tune = field(default_factory=Tune)
    """Values to choose from before the configuration is trained, without privacy."""
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    """Algorithm of this configuration, if it names a kind; otherwise what it sets replaces what the file says."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a job. Every key of the TOML file is a flag of the same name."""

    title: str = "Choral comparison"
    """Headline of the report."""
    task: str = "digits"
    """digits, fashion, comments, adult, shakespeare, comments-convex, posts-convex, or a Python file with
    load(split, training, seed) -> Task."""
    metrics: tuple[str, ...] = ("accuracy",)
    """What of the task's evaluation is compared; configurations are judged by the first. A "... gap" has a log axis."""
    target: float | None = None
    """Level of the first metric whose cost is asked: rounds, bytes, time and money until a configuration reaches it.
    By default 95 % of what the baseline gained over the untrained model."""
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data_dir: Path | None = None
    """Folder of the data sets; by default they are fetched, checked by hash, and kept in ~/.cache/choral."""
    seed: int = 0
    """First seed: initial weights, split and data order; never noise, keys or masks."""
    seeds: int = 3
    """How many seeds `compare` runs, counting up from the first."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model trains."""
    participation: Participation = field(default_factory=Participation)
    transcript: Literal["none", "digests", "messages", "rehearsal"] = "none"
    """What is recorded of what the server saw; a rehearsal also keeps each party's update IN THE CLEAR."""
    ledgers: Path | None = None
    """Folder of ledgers for the life of the data, one for each data owner: `train` counts what all runs have spent."""
    epsilons: tuple[float, ...] = ()
    """Budgets at which `compare` trains private configurations, for the budget-against-accuracy curve.

    A configuration with another unit than privacy.unit is trained at privacy.epsilon alone: that is another scale."""
    split: Split = field(default_factory=Split)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    audit: AuditSettings = field(default_factory=AuditSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    secure_sum: SumSettings = field(default_factory=SumSettings)
    sites: SitesSettings = field(default_factory=SitesSettings)
    serve: ServeSettings = field(default_factory=ServeSettings)
    prices: Path | None = None
    """Price table (TOML) whose entries replace those of the shipped one."""
    price: PriceSettings = field(default_factory=PriceSettings)
    arms: dict[str, Arm] = field(default_factory=dict)
    """The configurations of the comparison, by name."""


def read_settings(path: str | Path, kind: type[T]) -> T:
    """Settings from a TOML file.

    Raises: ConfigError naming the file and the key: missing file, not TOML, unknown key, wrong type, bad value.
    """
    return read_toml(path, kind, example=_EXAMPLE, keys=_KEYS, former=FORMER)


def parse_job(text: str, job: str) -> Settings:
    """The settings of a job file's text, as a job of that name. Raises: ConfigError, as :func:`read_settings`."""
    found = parse_toml(text, Settings, name=f"{job}.toml", example=_EXAMPLE, keys=_KEYS, former=FORMER)
    return replace(found, serve=replace(found.serve, job=job))


def read_job(path: str) -> Settings:
    """The settings of a job's TOML file. Raises: as :func:`read_settings`."""
    return read_settings(path, Settings)


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON data, with those that were left out: msgspec leaves them to the class."""
    whole = asdict(settings)
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole, enc_hook=str))
    return plain


_EXAMPLE, _KEYS = "examples/digits.toml", "`choral compare --help-all` lists every key with its type"
FORMER = {"dropout_rate": "participation.dropouts.vector"}
"""Keys that settings had, and what says the same now."""
