"""Real processes of sites by `choral join`, and the words of a coordinator's `choral serve`."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import warm_python
from site_federation import NO_PROMISE, Federation, approved_at, offer_for, toml_of, write_directory

from choral.jobs.settings import Settings
from choral.network import Directory, make_identity
from choral.network.site.files.directory import Pinned

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PATIENT = 120.0  # seconds until anything that is waited for must have come


class Proxy:
    """An HTTP proxy that knows CONNECT alone. asked: the first line of each request."""

    def __init__(self) -> None:
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port, self.asked = self._door.getsockname()[1], list[str]()
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                inside, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(inside,), daemon=True).start()

    def _serve(self, inside: socket.socket) -> None:
        with contextlib.suppress(OSError), inside:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (part := inside.recv(4096)):
                    return
                head += part
            self.asked.append(head.decode().partition("\r\n")[0])
            host, _, port = self.asked[-1].split(" ")[1].rpartition(":")
            with socket.create_connection((host, int(port))) as outside:
                inside.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=self._pass, args=(outside, inside), daemon=True)
                back.start()
                self._pass(inside, outside)
                back.join()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := one.recv(1 << 16):
                other.sendall(part)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._door.close()


class Processes:
    """The sites' processes, and what of the coordinator is on disk.

    prefix: words before those of each site's command. environment: of the sites' processes. running: start them. warm:
    forked where torch is imported already, unless their command or their environment is another than usual.
    promise: of their data, as site.toml says it.
    """

    def __init__(
        self,
        path: Path,
        *,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] = ENVIRONMENT,
        running: bool = True,
        warm: bool = True,
        promise: str = NO_PROMISE,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.federation = Federation(path, port=port, promise=promise)
        self.path, self.port = path, port
        self.sites: dict[str, subprocess.Popen[bytes]] = {}
        write_directory(self.federation)
        self._prefix, self._environment = prefix, environment
        self._warm = warm and not prefix and environment is ENVIRONMENT
        for name in self.federation.names if running else ():
            self.start(name)

    def start(self, name: str) -> None:
        words = ["-m", "choral", "join", str(self.path / name)]
        with (self.path / f"{name}.log").open("ab") as log:
            given: Any = {"stdout": log, "stderr": log, "env": self._environment, "cwd": self.path}
            if self._warm:
                self.sites[name] = warm_python.start(words, **given)
            else:
                self.sites[name] = subprocess.Popen([*self._prefix, sys.executable, *words], **given)

    def kill(self, name: str) -> None:
        self.sites[name].kill()
        self.sites[name].wait()

    def close(self) -> None:
        for process in self.sites.values():
            process.kill()
            process.wait()

    def log(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text()

    def job(self, name: str, settings: Settings, *, approve: bool = True) -> list[str]:
        """Write a job file, have it approved, and give the words of its command."""
        named = replace(settings, serve=replace(settings.serve, job=name))
        if approve:
            offer = offer_for(self.federation, named)
            for site in self.federation.names:
                approved_at(self.federation, site, offer)
        job = self.path / f"{name}.toml"
        job.write_text(toml_of(named))
        out, directory = self.path / f"run-{name}", self.path / "directory.toml"
        return [
            "serve", str(job), "--out", str(out), "--directory", str(directory),
            "--serve.identity", str(self.path / "hub" / "hub.crt"),
            "--serve.host", "127.0.0.1", "--serve.port", str(self.port),
        ]  # fmt: skip

    @contextmanager
    def paused(self, name: str, number: int) -> Iterator[None]:
        """The site's training stops in that round, for as long."""
        (self.path / name / "state" / "in-fit").unlink(missing_ok=True)
        path = self.path / name / "state" / f"pause-{number}"
        path.touch(0o600)
        try:
            yield
        finally:
            path.unlink()

    def in_fit(self, name: str) -> str:
        path = self.path / name / "state" / "in-fit"
        return path.read_text() if path.exists() else ""

    def settings(self, **changed: object) -> Settings:
        made = self.federation.settings(**changed)
        return replace(made, serve=replace(made.serve, wait=PATIENT, training=PATIENT, step=20.0, away=4.0))


def until(found: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENT
    while not found():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.02)


def below(parent: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(above, []).append(int(entry.name))
    found, waiting = [], [parent]
    while waiting:
        found += (next_ones := children.get(waiting.pop(), []))
        waiting += next_ones
    return found


@contextmanager
def pinned_wrong(federation: Federation, name: str, other: str) -> Iterator[None]:
    """The site has pinned another key for that site, or for its coordinator. Its process is to be started anew."""
    path = federation.path / name / "directory.toml"
    right, pinned = path.read_bytes(), Pinned.read(path)
    wrong = make_identity(federation.path / f"not-{other}", other).certificate
    sites, coordinators = (
        Directory([wrong if each.name == other else each for each in known])
        for known in (pinned.sites, pinned.coordinators)
    )
    Pinned(sites=sites, coordinators=coordinators).write(path)
    try:
        yield
    finally:
        path.write_bytes(right)
        shutil.rmtree(federation.path / f"not-{other}")
