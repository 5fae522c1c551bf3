"""Ledgers that cannot be written: a clear error, nothing spent or drawn, and the next append finds a valid file."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from choral.privacy import ClientPrivacy, ClientPrivacyEngine, Ledger, LedgerError, Privacy, PrivacyEngine
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.dpsgd import poisson_loader, private_optimizer
from choral.privacy.ledgers import hash_chain, ledger_file
from choral.privacy.noise.gaussian import os_stream

EVENT = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.5, steps=10)


@contextlib.contextmanager
def room_until(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow past `size` bytes: what fits of a write is written, then EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def written(path: Path, count: int = 2) -> Ledger:
    ledger = Ledger(path, holder="a")
    ledger.bind("a", 1e-5)
    for i in range(count):
        ledger.append(EVENT, after=i)
    return ledger


def refused(ledger: Ledger, known: int, said: str = "cannot be written") -> None:
    with pytest.raises(LedgerError, match=said) as caught:
        ledger.append(EVENT, after=known)
    assert "Nothing was released" in caught.value.hint
    assert len(ledger.events) == known


def usable(ledger: Ledger, path: Path, known: int) -> None:
    """Both the object and the file go on from `known` events."""
    assert len(Ledger(path).events) == known
    ledger.append(EVENT, after=known)
    assert Ledger(path).events == (EVENT,) * (known + 1)


@pytest.mark.parametrize("room", [0, 1, 60, -1], ids=["none", "a byte", "part of a line", "all but a byte"])
def test_a_file_that_cannot_grow(path: Path, room: int) -> None:
    ledger = written(path)
    before = path.read_bytes()
    line = len(before.splitlines(keepends=True)[-1])
    for _ in range(2):
        with room_until(len(before) + room % line):
            refused(ledger, 2, "cannot be written: File too large")
        assert path.read_bytes() == before
    usable(ledger, path, 2)


def test_a_first_append_without_room_leaves_no_file(path: Path) -> None:
    ledger = written(path, 0)
    with room_until(100):
        refused(ledger, 0, "cannot be written: File too large")
    assert list(path.parent.iterdir()) == []
    ledger.append(EVENT, after=0)
    assert Ledger(path).events == (EVENT,)


@pytest.mark.parametrize("fault", ["after half a line", "on the way to the disk"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=["full", "broken", "quota"])
def test_a_full_or_broken_disk(path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, number: int) -> None:
    """Delayed allocation and networks tell of a full disk in fsync, when the whole line seems to be there."""
    ledger = written(path)
    before, write = path.read_bytes(), os.pwrite
    halves: list[int] = []

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    def half(file: int, data: Any, place: int) -> int:
        return fail() if halves else halves.append(1) or write(file, data[: len(data) // 2], place)

    with monkeypatch.context() as patch:
        patch.setattr(os, *(("pwrite", half) if fault == "after half a line" else ("fsync", fail)))
        refused(ledger, 2, os.strerror(number))
    assert path.read_bytes() == before
    usable(ledger, path, 2)


def test_what_is_taken_back_is_gone_from_the_disk_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole line whose fsync failed may be on the disk: were the cut not synced, a crash would bring it back."""
    ledger = written(path)
    size, synced, real = path.stat().st_size, [], os.fsync

    def first_fails(file: int) -> None:
        synced.append(os.fstat(file).st_size)
        if len(synced) == 1:
            raise OSError(errno.EIO, "broken")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", first_fails)
        refused(ledger, 2)
    assert synced[0] > size
    assert synced[1:] == [size]


def test_a_torn_line_that_cannot_be_taken_back_is_not_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = written(path)
    size, truncate, calls = path.stat().st_size, os.ftruncate, []

    def once(file: int, length: int) -> None:
        calls.append(length)
        if len(calls) > 1:
            raise OSError(errno.EIO, "broken")
        truncate(file, length)

    with monkeypatch.context() as patch, room_until(size + 40):
        patch.setattr(os, "ftruncate", once)
        refused(ledger, 2)
    assert path.stat().st_size == size + 40
    usable(ledger, path, 2)


def test_no_noise_is_drawn_and_nobody_is_sampled_for_what_was_not_written(
    problem: Any, loop: Callable[..., int], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    noise, sample = private_optimizer.grid_gaussian, poisson_loader.poisson_sample
    monkeypatch.setattr(private_optimizer, "grid_gaussian", lambda *args: drawn.append("noise") or noise(*args))
    monkeypatch.setattr(poisson_loader, "poisson_sample", lambda *args: drawn.append("sample") or sample(*args))
    privacy = Privacy(epsilon=5.0, delta=1e-3, epochs=2)
    engine = PrivacyEngine(privacy, holder="a", ledger=Ledger(path), passes=2)
    model = problem.model()
    wrapped = engine.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
    for known in (0, 1):
        with room_until((path.stat().st_size if known else 0) + 50), pytest.raises(LedgerError, match="be written"):
            loop(*wrapped)
        assert drawn == []
        assert len(engine.ledger.events) == known
        loop(*wrapped)
        assert len(Ledger(path).events) == known + 1
        assert {"noise", "sample"} == set(drawn)
        drawn.clear()
    assert engine.spent().epsilon <= 5.0


def test_no_sum_of_clients_is_begun_that_was_not_written(path: Path) -> None:
    drawn: list[int] = []

    def source(count: int) -> bytes:
        drawn.append(count)
        return os_stream(count)

    privacy = ClientPrivacy(epsilon=6.0, delta=1e-5, min_survivors=12)
    engine = ClientPrivacyEngine(privacy, clients=20, length=5, rounds=1, ledger=Ledger(path), source=source)
    with room_until(50), pytest.raises(LedgerError, match="cannot be written"):
        engine.begin()
    assert (drawn, engine.ledger.releases, path.exists()) == ([], (), False)
    engine.begin()  # the round that was planned is still to be had
    assert len(Ledger(path).releases) == 1


def test_places_that_are_no_place_for_a_ledger(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for wrong, said in ((file / "a.jsonl", "Not a directory"), (tmp_path, "Is a directory")):
        with pytest.raises(LedgerError, match=f"cannot be read: {said}") as caught:
            Ledger(wrong)
        assert "Nothing was spent" in caught.value.hint
    assert file.read_text() == "not a folder"


READ_ONLY = """
import os, sys
from choral.privacy.errors import LedgerError
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.ledgers.ledger import Ledger
if os.getuid() == 0:  # whom permissions do not bind
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name, known in (("old.jsonl", 2), ("new.jsonl", 0)):
    ledger = Ledger(os.path.join(sys.argv[1], name), holder="a")
    ledger.bind("a", 1e-5)
    try:
        ledger.append(PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.5, steps=10), after=known)
    except LedgerError as error:
        print(len(ledger.events), error, "|", error.hint)
"""


def test_a_folder_and_a_file_that_may_not_be_written() -> None:
    folder = Path(tempfile.mkdtemp())  # not pytest's, which nobody else may enter
    try:
        written(folder / "old.jsonl")
        before = (folder / "old.jsonl").read_bytes()
        (folder / "old.jsonl").chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(folder)], capture_output=True, text=True, check=False
        )
        if "PermissionError" in done.stderr and not done.stdout:
            pytest.skip("this Python may be run by root alone")
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["2", "0"], done.stderr
        assert all("cannot be written: Permission denied" in line and "Nothing was released" in line for line in lines)
        assert [entry.name for entry in folder.iterdir()] == ["old.jsonl"]
        assert (folder / "old.jsonl").read_bytes() == before
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_only_what_follows_is_decoded_and_an_edit_before_it_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.bind("a", 1e-5)
    event = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=2.0, steps=1)
    decoded = []

    def counted(content: bytes, *rest: Any) -> Any:
        decoded.append(content.count(b"\n"))
        return hash_chain.follow(content, *rest)

    monkeypatch.setattr(ledger_file, "follow", counted)
    for place in range(20):
        ledger.append(event, after=place)
    assert max(decoded) == 2  # the header and the first event
    assert sum(decoded) == 21
    edited = path.read_bytes().replace(b'"steps":1}', b'"steps":2}', 1)
    path.write_bytes(edited)
    with pytest.raises(LedgerError, match="line 2"):
        ledger.append(event, after=20)
    assert path.read_bytes() == edited
