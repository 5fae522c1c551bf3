"""The training code that a site installed, and the data that it reads; for the coordinator, its half of the same file.

A file offers, beside the ``load`` of a rehearsal:

    site(data, training, seed) -> (Task, dataset)     data: the path in site.toml; of the records there
    coordinator(training, seed) -> (Task, example)    example: a data set of the same kind, with no record of any site

Both make the same model. A file is read once: what is run is what was hashed and agreed to, whatever lies there later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from choral.errors import ConfigError
from choral.network.errors import OfferRefusedError
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task, check_party, raised_by

Loaded = tuple[Task, Any]


def site_task(code: Path, digest: str, data: Path, training: Training, seed: int) -> Loaded:
    """Raises: OfferRefusedError if the file is not the one that was agreed to; ConfigError, TaskError, DataError."""
    raw = _read(code)
    if hashlib.sha256(raw).hexdigest() != digest:
        raise OfferRefusedError([f"the training code {code.name} was changed since it was agreed to"])
    return _called(code, raw, "site", data, training, seed)


def code_digest(code: Path) -> str:
    """SHA-256 of a file of training code, in hexadecimal. Raises: ConfigError."""
    return hashlib.sha256(_read(code)).hexdigest()


def coordinator_task(code: Path, training: Training, seed: int) -> tuple[Loaded, str]:
    """The task, the example, and the SHA-256 of the file. Raises: ConfigError, TaskError."""
    raw = _read(code)
    return _called(code, raw, "coordinator", training, seed), hashlib.sha256(raw).hexdigest()


def embedded_part(name: str, number: int, parts: int, split: Split, training: Training, seed: int) -> Loaded:
    """A task that comes with Choral: part ``number``, from 1, of its split in ``parts``. Raises: OfferRefusedError."""
    task, parties = _embedded(name, split, training, seed)
    if len(parties) != parts:
        raise OfferRefusedError([f"the data is part {number} of {parts}, and the job splits it in {len(parties)}"])
    held = list((task.held_out or {}).values())
    return replace(task, held_out={"here": held[number - 1]} if len(held) == parts else None), parties[number - 1]


def embedded_example(name: str, split: Split, training: Training, seed: int) -> Loaded:
    """The same for the coordinator, who sees all of it anyway."""
    task, parties = _embedded(name, split, training, seed)
    return task, parties[0]


def _embedded(name: str, split: Split, training: Training, seed: int) -> tuple[Task, list[Any]]:
    from choral.trainers.data import TASKS

    if name not in TASKS:
        raise ConfigError(f"Choral has no task {name!r}", hint=f"it has {', '.join(TASKS)}")
    task = TASKS[name](split, training, seed, None)
    return task, list(task.parties.values())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the training code {path} cannot be read: {error.strerror}") from None


class _AsRead(InspectLoader):
    """Loads what was read, and neither the file as it may be meanwhile nor what Python cached of it."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self._path, self._raw = path, raw

    def get_source(self, fullname: str) -> str:  # noqa: ARG002
        return self._raw.decode()

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        return self.source_to_code(self._raw, str(self._path))


def _called(path: Path, raw: bytes, name: str, *arguments: Any) -> Loaded:
    """Run the file, and call one of its functions."""
    loader = _AsRead(path, raw)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        loader.exec_module(module)
        function: Callable[..., Any] | None = getattr(module, name, None)
        made = function(*arguments) if callable(function) else None
    except Exception as error:
        raise raised_by(error, path.name) from error
    if made is None or not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Task)):
        raise ConfigError(
            f"{path.name}: expected a function {name} that returns a Task and a data set",
            hint="site(data, training, seed) and coordinator(training, seed); docs/sites.md has an example",
        )
    return made


def check_example(example: Any) -> None:
    """Raises: DataError, ConfigError for an example that no model can be built from."""
    check_party("example", example, 1)
