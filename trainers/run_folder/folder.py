"""The files of a run's folder: what was asked for, what happened round by round, the trained weights.

    DIR/run.json            RunInfo: settings, parties, versions, budgets spent
    DIR/history.jsonl       one RoundRecord per line, appended when the round is complete
    DIR/model.safetensors   the latest complete round's weights; its number stands in the metadata
    DIR/best.safetensors    the weights of the best round, by the evaluation's first metric
    DIR/optimizer.R.safetensors  the optimizer after round R, where it lives through all rounds (centralized)
    DIR/algorithm_state.R.safetensors  what the algorithm's server and parties keep after round R
    DIR/cohorts.secret           from which cohorts are drawn, for the coordinator alone (see participation.py)
    DIR/ledger/NAME.jsonl   one privacy ledger per data owner
    DIR/receipts/NAME.jsonl, DIR/manifest.json  what the parties signed (:mod:`choral.trainers.run_folder.evidence`)
    DIR/transcript/         what the server saw, if that was to be recorded
    (:mod:`choral.trainers.run_folder.transcript`)

JSON is the truth; nothing is pickled. Each file is replaced in one step (write, fsync, rename), so a killed
process loses at most the round in progress.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from choral.doors import worded
from choral.locks import lock_file, sync_folder
from choral.privacy.ledgers.hash_chain import UnreadableError, as_json, encoded
from choral.trainers.run_folder.info import FORMAT_VERSION, RoundRecord, RunFolderError, RunInfo

LAST, BEST = "model.safetensors", "best.safetensors"
_LOCK = ".lock"
_SETTINGS = "use finite numbers, texts, lists and dicts in config and in the settings of the algorithm"


STANDARDISE = "standardise.json"
"""Means and deviations that were paid for before the run began."""


def ledger_file(folder: Path, holder: str) -> Path:
    """Where a data owner's ledger is in a folder of ledgers."""
    return folder / f"{quote(holder, safe='')}.jsonl"


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
        version = json.loads(raw, object_pairs_hook=_once).get("version")
        if version != FORMAT_VERSION:
            raise RunFolderError(
                f"{path} is of format version {version}; this Choral reads {FORMAT_VERSION}",
                hint="use the Choral that wrote it: run.json names it under versions",
            )
        return msgspec.json.decode(raw, type=RunInfo)
    except (msgspec.DecodeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}", hint="restore it, or run again in a new folder") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands in it twice, of which a person reads the first and a program the last")
    return found


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
    replace_file(folder / name, weights_bytes(state, round_number))


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


def weights_bytes(state: Mapping[str, torch.Tensor], round_number: int, **metadata: str) -> bytes:
    """A state dict as the bytes of a .safetensors file that carries the round's number."""
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
    replace_file(folder / f"{name}.{round_number}.safetensors", weights_bytes(state, round_number, **metadata))
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
    first = {STANDARDISE, "ledger"} if (folder / STANDARDISE).is_file() else set()  # which come before the run
    there = folder.iterdir() if folder.is_dir() else ()
    if any(item.name not in {_LOCK, *first} and item.suffix != ".tmp" for item in there):
        held = "another run" if (folder / "run.json").exists() else "other files"
        raise RunFolderError(
            f"{folder} already holds {held}",
            hint=worded(
                command="choose another --out, or continue that run with --resume",
                python="choose another out=, or continue that run with resume=True",
            ),
        )
