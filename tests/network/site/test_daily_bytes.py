"""A day's bytes: all that threads, forks and other processes count, and none beyond the most."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from choral.network.errors import SiteError
from choral.network.site.files.daily_bytes import DailyBytes

DAY, MOST = "2026-01-31", 10**9
COUNTING = """
import sys
from pathlib import Path
from choral.network.site.files.daily_bytes import DailyBytes
counter = DailyBytes(Path(sys.argv[1]))
print(all(counter.add(3, "2026-01-31", 10**9) for _ in range(400)))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bytes-today"


def counted(path: Path) -> int:
    return int(path.read_text().split()[1])


def test_threads_forks_and_other_processes_count_in_one_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, read = DailyBytes(path), os.pread

    def slowly(*given: int) -> bytes:
        found = read(*given)
        time.sleep(1e-5)  # others have their turn between reading and writing
        return found

    monkeypatch.setattr(os, "pread", slowly)
    assert counter.add(1, DAY, MOST)  # the file is open before the fork
    other = subprocess.Popen([sys.executable, "-c", COUNTING, str(path)], stdout=subprocess.PIPE, text=True)
    child = os.fork()
    if not child:
        os._exit(0 if all(counter.add(5, DAY, MOST) for _ in range(400)) else 1)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: counter.add(7, DAY, MOST), range(400)))
    assert os.waitpid(child, 0)[1] == 0
    assert other.communicate()[0] == "True\n"
    assert counted(path) == 1 + 400 * (3 + 5 + 7)


def test_no_more_than_the_most_and_a_new_day_begins_at_nothing(path: Path) -> None:
    counter = DailyBytes(path)
    assert counter.add(60, DAY, 100)
    assert not counter.add(41, DAY, 100)
    assert counted(path) == 60
    assert counter.add(40, DAY, 100)
    assert not DailyBytes(path).add(1, DAY, 100)  # after a restart, too
    assert counter.add(99, "2026-02-01", 100)
    assert path.read_text().split() == ["2026-02-01", f"{99:020d}"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_file_that_has_the_name_is_the_one_that_counts(path: Path) -> None:
    counter = DailyBytes(path)
    assert counter.add(60, DAY, 100)
    path.unlink()
    assert counter.add(70, DAY, 100)  # as the hint says: anew
    assert counted(path) == 70
    (path.parent / "other").write_text(f"{DAY} {95:020d}\n")
    (path.parent / "other").replace(path)
    assert not counter.add(6, DAY, 100)
    path.write_text(f"{DAY} many\n")
    with pytest.raises(SiteError, match="cannot be read"):
        counter.add(1, DAY, 100)
    path.unlink()
    path.mkdir()
    with pytest.raises(SiteError, match="cannot be written"):
        counter.add(1, DAY, 100)
