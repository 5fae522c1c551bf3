"""A run and its folder: what was asked, what happened round by round, the trained weights.

    DIR/run.json            RunInfo: settings, parties, versions, budgets spent
    DIR/history.jsonl       one RoundRecord per line, appended when the round is complete
    DIR/model.safetensors   the latest complete round's weights; its number stands in the metadata
    DIR/optimizer.R.safetensors  the optimizer after round R, where it lives through all rounds (centralized)
    DIR/algorithm_state.R.safetensors  what the algorithm's server and parties keep after round R
    DIR/cohorts.secret           from which cohorts are drawn, for the coordinator alone (see participation.py)
    DIR/ledger/NAME.jsonl   one privacy ledger per data holder
    DIR/transcript/         what the server saw, if that was to be recorded
    (:mod:`choral.trainers.run_folder.transcript`)

JSON is the truth; nothing is pickled. Each file is replaced in one step (write, fsync, rename), so a killed
process loses at most the round in progress.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self
from urllib.parse import quote

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from choral.differences import differences, in_short
from choral.doors import worded
from choral.errors import ChoralError, ConfigError
from choral.locks import lock_file, sync_folder
from choral.privacy import Spent
from choral.privacy.ledgers.hash_chain import UnreadableError, as_json, encoded
from choral.trainers.run_folder.best_round import best_of
from choral.trainers.task.per_party import PerParty

if TYPE_CHECKING:
    from torch import nn

    from choral.trainers.run_folder.export import Exported

FORMAT_VERSION = 1
LAST, BEST = "model.safetensors", "best.safetensors"
_LOCK = ".lock"
_SHARED_KEYS = {
    "audit",
    "evaluation",
    "title",
    "seeds",
    "device",
    "epsilons",
    "arms",
    "privacy",
    "seed",
    "prices",
    "price",
}  # of the job, or compared elsewhere
_NAMED_PACKAGES = ("choral", "torch", "opacus", "dp-accounting", "numpy", "pycryptodome")


class RunFolderError(ChoralError):
    """A run folder is missing, incomplete, damaged, of another version, or holds another run."""


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the history. Round 0 is the initial model, before any training.

    metrics: what the user's ``evaluate`` returned; a bare number is filed under "accuracy".
    seconds: wall-clock time of the round, evaluation excluded.
    survivors: parties whose update is in the new model. bytes_up, bytes_down: bytes sent and received by the
        busiest party in this round, the download of the global model included. epsilon: the worst data holder's
        spending after this round, None without privacy. clip: the clipping norm of whole updates after this round, None
        where they are not clipped. joules: of the machine's meters in this round, None where none could be read.
    asked: parties that the round began with, None if pooled. failed: why it was given up, its model being the one
        before and its survivors 0; empty for a round that succeeded. simulated_start, simulated_seconds: of the round
        in the world that participation describes, None where it has no time.
    dropped: parties that were there and whose training failed, and how; what raised it is for the log alone.
    largest: the largest absolute coordinate that a party sent, None where the server does not see it.
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
    asked: int | None = None
    failed: str = ""
    simulated_start: float | None = None
    simulated_seconds: float | None = None
    dropped: dict[str, str] = {}
    largest: float | None = None


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
        are virtual, and population tells of them in sum.
    privacy: the settings of the promise (epsilon, delta and its own others; "unit" where it is the client) or None.
    spent: the cost per data holder; one entry, "pooled", for a centralized private run, and one, "clients", for
        client-level privacy.
    secure_sum: name and trust statement of the secure sum; None for a centralized run.
    fixed_point: bound, value_bits, step and error_bound (per coordinate of the weighted mean) of the encoding.
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
    """

    format: Literal["choral-run"] = "choral-run"
    version: int = FORMAT_VERSION
    kind: Literal["centralized", "federated"]
    rounds: int
    seed: int
    device: str
    parties: dict[str, int]
    population: Population | None = None
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

    @property
    def party_count(self) -> int:
        return self.population.parties if self.population else len(self.parties)

    @property
    def total_examples(self) -> int:
        return self.population.examples if self.population else sum(self.parties.values())


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished or interrupted training. ``state`` is the model's state dict after the last history entry.

    ledgers: of a run without a folder, by data holder: the lines of what would be its ledger files, for audits.
    best: the state dict after round `best_round`, the best by the evaluation's first metric; empty where a run of an
        earlier version kept none.
    """

    info: RunInfo
    history: tuple[RoundRecord, ...]
    state: Mapping[str, torch.Tensor]
    folder: Path | None = None
    ledgers: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    best: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        return bool(self.history) and (self.history[-1].round >= self.info.rounds or bool(self.info.ended))

    @property
    def best_round(self) -> int:
        """The round that was best by the evaluation's first metric, the earliest of equals."""
        return best_of(self.history)

    @property
    def metrics(self) -> dict[str, float]:
        """The latest evaluation."""
        return dict(self.history[-1].metrics) if self.history else {}

    @property
    def spent(self) -> Spent | None:
        """The worst data holder's cost, or None without privacy."""
        return max(self.info.spent.values(), key=lambda spent: spent.epsilon, default=None)

    def save(self, folder: str | Path) -> Path:
        """Write the run as a folder; its ledgers, too, unless they are in files already, which stay where they are.

        Raises: RunFolderError if the folder already holds a run.
        """
        folder = Path(folder)
        if (folder / "run.json").exists():
            raise RunFolderError(f"{folder} already holds a run", hint="choose another folder")
        info, lines = checked_json(as_read_back(self.info)), history_lines(self.history)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "history.jsonl", lines)
        replace_file(folder / LAST, _weights(self.state, self.history[-1].round if self.history else 0))
        if self.best:
            replace_file(folder / BEST, _weights(self.best, self.best_round))
        for name, content in self.ledgers.items():
            (folder / "ledger").mkdir(exist_ok=True)
            replace_file(folder / "ledger" / f"{quote(name, safe='')}.jsonl", content)
        replace_file(folder / "run.json", msgspec.json.format(info, indent=1))
        return folder

    def export(self, model: nn.Module, example_inputs: Sequence[torch.Tensor], path: str | Path) -> Exported:
        """Write the trained model for inference, as ``.pt2`` or ``.onnx``, checked for equal outputs.

        model: of the run's architecture, such as ``build(dataset)[0]``; its own weights do not matter.
        See :func:`choral.trainers.run_folder.export.export` for arguments and errors.
        """
        from choral.trainers.run_folder.export import export

        return export(model, self.state, example_inputs, path)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run folder back.

        Raises: RunFolderError naming the file that is missing, damaged or of another version.
        """
        folder = Path(folder)
        info = read_info(folder)
        state, last = read_weights(folder)
        history = read_history(folder, last)
        return cls(info=info, history=history, state=state, folder=folder, best=read_best(folder, best_of(history)))


def value_bound_for(run: Run, margin: float = 4.0) -> float:
    """A ``value_bound`` for runs like this one, a dry run with ``Plain`` on public data: the power of two from `margin`
    times the largest coordinate that a party sent.

    Raises: ConfigError for a run that shows none (another secure sum, a transcript, client-level privacy).
    """
    seen = [entry.largest for entry in run.history if entry.largest is not None]
    if not seen:
        raise ConfigError(
            "the run does not show how large its updates were",
            hint="train on public data with secure_sum=Plain(), and without transcript or ClientPrivacy",
        )
    return 2.0 ** math.ceil(math.log2(max(margin * max(seen), 2.0**-20)))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _NAMED_PACKAGES}


def replace_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write atomically: after a crash the file holds the old content or the new, whole. mode: of a new file."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def checked_json(entry: RunInfo | RoundRecord) -> bytes:
    """Return its JSON. Raises: RunFolderError, before anything is written, if it could not be read back as it is."""
    try:
        return encoded(entry)
    except UnreadableError as error:
        raise RunFolderError(str(error), hint=error.hint) from error


def as_read_back(info: RunInfo) -> RunInfo:
    """Return what a reader of run.json will find: lists for tuples, Python's own numbers for numpy's, a path's text.

    Raises: RunFolderError for what cannot be written so that it is read back: NaN, objects.
    """
    try:
        found = as_json(info, _python_value)
        plain = msgspec.json.decode(msgspec.json.encode(found), type=RunInfo)
        same = as_json(plain) == found
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # msgspec's are ValueErrors
        raise RunFolderError(f"the run's settings cannot be written down: {error}", hint=_SETTINGS) from error
    if not same:
        raise RunFolderError("the run's settings would not be read back as they are", hint=_SETTINGS)
    return plain


_SETTINGS = "use finite numbers, texts, lists and dicts in config and in the settings of the algorithm"


def _python_value(value: Any) -> int | float | str:
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} is neither a number nor a text")


def history_lines(history: Sequence[RoundRecord]) -> bytes:
    """The lines of history.jsonl. Raises: as :func:`checked_json`."""
    return b"".join(checked_json(entry) + b"\n" for entry in history)


def write_info(folder: Path, info: RunInfo) -> None:
    """Raises: as :func:`checked_json`."""
    replace_file(folder / "run.json", msgspec.json.format(checked_json(info), indent=1))


def read_info(folder: Path) -> RunInfo:
    path = folder / "run.json"
    if not path.is_file():
        hint = worded(command="name the folder given to --out", python="name the folder given as out=")
        if one := next(folder.glob("arms/*/*/run.json"), None):
            hint = f"it holds a comparison: name one of its runs, such as {one.parent}"
        raise RunFolderError(f"{folder} is not a run folder: no run.json in it", hint=hint)
    try:
        raw = path.read_bytes()
        version = json.loads(raw).get("version")
        if version != FORMAT_VERSION:
            raise RunFolderError(
                f"{path} is of format version {version}; this Choral reads {FORMAT_VERSION}",
                hint="use the Choral that wrote it: run.json names it under versions",
            )
        return msgspec.json.decode(raw, type=RunInfo)
    except (msgspec.DecodeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}", hint="restore it, or run again in a new folder") from None


def append_round(folder: Path, entry: RoundRecord) -> None:
    line = history_lines([entry])
    with (folder / "history.jsonl").open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_history(folder: Path, last: int) -> tuple[RoundRecord, ...]:
    """The complete rounds up to ``last``; a torn or surplus tail belongs to a round that was cut short."""
    path = folder / "history.jsonl"
    if not path.is_file():
        raise RunFolderError(f"{folder} has no history.jsonl", hint="the folder is incomplete; run again in a new one")
    entries: list[RoundRecord] = []
    for line in path.read_bytes().splitlines():
        if len(entries) > last:
            break
        try:
            entries.append(msgspec.json.decode(line, type=RoundRecord))
        except msgspec.DecodeError as error:
            raise RunFolderError(f"{path}, line {len(entries) + 1}, is damaged: {error}") from None
    if [entry.round for entry in entries] != list(range(last + 1)):
        raise RunFolderError(f"{path} does not hold rounds 0 to {last}, which model.safetensors belongs to")
    return tuple(entries)


def write_weights(folder: Path, state: Mapping[str, torch.Tensor], round_number: int, name: str = LAST) -> None:
    replace_file(folder / name, _weights(state, round_number))


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    path = folder / LAST
    if not path.is_file():
        raise RunFolderError(f"{folder} has no model.safetensors", hint="the run ended before its first round")
    tensors, metadata = read_tensors(path)
    return tensors, int(metadata["round"])


def read_best(folder: Path, best: int) -> dict[str, torch.Tensor]:
    """The weights of the best round; none where a run of an earlier version, or one that was cut off, kept no such."""
    if not (folder / BEST).is_file():
        return {}
    tensors, metadata = read_tensors(folder / BEST)
    return tensors if int(metadata["round"]) == best else {}


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            int(metadata["round"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}", hint="restore it, or run again in a new folder") from None


def _weights(state: Mapping[str, torch.Tensor], round_number: int, **metadata: str) -> bytes:
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    return bytes(safetensors_bytes(copies, metadata={"round": str(round_number), **metadata}))


def write_optimizer(folder: Path, optimizer: torch.optim.Optimizer, round_number: int) -> None:
    """Tensors and numbers of the optimizer's state and groups (learning rates), as optimizer.ROUND.safetensors.

    Named by round: it is written before model.safetensors, which makes the round complete.
    """
    state: dict[str, torch.Tensor] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor | int | float):
                state[f"{index}.{name}"] = torch.as_tensor(value)
    settings = [
        {name: value for name, value in group.items() if isinstance(value, bool | int | float | str)}
        for group in optimizer.param_groups
    ]
    write_side_file(folder, "optimizer", state, round_number, groups=json.dumps(settings))


def write_side_file(
    folder: Path, name: str, state: Mapping[str, torch.Tensor], round_number: int, **metadata: str
) -> None:
    """Write NAME.ROUND.safetensors, and delete those of more than one round before."""
    replace_file(folder / f"{name}.{round_number}.safetensors", _weights(state, round_number, **metadata))
    drop_earlier(folder, name, round_number)


def drop_earlier(folder: Path, name: str, round_number: int) -> None:
    """Delete every NAME.ROUND.safetensors but those of this round and the one before."""
    for old in folder.glob(f"{name}.*.safetensors"):
        if old.name not in {f"{name}.{number}.safetensors" for number in (round_number, round_number - 1)}:
            old.unlink()


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer, round_number: int) -> None:
    path = folder / f"optimizer.{round_number}.safetensors"
    if not path.is_file():
        return
    state: dict[int, dict[str, torch.Tensor]] = {}
    tensors, metadata = read_tensors(path)
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for group, kept in zip(groups, json.loads(metadata["groups"]), strict=True):
        group.update(kept)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def lock(folder: Path) -> BinaryIO:
    """Claim the folder for this process, until the returned file is closed or the process ends.

    Raises: RunFolderError if another process is writing there, such as a worker that outlived a killed command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _LOCK).open("ab")
    try:
        lock_file(file, wait=False)
    except BlockingIOError:
        file.close()
        raise RunFolderError(
            f"another process is writing to {folder}",
            hint="wait until it ends, or choose another " + worded(command="--out", python="out="),
        ) from None
    return file


def check_empty(folder: Path) -> None:
    """Refuse an output folder that holds anything: a run is never overwritten."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file", hint="name a folder")
    if folder.is_dir() and any(item.name != _LOCK and item.suffix != ".tmp" for item in folder.iterdir()):
        held = "another run" if (folder / "run.json").exists() else "other files"
        raise RunFolderError(
            f"{folder} already holds {held}",
            hint=worded(
                command="choose another --out, or continue that run with --resume",
                python="choose another out=, or continue that run with resume=True",
            ),
        )


_COMPUTED = ("precision", "compile")


def check_same(old: RunInfo, new: RunInfo) -> None:
    """Refuse to resume a run that was started with other settings.

    More rounds than it was to have are its going on, unless noise or learning rates were planned for all of them.
    """
    if new.rounds > old.rounds and old.privacy is None and (old.schedule or {}).get("kind") != "cosine":
        planned = dict(new.config.get("training") or {})
        if "rounds" in planned:
            training = {**planned, "rounds": (old.config.get("training") or {}).get("rounds")}
            new = msgspec.structs.replace(new, config={**new.config, "training": training})
        new = msgspec.structs.replace(new, rounds=old.rounds)
    fields = ("kind", "rounds", "seed", "parties", "population", "privacy", "algorithm", "start", "tuning", "schedule")
    _compare(old, new, (*fields, *_COMPUTED, "participation"), {*old.config, *new.config} - _SHARED_KEYS)


def _same() -> str:
    return "use the same settings, or a new " + worded(command="--out", python="out=")


def check_complete(old: RunInfo, new: RunInfo) -> None:
    """The same for what is known only once the model is built."""
    _compare(old, new, ("parameters", "fixed_point"))
    before, now = old.secure_sum or {}, new.secure_sum or {}
    if any(before.get(key) != now.get(key) for key in ("name", "key")):
        raise ConfigError("cannot resume with another secure sum", hint=_same())


def _compare(old: RunInfo, new: RunInfo, fields: tuple[str, ...], settings: Iterable[str] = ()) -> None:
    plain = ({name: msgspec.to_builtins(getattr(info, name)) for name in fields} for info in (old, new))
    was, now = plain
    changed = [each for name in fields for each in differences(was[name], now[name], name)]
    changed += [each for key in sorted(settings) for each in differences(old.config.get(key), new.config.get(key), key)]
    if changed:
        raise ConfigError(f"cannot resume: {in_short(list(dict.fromkeys(changed)))}", hint=_same())
