"""Which code a training runs, as text that is equal wherever the same files are run."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from choral.trainers.run_folder.info import versions
from choral.trainers.task.task import Task

_PURPOSE = b"choral task code 1"
_OURS = "choral."


def version_here() -> str:
    """Choral's, with which the text of :func:`code_of` begins: all of it before the comma."""
    return f"choral {versions()['choral']}"


def code_of(task: Task) -> str:
    """Choral's version, and the SHA-256 of the source of what a party calls: ``build``, ``fit`` and ``loss``.

    Of each the whole file that defines it, so that its neighbours there count, too; of a notebook, where there is no
    file, its own lines. Choral's own functions are named, and their code is the version's. Not covered: other files
    that are imported, values that a function was made with, and data. A task of which some source cannot be read (typed
    at a prompt, say, or compiled) is said to be of unknown source.
    """
    sources = {role: _source(getattr(task, role)) for role in ("build", "fit", "loss")}
    if None in sources.values():
        return f"{version_here()}, task of unknown source"
    digest = hashlib.sha256(_PURPOSE + msgspec.json.encode(sources, order="deterministic"))
    return f"{version_here()}, task sha256:{digest.hexdigest()}"


def _source(called: Callable[..., Any] | None) -> tuple[str, str] | None:
    """Its name, and the digest of the source; None where that cannot be read."""
    if called is None:
        return "", ""
    function = _function(called)
    name = getattr(function, "__qualname__", "")
    if (module := str(getattr(function, "__module__", ""))).startswith(_OURS):
        return f"{module}.{name}", ""
    try:
        file = inspect.getsourcefile(function)
        on_disk = file is not None and Path(file).is_file()
        raw = Path(str(file)).read_bytes() if on_disk else inspect.getsource(function).encode()
    except (OSError, TypeError):
        return None
    return name, hashlib.sha256(raw).hexdigest()


def _function(called: Any) -> Any:
    """The function that runs in the end: of a partial, of a method, of a decorated one, of an object's call."""
    while isinstance(called, functools.partial):
        called = called.func
    called = inspect.unwrap(called)
    return called if inspect.isroutine(called) or inspect.isclass(called) else type(called).__call__
