from __future__ import annotations

import gzip
import hashlib
import os
import socket
from pathlib import Path

import pytest

from choral.errors import DataError
from choral.trainers.data.sets import sources
from choral.trainers.data.sets.sources import Source, read

CONTENT = b"a,b\n1,2\n" * 50
SOURCE = Source(
    folder="set",
    name="rows.csv",
    url="https://data.invalid/rows.csv.gz",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / "set").mkdir(exist_ok=True)
    (folder / "set" / name).write_bytes(content)


@pytest.mark.parametrize(("name", "content"), [("rows.csv", CONTENT), ("rows.csv.gz", gzip.compress(CONTENT, mtime=0))])
def test_plain_or_packed(tmp_path, name, content):
    put(tmp_path, name, content)
    assert read(SOURCE, tmp_path) == CONTENT


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.csv", CONTENT[:-1] + b"x", "not the expected"),
        ("rows.csv", CONTENT + b"x", "not the expected"),
        ("rows.csv", b"", "not the expected"),
        ("rows.csv.gz", gzip.compress(CONTENT, mtime=0)[:-12], "cannot read"),
        ("rows.csv.gz", b"no gzip", "cannot read"),
        ("rows.csv.gz", gzip.compress(CONTENT + bytes(10_000_000), mtime=0), "not the expected"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, says):
    put(tmp_path, name, content)
    with pytest.raises(DataError, match=says):
        read(SOURCE, tmp_path)


def test_a_given_folder_without_the_file_is_named_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(DataError, match=r"rows\.csv") as caught:
        read(SOURCE, tmp_path)
    assert SOURCE.url in caught.value.hint


class TestFetching:
    """Over the real client; only the connection is ours."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        self.kept = tmp_path / "choral" / "set" / "rows.csv"

    def test_no_internet_names_path_and_url(self, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise OSError("no route")

        monkeypatch.setattr(socket, "create_connection", refuse)
        with pytest.raises(DataError, match="cannot be fetched") as caught:
            read(SOURCE)
        assert str(self.kept) in str(caught.value)
        assert SOURCE.url in str(caught.value)

    def test_what_is_fetched_is_checked_and_kept(self, monkeypatch):
        monkeypatch.setattr(sources, "_fetch", lambda *_: gzip.compress(CONTENT, mtime=0))
        assert read(SOURCE) == CONTENT
        assert self.kept.read_bytes() == CONTENT
        monkeypatch.setattr(sources, "_fetch", lambda *_: pytest.fail("fetched twice"))
        assert read(SOURCE) == CONTENT

    @pytest.mark.parametrize(
        "given",
        [CONTENT[:-1], gzip.compress(CONTENT + b"x", mtime=0), b"\x1f\x8bno", b"<html>"],
        ids=["cut", "longer", "no gzip", "a page"],
    )
    def test_what_fails_the_check_is_not_kept(self, monkeypatch, given):
        monkeypatch.setattr(sources, "_fetch", lambda *_: given)
        with pytest.raises(DataError):
            read(SOURCE)
        assert not self.kept.exists()

    def test_only_https(self):
        other = Source(**{**vars(SOURCE), "url": "file:///etc/hostname"})
        with pytest.raises(DataError, match="not https"):
            read(other)


def test_importing_opens_no_connection():
    """In a process of its own, which dies at the first connection, as the second run shows."""
    import subprocess
    import sys

    watch = "import os, socket, sys; sys.addaudithook(lambda event, _: event == 'socket.connect' and os._exit(9))\n"
    for code, expected in [("import choral.trainers.data", 0), ("socket.create_connection(('127.0.0.1', 9))", 9)]:
        found = subprocess.run([sys.executable, "-c", watch + code], check=False, env=os.environ)
        assert found.returncode == expected
