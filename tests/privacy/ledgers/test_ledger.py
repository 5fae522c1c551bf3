"""The ledger under crashes, several writers, damage and forgery."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from choral.errors import ConfigError
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import REPLACE_ONE, ZERO_OUT, ClientRelease, PoissonSampledGaussian
from choral.privacy.errors import LedgerError
from choral.privacy.ledgers.hash_chain import GENESIS, lines
from choral.privacy.ledgers.ledger import Ledger, as_ledger
from choral.privacy.ledgers.ledger_file import FORMAT, Header

EVENT = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.5, steps=10)
WRITER = """
import sys
import threading
from choral.privacy.errors import LedgerError
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.ledgers.ledger import Ledger
path, count = sys.argv[1], int(sys.argv[2])
ledger = Ledger(path)
ledger.bind("a", 1e-5)
print("ready", flush=True)
done = 0
while done < count:
    try:
        ledger.append(PoissonSampledGaussian(sample_rate=0.5, noise_multiplier=2.0, steps=1), after=len(ledger.events))
    except LedgerError as error:
        if "somebody else" not in str(error):
            raise
        continue
    done += 1
    print(done, flush=True)
"""


def written(path: Path, count: int = 3) -> Ledger:
    ledger = Ledger(path, holder="a")
    ledger.bind("a", 1e-5)
    for i in range(count):
        ledger.append(EVENT, after=i)
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def test_remembers(path: Path) -> None:
    written(path)
    again = Ledger(path)
    assert (again.holder, again.delta, again.events) == ("a", 1e-5, (EVENT,) * 3)
    assert again.epsilon(1e-5) == record_level.epsilon([EVENT] * 3, 1e-5)


def test_in_memory() -> None:
    ledger = Ledger()
    ledger.bind("a", 1e-5)
    ledger.append(EVENT, after=0)
    assert ledger.events == (EVENT,)
    with pytest.raises(LedgerError, match="somebody else"):
        ledger.append(EVENT, after=0)


def test_no_file_before_the_first_append(path: Path) -> None:
    Ledger(path, holder="a").bind("a", 1e-5)
    assert not path.exists()


def test_append_needs_a_holder(path: Path) -> None:
    with pytest.raises(LedgerError, match="no data owner"):
        Ledger(path, holder="a").append(EVENT, after=0)


def test_another_holder_is_refused(path: Path) -> None:
    written(path)
    with pytest.raises(LedgerError, match="belongs to 'a'"):
        Ledger(path, holder="b")
    with pytest.raises(LedgerError, match="belongs to 'a'"):
        Ledger(path).bind("b", 1e-5)


def test_another_delta_is_refused(path: Path) -> None:
    written(path)
    with pytest.raises(LedgerError, match="delta"):
        Ledger(path).bind("a", 1e-6)


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ({"holder": ""}, "holder is ''"),
        ({"holder": 5}, "holder is 5"),
        ({"unit": "house"}, "unit is 'house', expected one of record, client"),
        ({"neighbours": "add or remove one record"}, "neighbours is 'add or remove"),
        ({"delta": 0.0}, "delta is 0"),
    ],
)
def test_what_a_ledger_is_not_bound_to(bound: dict[str, Any], said: str) -> None:
    ledger = Ledger()
    with pytest.raises(ConfigError, match=said):
        ledger.bind(**{"holder": "a", "delta": 1e-5, **bound})
    with pytest.raises(LedgerError, match="no data owner"):
        ledger.append(EVENT, after=0)


def test_one_relation_for_the_life_of_the_data(path: Path) -> None:
    written(path)
    for ledger in (Ledger(path), Ledger()):
        ledger.bind("a", 1e-5, neighbours=ZERO_OUT)
        ledger.bind("a", 1e-5)
        with pytest.raises(LedgerError, match="is for the neighbours 'zero out one record', not 'replace one record'"):
            ledger.bind("a", 1e-5, neighbours=REPLACE_ONE)


def test_a_file_that_another_holder_began_meanwhile_is_not_written_to(path: Path) -> None:
    first, second = Ledger(path), Ledger(path)
    first.bind("a", 1e-5)
    second.bind("b", 1e-5)
    first.append(EVENT, after=0)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="was begun for another owner or delta meanwhile"):
        second.append(EVENT, after=1)
    assert path.read_bytes() == before


def test_only_an_event_is_appended(path: Path) -> None:
    ledger = written(path)
    with pytest.raises(LedgerError, match="a str is no event of a ledger"):
        ledger.append("event", after=len(ledger.events))  # type: ignore[arg-type]


def test_a_ledger_is_sent_to_another_process_as_its_file_or_not_at_all(path: Path) -> None:
    with pytest.raises(LedgerError, match="a ledger in memory cannot be pickled"):
        pickle.dumps(Ledger())
    written(path)
    assert pickle.loads(pickle.dumps(Ledger(path))).events == Ledger(path).events  # noqa: S301


def test_each_line_is_synced_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(os.fstat(fd).st_size), real(fd))[1])
    written(path, 2)
    assert path.stat().st_size in sizes


def test_the_file_and_its_name_are_on_disk_when_the_first_append_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = [], os.fsync

    def noted(file: int) -> None:
        synced.append((os.fstat(file).st_ino, os.fstat(file).st_size, path.exists()))
        real(file)

    monkeypatch.setattr(os, "fsync", noted)
    written(path, 1)
    assert synced[0] == (path.stat().st_ino, path.stat().st_size, False)  # all of it, before it has its name
    assert [(inode, named) for inode, _, named in synced[1:]] == [(path.parent.stat().st_ino, True)]


def test_a_ledger_is_its_owners_to_read(path: Path) -> None:
    written(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_of_two_that_begin_a_file_at_once_one_is_refused_and_nothing_is_lost(path: Path) -> None:
    """Neither saw a file when it bound; the second must not take the first one's event for its own."""
    one, other = Ledger(path, holder="a"), Ledger(path, holder="a")
    for ledger in (one, other):
        ledger.bind("a", 1e-5)
    one.append(EVENT, after=0)
    with pytest.raises(LedgerError, match="1 events, expected 0: somebody else has spent from it"):
        other.append(EVENT, after=0)
    assert list(path.parent.iterdir()) == [path]
    other.append(EVENT, after=1)
    assert Ledger(path).events == one.events == (EVENT, EVENT)


def test_the_head_after_each_number_of_events(path: Path) -> None:
    ledger = Ledger(path, holder="a")
    ledger.bind("a", 1e-5)
    assert ledger.head_after(0) == "0" * 64
    heads = []
    for number in range(3):
        ledger.append(EVENT, after=number)
        heads.append(ledger.head)
    assert [ledger.head_after(number) for number in range(4)] == ["0" * 64, *heads]
    for number in (-1, 4):
        with pytest.raises(LedgerError, match=f"holds 3 events, expected at least {number}"):
            ledger.head_after(number)


def test_a_ledger_that_was_carried_is_of_its_holder_and_not_empty(path: Path) -> None:
    ledger = written(path)
    assert Ledger.read(ledger.written(), holder="a").events == ledger.events
    with pytest.raises(LedgerError, match="belongs to 'a', not to 'b'"):
        Ledger.read(ledger.written(), holder="b")
    for content in (b"", path.read_bytes().splitlines(keepends=True)[0]):
        with pytest.raises(LedgerError, match="holds no event"):
            Ledger.read(content, holder="a")


@pytest.mark.parametrize("given", [7, b"ledger.jsonl", ["ledger.jsonl"]])
def test_what_is_no_place_for_a_ledger_is_refused_by_its_type(given: Any) -> None:
    with pytest.raises(ConfigError, match=f"ledger is a {type(given).__name__}"):
        as_ledger(given)
    with pytest.raises(ConfigError, match=f"path is a {type(given).__name__}"):
        Ledger(given)


def test_an_event_of_another_unit_is_refused_wherever_it_comes_from(path: Path) -> None:
    release = ClientRelease(mechanism="gaussian", sensitivity_squared=1, share_variance=1.0, shares=3, length=1)
    ledger = written(path)
    with pytest.raises(LedgerError, match="for each record, not for each client"):
        ledger.append(release, after=3)
    header = ledger._header
    assert header is not None
    content, _ = lines(GENESIS, (header, EVENT, release))
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="line 3: an event of another unit"):
        Ledger(path).events  # noqa: B018 - reading it is what is refused


def test_a_cut_leaves_whole_events_or_is_mended(path: Path) -> None:
    """Cut the file here and there, as a crash within write() may: acknowledged events survive, the torn tail goes.

    Cut within its first event, with which it comes into being, it is not what a crash leaves, and is refused.
    """
    written(path)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in sorted(
        {*range(0, len(content), 7), *(end + d for end in ends for d in (-2, -1, 0, 1))}
        - {len(content), len(content) + 1}
    ):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        if whole < 2:
            with pytest.raises(LedgerError, match="holds no event"):
                Ledger(path)
            continue
        ledger = Ledger(path)
        assert len(ledger.events) == max(whole - 1, 0)  # the first line is the header
        ledger.bind("a", 1e-5)
        ledger.append(EVENT, after=len(ledger.events))
        assert len(Ledger(path).events) == max(whole - 1, 0) + 1


def test_a_flipped_bit_is_noticed(path: Path) -> None:
    written(path, 2)
    content = path.read_bytes()
    for position in range(0, len(content) - 1, 3):  # the last newline's loss is a torn line
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(LedgerError):
            Ledger(path)


@pytest.mark.parametrize(
    "forge", ["drop", "swap", "edit", "edit last", "duplicate", "empty line", "header twice", "spaces"]
)
def test_forgeries_are_refused(path: Path, forge: str) -> None:
    written(path)
    lines = path.read_text().splitlines()
    if forge == "drop":
        del lines[1]
    elif forge == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    elif forge == "edit":
        lines[1] = lines[1].replace('"steps":10', '"steps":1')
    elif forge == "edit last":
        lines[-1] = lines[-1].replace('"steps":10', '"steps":1')
    elif forge == "duplicate":
        lines.append(lines[-1])
    elif forge == "empty line":
        lines.insert(2, "")
    elif forge == "header twice":
        lines.insert(1, lines[0])
    else:
        lines[1] = json.dumps(json.loads(lines[1]))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError) as caught:
        Ledger(path)
    assert "Nothing was spent" in caught.value.hint


HEADER = Header(format=FORMAT, holder="a", delta=1e-5, unit="record", neighbours=ZERO_OUT)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ((HEADER, EVENT, replace(HEADER, holder="b")), "line 3: the chain of hashes is broken"),
        ((EVENT, EVENT), "line 1: the chain of hashes is broken"),
        ((replace(HEADER, format="choral ledger 2"), EVENT), "of another format"),
        ((replace(HEADER, neighbours="none"), EVENT), "of another format"),
        ((replace(HEADER, unit="client"), EVENT), "of another format"),
        ((replace(HEADER, unit="house"), EVENT), "of another format"),
    ],
)
def test_lines_that_are_chained_rightly_and_make_no_ledger_are_refused(
    entries: tuple[Any, ...], said: str, path: Path
) -> None:
    path.write_bytes(lines(GENESIS, (HEADER, EVENT))[0])
    assert Ledger(path).holder == "a"
    path.write_bytes(lines(GENESIS, entries)[0])
    with pytest.raises(LedgerError, match=said):
        Ledger(path)


def test_a_foreign_file_is_refused_and_left_alone(path: Path) -> None:
    path.write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(LedgerError, match="not a line of a ledger"):
        Ledger(path)
    assert path.read_text() == "epoch,loss\n1,0.5\n"


def test_a_file_that_vanishes_or_shrinks_in_use_is_refused(path: Path) -> None:
    ledger = written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(LedgerError, match="rewritten"):
        ledger.append(EVENT, after=3)
    path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        _ = ledger.events


def test_an_emptied_file_is_refused(path: Path) -> None:
    """It must not read as no spending."""
    ledger = Ledger(path, holder="a")
    ledger.bind("a", 1e-5)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="holds no event") as caught:
        Ledger(path)
    assert "backup" in caught.value.hint
    with pytest.raises(LedgerError, match="holds no event"):
        ledger.append(EVENT, after=0)
    assert path.read_bytes() == b""


def test_the_first_append_makes_the_whole_file_or_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before it is on disk: there is no file, rather than an empty one that could not be told from damage."""
    ledger = Ledger(path, holder="a")
    ledger.bind("a", 1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.append(EVENT, after=0)
    assert list(path.parent.iterdir()) == []
    ledger.append(EVENT, after=0)
    assert list(path.parent.iterdir()) == [path]
    assert Ledger(path).events == (EVENT,)


def test_the_head_tells_a_shrunken_ledger(path: Path) -> None:
    """A file cut at a line's end verifies; who kept the head sees that it is not the one."""
    assert Ledger(path).head == "0" * 64
    ledger = written(path)
    heads = [json.loads(line)["digest"] for line in path.read_text().splitlines()]
    assert ledger.head == Ledger(path).head == heads[-1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert Ledger(path).head == heads[-2] != heads[-1]
    memory = Ledger(holder="a")
    memory.bind("a", 1e-5)
    for i in range(3):
        memory.append(EVENT, after=i)
    assert memory.head == heads[-1]


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "missing" / "a.jsonl", holder="a")
    ledger.bind("a", 1e-5)
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger.append(EVENT, after=0)


def test_kill_9_loses_nothing_that_was_acknowledged(path: Path) -> None:
    for _ in range(3):
        before = len(Ledger(path).events)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), "1000000"], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.2)
        writer.send_signal(signal.SIGKILL)
        acknowledged = [line for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        writer.wait()
        writer.stdout.close()
        after = len(Ledger(path).events)
        assert after - before >= int(acknowledged[-1]) > 0
        assert after - before <= int(acknowledged[-1]) + 1


def test_two_writers_lose_nothing(path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), "60"], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert len(Ledger(path).events) == 120


HOLDING = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.flock(file, fcntl.LOCK_SH if sys.argv[2] == "reading" else fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("other", "own"),
    [("reading", "writes"), ("writing", "writes"), ("writing", "reads")],
    ids=["a reader, a writer", "two writers", "a writer, a reader"],
)
def test_a_writer_waits_for_all_others_and_a_reader_for_writers(path: Path, other: str, own: str) -> None:
    """Another process holds the file: what must not happen meanwhile happens only after it has let go."""
    ledger = written(path, 1)
    before = path.read_bytes()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(path), other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    done: list[int] = []

    def act() -> None:
        if own == "writes":
            ledger.append(EVENT, after=1)
        done.append(len(Ledger(path).events if own == "reads" else ledger.events))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join(0.5)
    assert (done, path.read_bytes()) == ([], before)
    holder.communicate("let go\n", timeout=60)
    thread.join(60)
    assert done == [2 if own == "writes" else 1]


def test_readers_do_not_wait_for_each_other(path: Path) -> None:
    written(path, 1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(path), "reading"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(Ledger(path).events)))
    thread.start()
    thread.join(30)
    assert found == [1]
    holder.communicate("let go\n", timeout=60)
