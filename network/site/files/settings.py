"""site.toml: what a site decides, and no coordinator is told.

The file is read strictly: an unknown key, a value out of range or a file that others may read stops the site before it
connects. Paths in it are of the site's own machine, those that do not begin with / from the site's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from choral.errors import ConfigError
from choral.network.errors import SiteError
from choral.network.transport.certificates import check_name
from choral.protocols.argument_checks import share
from choral.toml_files import read_toml

Kind = Literal["masked", "homomorphic"]
Algorithm = Literal[
    "fedavg",
    "fedprox",
    "scaffold",
    "fedadam",
    "fedyogi",
    "fednova",
    "fedsgd",
    "fsvrg",
    "dane",
    "gd",
    "cocoa",
    "statistics",
]
Noise = Literal["local", "distributed", "central"]
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""A file in tasks/, or the name of a data set: no path, nothing hidden."""
PART = re.compile(r"party ([1-9][0-9]{0,4}) of ([1-9][0-9]{0,4})")


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """A coordinator that this site answers. Its certificate is pinned in directory.toml under the same name."""

    address: str = ""
    """Where it listens, as host:port; empty where an engine brings its requests (`choral join --local`)."""
    proxy: str = ""
    """An HTTP proxy on the way out, as http://host:port; empty for none."""


@dataclass(frozen=True, kw_only=True)
class SumPolicy:
    """The weakest secure sum that this site sends its vector into."""

    kinds: tuple[Kind, ...] = ("masked", "homomorphic")
    """Kinds of sums. A plain one, in which the coordinator sees each vector, cannot be listed."""
    corrupt: int | float = 1
    """How many of the pinned sites may work together with the coordinator: a count, or a fraction of all of them."""
    minimum_cohort: int = 3
    """Fewest sites whose sum may be opened."""
    minimum_threshold: int = 2
    """Fewest sites who together can reconstruct a secret of this one."""
    server: Literal["semi-honest", "malicious"] = "malicious"
    """What the coordinator may do: look at everything, or also lie."""
    cohort: Literal["chosen", "random"] = "chosen"
    """Of a round that asks some sites: the coordinator may have picked every corrupt one, or is trusted to draw."""
    security_bits: int = 40
    """Least statistical security of a sparse graph of masks, in bits."""
    trips: tuple[Literal[2, 3, 4], ...] = (2, 3, 4)
    """How many trips a round of a masked sum may take. In two nobody confirms who is in it, and receipts do not name
    them; minimum_cohort holds all the same."""
    value_bound: float = 16.0
    """Largest absolute value of an update's coordinate that may be sent."""
    value_bits: int = 32
    """Most fixed-point bits of a coordinate."""
    maximum_weight: int = 1 << 20
    """Most that any site may count for in a weighted mean, in records."""


@dataclass(frozen=True, kw_only=True)
class JobPolicy:
    """What may be trained here."""

    algorithms: tuple[Algorithm, ...] = ("fedavg", "fedprox")
    """Algorithms that may run."""
    releases: tuple[Literal["fit", "derived", "data"], ...] = ("fit", "derived")
    """Where released values may come from: the training loop, other releases, or the records themselves."""
    metrics: Literal["none", "in the clear, no epsilon"] = "none"
    """Whether sums of the sites' own evaluations may be published, which no promise covers."""


@dataclass(frozen=True, kw_only=True)
class Maxima:
    """How much of everything a coordinator may ask for."""

    rounds: int = 100
    """Most rounds of a job."""
    parameters: int = 10_000_000
    """Most parameters of a model, and coordinates of a vector."""
    bytes_a_day: int = 50 << 30
    """Most bytes to and from the coordinator on one day (UTC)."""
    jobs_a_day: int = 10
    """Most jobs that may be agreed to on one day (UTC)."""


@dataclass(frozen=True, kw_only=True)
class DataPromise:
    """The most that a data set may tell, over all jobs of its life. A job's promise must be as strong or stronger."""

    epsilon: float
    """The most that all jobs together may spend."""
    delta: float
    """Probability outside the promise: the same in every job."""
    unit: Literal["record", "client"] = "record"
    """Whose presence is hidden: a record's, or this whole site's."""
    neighbours: Literal["zero out one record", "replace one record"] = "zero out one record"
    """What a record may be changed to unnoticed."""
    max_grad_norm: float = 1.0
    """Largest clipping norm: of a record's gradient, or of a whole update."""
    noise: tuple[Noise, ...] = ("local",)
    """Who may add the noise: this site all of it (local), each site a share (distributed), the coordinator (central).
    """
    colluders: int = 1
    """Of noise in shares: at least so many other sites may tell theirs."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of the site, its promise and its ledger. Exactly one of path and part."""

    path: Path | None = None
    """The file or folder that the training code reads."""
    part: str = ""
    """Of a task that comes with Choral: which part of its data stands for this site's, as "party 3 of 10"."""
    records: int
    """How many records it has. Held against the data when it is read."""
    promise: DataPromise | None = None
    """What may be spent in all. Left out only with without_privacy."""
    without_privacy: bool = False
    """Take jobs that promise no differential privacy for this data."""
    ledger: Path = Path()
    """What was spent, for the life of the data; by default ledgers/NAME.jsonl."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """One piece of training code, and the one data set that it may read."""

    data: str
    """Name of the data set."""
    trained_by: Literal["code", "engine"] = "code"
    """Who trains: this process, by the code; or the process of an engine, by code that the coordinator ships. That one
    reads the data by itself, and no promise can be kept.
    """


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """site.toml, read and checked. coordinators, data: by name. tasks: by the name of a file in tasks/, or of a task
    that comes with Choral.
    """

    name: str
    rehearsal: bool = False
    """Whoever wrote this runs all sites and the coordinator: receipts say so, and no manifest is signed that does not.
    """
    coordinators: dict[str, CoordinatorSettings] = field(default_factory=dict)
    sum: SumPolicy = field(default_factory=SumPolicy)
    job: JobPolicy = field(default_factory=JobPolicy)
    maxima: Maxima = field(default_factory=Maxima)
    data: dict[str, DataSet] = field(default_factory=dict)
    tasks: dict[str, TaskSettings] = field(default_factory=dict)


def read_site(path: Path) -> SiteSettings:
    """Read site.toml.

    Raises: ConfigError for a file that cannot be read, an unknown key, a word or a type that is not expected; SiteError
        for a number out of range, a data set without a place or a promise, a task without a data set.
    """
    settings = read_toml(
        path,
        SiteSettings,
        example="the site.toml that `choral site init NAME` writes",
        keys="docs/sites.md lists every key with its type",
    )
    check_name(settings.name)
    wrong = [*_out_of_range(settings), *_of_data(settings, path.parent), *_of_tasks(settings)]
    if wrong:
        raise SiteError(f"{path}: {wrong[0]}", hint="docs/sites.md lists every key with its range")
    return settings


def _out_of_range(settings: SiteSettings) -> Iterable[str]:
    total, maxima = settings.sum, settings.maxima
    try:
        share(total.corrupt, "sum.corrupt")
    except ConfigError as error:
        yield str(error)
    ranges = {
        "sum.minimum_cohort": (total.minimum_cohort, 2, 1 << 20),
        "sum.minimum_threshold": (total.minimum_threshold, 2, 1 << 20),
        "sum.security_bits": (total.security_bits, 1, 128),
        "sum.value_bits": (total.value_bits, 2, 60),
        "sum.value_bound": (total.value_bound, 1e-9, 1e12),
        "sum.maximum_weight": (total.maximum_weight, 1, 1 << 40),
        "maxima.rounds": (maxima.rounds, 1, 1_000_000),
        "maxima.parameters": (maxima.parameters, 1, 1 << 31),
        "maxima.bytes_a_day": (maxima.bytes_a_day, 1, 1 << 60),
        "maxima.jobs_a_day": (maxima.jobs_a_day, 1, 1_000_000),
    }
    for name, data in settings.data.items():
        ranges[f"data.{name}.records"] = (data.records, 1, 1 << 40)
        if (promise := data.promise) is not None:
            where = f"data.{name}.promise"
            ranges[f"{where}.epsilon"] = (promise.epsilon, 1e-9, 1e6)
            ranges[f"{where}.delta"] = (promise.delta, 1e-300, 0.5)
            ranges[f"{where}.max_grad_norm"] = (promise.max_grad_norm, 1e-30, 1e30)
            ranges[f"{where}.colluders"] = (promise.colluders, 0, 1 << 20)
    for what, (value, low, high) in ranges.items():
        if not low <= value <= high:
            yield f"{what} is {value}, expected {low} to {high}"
    listings = (("sum.kinds", total.kinds), ("sum.trips", total.trips), ("job.algorithms", settings.job.algorithms))
    for what, listed in listings:
        if not listed:
            yield f"{what} is empty: no job could be agreed to"


def _of_data(settings: SiteSettings, folder: Path) -> Iterable[str]:
    places: dict[object, str] = {}
    for name, data in settings.data.items():
        where = f"data.{name}"
        for place in (data.part or (folder / (data.path or "")).resolve(), (folder / ledger_of(name, data)).resolve()):
            if place in places:
                yield f"{where} and data.{places[place]} are one: {place}. One data set, one promise, one ledger"
            places[place] = name
        if not FILE.fullmatch(name):
            yield f"{where}: expected a name of letters, digits, '.', '_' and '-'"
        if (data.path is None) == (data.part == ""):
            yield f"{where}: expected exactly one of path and part"
        elif data.path is not None and not (folder / data.path).exists():
            yield f"{where}.path: there is nothing at {folder / data.path}"
        if data.part and not _part(data.part):
            yield f'{where}.part is {data.part!a}, expected the like of "party 3 of 10"'
        if (data.promise is None) != data.without_privacy:
            yield (
                f"{where} has neither a promise nor without_privacy = true"
                if data.promise is None
                else f"{where} has a promise and without_privacy = true: one of the two"
            )
        promise = data.promise
        if promise and promise.unit == "record" and promise.delta * data.records >= 1:
            yield f"{where}.promise.delta is {promise.delta:g}, expected below 1/{data.records}, one over its records"
        if promise and not promise.noise:
            yield f"{where}.promise.noise is empty: no job could be agreed to"


def ledger_of(name: str, data: DataSet) -> Path:
    """Where the ledger of a data set is, from the site's folder."""
    return data.ledger if data.ledger != Path() else Path("ledgers") / f"{name}.jsonl"


def _of_tasks(settings: SiteSettings) -> Iterable[str]:
    for name, task in settings.tasks.items():
        if not FILE.fullmatch(name):
            yield f"tasks.{name!a}: expected the name of a file in tasks/, or of a task of Choral"
        if task.trained_by == "engine" and (data := settings.data.get(task.data)) and data.promise is not None:
            yield f"tasks.{name} is trained by an engine, where the promise of data.{task.data} cannot be kept"
        if task.data not in settings.data:
            known = ", ".join(settings.data) or "none"
            yield f"tasks.{name}.data is {task.data!r}, and the data sets are: {known}"


def _part(text: str) -> bool:
    found = PART.fullmatch(text)
    return found is not None and int(found[1]) <= int(found[2])
