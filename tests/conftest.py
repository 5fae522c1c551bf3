"""Where tests find known answers, which travel with the repository, and real data, which do not."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# Before torch and numpy are imported, and for the processes that tests start: workers of pytest share the cores, and
# threads of a pool that wait for one another spin. A test of small matrices took twenty times its own time so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The examples of properties are the same each time: what fails here failed there. `make test-all` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("searching")
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fixed")
settings.load_profile(PROFILE)

# Modules and tests are there to stay: no collection of garbage goes over them again, and what a test forks copies none.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


ROOT = Path(__file__).resolve().parent.parent


# So is what the operating system's generator gives to a test, and to each fixture: noise, keys, groups. A statistical
# test that passed once passes again, whatever its rate of false alarms. Processes that a test starts, and
# `make test-all`, have the real one.
_urandom, _streams = os.urandom, list[random.Random]()


def _from_stream(size: int, /) -> bytes:
    return _streams[-1].randbytes(size) if _streams else _urandom(size)


@contextlib.contextmanager
def _stream(of: str) -> Iterator[None]:
    _streams.append(random.Random(of))
    try:
        yield
    finally:
        _streams[-1:] = []


if PROFILE == "fixed":
    os.urandom = _from_stream
    random._urandom = _from_stream  # type: ignore[attr-defined]  # of `secrets`, SystemRandom and numpy's default_rng()
    os.register_at_fork(after_in_child=_streams.clear)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _stream(item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    with _stream(f"{request.node.nodeid} {fixturedef.argname} {getattr(request, 'param_index', 0)}"):
        return (yield)


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Known answers made by others. They are part of the repository: a missing file is an error, never a skip."""
    return ROOT / "tests" / "vectors"


@pytest.fixture(scope="session")
def data() -> Path:
    """``CHORAL_DATA`` names the folder; ``shared/data`` beside the repository is the default."""
    folder = Path(os.environ.get("CHORAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder} (set CHORAL_DATA)")
    return folder


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], ModuleType]:
    """A module of numba's once more, its functions left as the Python that they are written in (NUMBA_DISABLE_JIT).

    So errors that compiled code passes over in silence, an index beyond the end above all, are raised, and what
    measures coverage sees the lines. Slow: for small sizes.
    """

    def load(module: ModuleType) -> ModuleType:
        import numba

        spec = importlib.util.spec_from_file_location(f"{module.__name__}_uncompiled", str(module.__file__))
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        with monkeypatch.context() as patch:
            patch.setattr(numba.config, "DISABLE_JIT", 1)
            spec.loader.exec_module(loaded)
        return loaded

    return load


@pytest.fixture
def looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the model mixes records is looked at in the first of a test's many trainings of one model alone.

    The looks, some fifty forward passes each, are most of such a test; what they find has tests of its own.
    """
    from choral.privacy.record_independence import batch_mixing

    look, looked = batch_mixing.refuse_mixing, list[None]()

    def refuse_mixing(subject: batch_mixing.CheckedForward) -> object:
        looked.append(None)
        return look(subject) if len(looked) == 1 else (set(), set())

    monkeypatch.setattr(batch_mixing, "refuse_mixing", refuse_mixing)
