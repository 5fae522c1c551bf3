"""The settings of ``choral stats``, and the statistics that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from choral.errors import ConfigError
from choral.jobs.settings import Arm, PrivacySettings, ServeSettings, Settings, SitesSettings, SumSettings
from choral.trainers.task.settings import AlgorithmSettings, Split

if TYPE_CHECKING:
    from choral.trainers.analytics.part import Statistic
    from choral.trainers.analytics.result import FederatedStatistics

Kind = Literal["count", "mean", "covariance", "histogram", "categories", "table", "quantiles"]


@dataclass(frozen=True, kw_only=True)
class StatisticSettings:
    """One statistic. Which keys it needs depends on its kind; all are public, and none is computed from the data."""

    kind: Kind
    """What is computed: count; mean (with sum, variance, deviation); covariance (with means, correlations); histogram;
    categories; table; quantiles."""
    column: str | None = None
    """The column; by default the statistic's name."""
    low: float | None = None
    """Of mean and quantiles: public lower bound; what is below counts as the bound."""
    high: float | None = None
    """Of mean and quantiles: public upper bound."""
    edges: tuple[float, ...] = ()
    """Of a histogram: edges of its bins, rising."""
    values: tuple[str | int, ...] = ()
    """Of categories: the values; all others are counted together."""
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Of quantiles: which, between 0 and 1."""
    bins: int = 1024
    """Of quantiles: resolution, a square."""
    columns: dict[str, tuple[str | int | float, ...]] = field(default_factory=dict)
    """Of a covariance: low and high of each column; of a table: the values of each."""
    weight: float | None = None
    """Share of the privacy budget, as against the others; by default 1, of quantiles 4."""


@dataclass(frozen=True, kw_only=True)
class StatisticsSettings:
    """Settings of ``choral stats``. What training jobs have too means the same here."""

    title: str = "Statistics"
    """Headline."""
    parties: dict[str, Path] = field(default_factory=dict)
    """A CSV file with a header for each party, relative to this file."""
    delimiter: str = ","
    """Between the fields of those files."""
    task: str | None = None
    """In the place of parties: a data set by name, or a Python file, as of a training job. Its columns are "0", "1" and
    so on, and "label"."""
    split: Split = field(default_factory=Split)
    seed: int = 0
    """Of the split."""
    data_dir: Path | None = None
    """Folder of the data sets."""
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    secure_sum: SumSettings = field(default_factory=SumSettings)
    ledgers: Path | None = None
    """Folder of ledgers for the life of the data, one for each data owner."""
    contributors: int | None = None
    """Without noise: what fewer parties contribute to is left out. How many contribute is then released."""
    threshold: float | None = None
    """With noise: cells whose noisy count of records is below it are left out of the result."""
    statistics: dict[str, StatisticSettings] = field(default_factory=dict)
    """What is computed, by name."""
    sites: SitesSettings = field(default_factory=SitesSettings)
    """With --directory: what is agreed on of the sites."""
    serve: ServeSettings = field(default_factory=ServeSettings)
    """With --directory: where the coordinator listens, and how long it waits."""


def run_statistics(settings: StatisticsSettings, *, base: Path, out: Path | None) -> FederatedStatistics:
    """Compute them. base: what paths of parties are relative to. out: where ledgers are, if nothing else is said.

    Raises: ConfigError, DataError; what federated_statistics does.
    """
    from choral.jobs.training import privacy_of, secure_sum_of
    from choral.trainers import federated_statistics

    job, epsilon = job_of(settings), settings.privacy.epsilon
    ledgers = settings.ledgers or (out / "ledger" if out is not None and epsilon is not None else None)
    return federated_statistics(
        _parties(settings, base),
        {name: statistic_of(name, each) for name, each in settings.statistics.items()},
        privacy=None if epsilon is None else privacy_of(job, Arm(private=True), epsilon),
        secure_sum=secure_sum_of(job, Arm()),
        ledgers=ledgers,
        contributors=settings.contributors,
        threshold=settings.threshold,
    )


def job_of(settings: StatisticsSettings) -> Settings:
    """What of them a training job has too."""
    algorithm = AlgorithmSettings(kind="fedsgd")
    return Settings(
        privacy=settings.privacy,
        secure_sum=settings.secure_sum,
        algorithm=algorithm,
        sites=settings.sites,
        serve=settings.serve,
    )


def statistic_of(name: str, settings: StatisticSettings) -> Statistic:
    """Raises: ConfigError for a key that its kind needs and that is not set."""
    from choral import trainers

    more: dict[str, Any] = {} if settings.weight is None else {"weight": settings.weight}

    def needed(key: str) -> Any:
        if (value := getattr(settings, key)) in (None, (), {}):
            raise ConfigError(f"statistics.{name}.{key} is not set, and a {settings.kind} needs it")
        return value

    kind = settings.kind
    if kind == "covariance":
        return trainers.Covariance(needed("columns"), **more)
    if kind == "table":
        return trainers.Table(needed("columns"), **more)
    more |= {"column": settings.column}
    if kind == "count":
        return trainers.Count(**more)
    if kind == "mean":
        return trainers.Mean(needed("low"), needed("high"), **more)
    if kind == "histogram":
        return trainers.Histogram(needed("edges"), **more)
    if kind == "categories":
        return trainers.Categories(needed("values"), **more)
    return trainers.Quantiles(needed("shares"), needed("low"), needed("high"), settings.bins, **more)


def _parties(settings: StatisticsSettings, base: Path) -> dict[str, Any]:
    from choral.jobs.training import load_task
    from choral.trainers.analytics.columns import read_columns

    if bool(settings.parties) == (settings.task is not None):
        raise ConfigError("expected either parties or a task", hint='[parties] with NAME = "FILE.csv" for each')
    if settings.task is not None:
        job = Settings(task=settings.task, split=settings.split, data_dir=settings.data_dir)
        return dict(load_task(job, settings.seed).parties)
    return {name: read_columns(base / path, settings.delimiter) for name, path in settings.parties.items()}
