"""What a run is: its settings and parties (run.json) and its rounds (history.jsonl), as they are written down."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal

import msgspec

from choral import __version__
from choral.errors import ChoralError
from choral.metrics import is_falling
from choral.privacy import Spent
from choral.trainers.task.per_party import PerParty

FORMAT_VERSION = 1
_NAMED_PACKAGES = ("torch", "opacus", "dp-accounting", "numpy", "pycryptodome")


class RunFolderError(ChoralError):
    """A run folder is missing, incomplete, damaged, of another version, or holds another run."""


_KEYS = {"selected": "asked"}  # in history.jsonl, since version 1


class RoundTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a round's time went, in seconds. training: the parties' training, one party after another, by the clock.

    server: the server's own arithmetic by the clock, decoding and the algorithm's step. evaluation: by the clock; it is
    no part of the round's seconds. What is left of these is the secure sum with the parties' encoding.
    processor, training_processor: of the round, and of its training, in processor time of this process, all threads
    together, which other programs on the machine lengthen least.
    """

    training: float
    server: float
    evaluation: float
    processor: float
    training_processor: float


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_KEYS):
    """One line of the history. Round 0 is the initial model, before any training.

    metrics: what the user's ``evaluate`` returned; a bare number is filed under "accuracy".
    seconds: wall-clock time of the round, evaluation excluded.
    survivors: parties whose update is in the new model. bytes_up, bytes_down: bytes sent and received by the
        busiest party in this round, the download of the global model included. epsilon: the worst data owner's
        spending after this round, None without privacy. clip: the clipping norm of whole updates after this round, None
        where they are not clipped. joules: of the machine's meters in this round, None where none could be read.
    selected: parties that the round began with ("asked" in the file), None if pooled. failed: why it was given up, its
        model being the one before and its survivors 0; empty for a round that succeeded. simulated_start,
        simulated_seconds: of the round in the world that participation describes, None where it has no time.
    dropped: parties that were there and whose training failed, and how; what raised it is for the log alone.
    largest: the largest absolute coordinate that a party sent, None where the server does not see it.
    times: None where other processes trained, and in the runs of earlier versions.
    contributed: coordinates that somebody moved, that fewer than `least` did, and which of them the sum shows; None
        where it was not counted (:class:`choral.protocols.contributors.ContributorCount`).
    """

    round: int
    metrics: dict[str, float]
    seconds: float
    survivors: int
    bytes_up: int
    bytes_down: int
    epsilon: float | None = None
    clip: float | None = None
    joules: float | None = None
    selected: int | None = None
    failed: str = ""
    simulated_start: float | None = None
    simulated_seconds: float | None = None
    dropped: dict[str, str] = {}
    largest: float | None = None
    times: RoundTimes | None = None
    contributed: dict[str, int] | None = None


class Population(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run records of parties that are too many to list; all of it is declared, not counted.

    parties: how many. examples, largest: of all parties, and of the largest. sampled: parties, evenly spaced, whose
    declared sizes have these quantiles ("0.5" is the median).
    """

    parties: int
    examples: int
    largest: int
    sampled: int
    quantiles: dict[str, float]


class Sealed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the transcript went when the latest round was complete. head: of its chain after ``entries`` entries."""

    entries: int
    head: str


class RunInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a run that is not its history or its weights.

    kind: "centralized" (pooled data) or "federated". parties: examples per party; empty, as is raw_bytes, where they
        are virtual or at sites of their own, and population tells of them in sum. sites: the names of the latter, whose
        records nobody counted, and whose ledgers are theirs.
    privacy: the settings of the promise (epsilon, delta and its own others; "unit" where it is the client) or None.
    spent: the cost per data owner; one entry, "pooled", for a centralized private run, and one, "clients", for
        client-level privacy.
    secure_sum: name and trust statement of the secure sum; None for a centralized run.
    fixed_point: what the kind of encoding has of bound, value_bits, max_weight, step, coordinates and error_bound (per
        coordinate of the mean).
    raw_bytes: size of each party's raw examples, which a centralized run has to move once.
    start: source, sha256 and bytes of the weights that it started from; None where the seed made them.
    participation: who takes part in a round, None for everybody always.
    schedule: of the learning rates, None where they stay.
    algorithm: kind and hyper-parameters of the federated algorithm; releases: what each of its rounds tells.
    config: the settings that the user typed, as they were typed.
    tuning: the declared search for this run's settings: its grid, every try with its loss and seconds, the chosen.
    precision, compile: how the model was computed in training.
    processes: that trained side by side, each for the seconds of a round; more than one if data-parallel.
    ended: why the run was closed before its last round; empty otherwise. meters: what counted the rounds' joules.
    per_party: the final model on the records that each party held out, where that was asked for; without noise.
    transcript: the head of the transcript's chain; None if none was recorded.
    dropped: rounds in which a party's training failed, by party.
    ledgers: whose life they have: the run's, or the data's, of which the folder has copies as they were in the end.
    weights: what a party counts for in a mean by examples: its "examples", or "equal" to every other.
    standardised: whether features were standardised by means and deviations of all parties' records, and how those were
        computed: share of epsilon; where each party added a share of the noise, min_survivors and colluders.
    """

    format: Literal["choral-run"] = "choral-run"
    version: int = FORMAT_VERSION
    kind: Literal["centralized", "federated"]
    rounds: int
    seed: int
    device: str
    parties: dict[str, int]
    population: Population | None = None
    sites: tuple[str, ...] = ()
    parameters: int
    privacy: dict[str, float | int | str] | None = None
    spent: dict[str, Spent] = {}
    start: dict[str, str | int] | None = None
    participation: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    algorithm: dict[str, Any] | None = None
    releases: tuple[dict[str, Any], ...] = ()
    secure_sum: dict[str, Any] | None = None
    fixed_point: dict[str, float | int] | None = None
    raw_bytes: dict[str, int] = {}
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    tuning: dict[str, Any] | None = None
    precision: str = "float32"
    compile: bool = False
    processes: int = 1
    ended: str = ""
    meters: tuple[str, ...] = ()
    per_party: PerParty | None = None
    transcript: Sealed | None = None
    dropped: dict[str, int] = {}
    weights: Literal["examples", "equal"] = "examples"
    ledgers: Literal["run", "data"] = "run"
    standardised: dict[str, float | int] | None = None

    @property
    def party_count(self) -> int:
        return self.population.parties if self.population else len(self.parties)

    @property
    def total_examples(self) -> int:
        return self.population.examples if self.population else sum(self.parties.values())


def versions() -> dict[str, str]:
    """Versions of Python, Choral (which may run uninstalled) and the packages that numbers depend on."""
    own = {"python": platform.python_version(), "choral": __version__}
    return own | {name: metadata.version(name) for name in _NAMED_PACKAGES}


def best_of(history: Sequence[RoundRecord]) -> int:
    """Return the round whose evaluation was best by the first metric, the earliest of equals; 0 before any evaluation.

    A choice by what ``evaluate`` says: where that reads records that a promise protects, the choice is a release of
    its own, as every metric is.
    """
    if not history:
        return 0
    metric = next(iter(history[0].metrics), "")
    known = [entry for entry in history if metric in entry.metrics]
    sign = -1.0 if is_falling(metric) else 1.0
    return max(known, key=lambda entry: (sign * entry.metrics[metric], -entry.round)).round if known else 0
