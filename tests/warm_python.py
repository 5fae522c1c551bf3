"""Python processes that begin with torch and Choral imported: forked from one that has them, in the place of started.

Importing takes longer than what most of them then do. They are processes all the same, with memory, files and an end
of their own, and are killed as any other. What a test says of imports, of memory, of the interpreter's options or of
the command as it is installed must start ``sys.executable`` instead.

    done = warm_python.run(["-c", code, "argument"], capture_output=True, text=True)      # as subprocess.run
    process = warm_python.start(["-m", "choral", "join", folder], stdout=log, env=...)    # as subprocess.Popen

Between test and process is a launcher, a small process that has the pipes, waits, and ends as the process did.
`make test-all` starts them as users would, and so does every system but Linux.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Only what a launcher needs stands above: it is to start in a hundredth of a second.


# ------------------------------------------------------------------------------------------------------- in the tests


class _Process(subprocess.Popen):  # type: ignore[type-arg]
    """Signals go to the process itself, not to its launcher, so that it is gone where the launcher is."""

    def __init__(self, words: list[str], pid_file: Path, **given: object) -> None:
        self._pid_file = pid_file
        super().__init__(words, **given)  # type: ignore[call-overload]

    def send_signal(self, number: int) -> None:
        end = time.monotonic() + 60
        while self.poll() is None and time.monotonic() < end:
            if text := self._pid_file.read_text() if self._pid_file.exists() else "":
                try:
                    os.kill(int(text), number)
                except ProcessLookupError:  # it has ended, and its launcher is about to
                    self.wait(60)
                return
            time.sleep(0.005)


class _Parent:
    """The process that all are forked from, of this process of pytest; started where it is first asked for."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._count = 0

    def words(self, words: list[str]) -> tuple[list[str], Path]:
        if self.process is None or self.process.poll() is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="warm")
            self._socket = Path(self._folder.name) / "s"
            command = [sys.executable, __file__, "serve", str(self._socket)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            atexit.register(self.close)
            while not self._socket.exists():
                assert self.process.poll() is None, "the process to fork from has ended"
                time.sleep(0.01)
        self._count += 1
        pid_file = Path(self._folder.name) / str(self._count)
        return [sys.executable, "-I", "-S", __file__, "launch", str(self._socket), str(pid_file), *words], pid_file

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(10)
        self._folder.cleanup()


_parent = _Parent()


def start(words: list[str], **given: object) -> subprocess.Popen:  # type: ignore[type-arg]
    """As ``subprocess.Popen([sys.executable, *words], ...)``. words: ``-c``, ``-m`` or a file, and arguments."""
    if not hasattr(os, "pidfd_open") or os.environ.get("HYPOTHESIS_PROFILE", "fixed") != "fixed":
        return subprocess.Popen([sys.executable, *map(str, words)], **given)  # type: ignore[call-overload]
    command, pid_file = _parent.words(list(map(str, words)))
    return _Process(command, pid_file, **given)


def run(
    words: list[str], *, capture_output: bool = False, check: bool = False, timeout: float = 240, **given: object
) -> subprocess.CompletedProcess:  # type: ignore[type-arg]
    """As ``subprocess.run([sys.executable, *words], ...)``."""
    if capture_output:
        given |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(words, **given) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess([sys.executable, *words], process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


# -------------------------------------------------------------------------------------------------------- the launcher


def _launch(path: str, pid_file: str, words: list[str]) -> None:
    """Have the process forked, pass SIGINT and SIGTERM on, and end as it does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        told = {"words": words, "pid_file": pid_file, "environment": dict(os.environ), "folder": os.getcwd()}
        text = json.dumps(told).encode()
        descriptors = array.array("i", [0, 1, 2])
        server.sendmsg([len(text).to_bytes(4)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        server.sendall(text)
        pid = int.from_bytes(server.recv(4))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        for descriptor in (0, 1, 2):
            os.close(descriptor)  # the process has them, and whoever reads is to see that it has closed them
        status = int.from_bytes(server.recv(4)) if pid else 1
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


# ------------------------------------------------------------------------------------------- the process that is forked


def _serve(path: str) -> tuple[dict[str, object], list[int]]:
    """Fork as asked, until standard input ends; returns in each child, with what it was told and its descriptors."""
    import selectors

    selector, running = selectors.DefaultSelector(), {}
    door = socket.socket(socket.AF_UNIX)
    door.bind(path)
    door.listen(64)
    selector.register(door, selectors.EVENT_READ, "door")
    selector.register(0, selectors.EVENT_READ, "end")
    while True:
        for key, _ in selector.select():
            if key.data == "end":
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.data == "door":
                asked, _ = door.accept()
                told, descriptors = _request(asked)
                if (pid := os.fork()) == 0:
                    selector.close()
                    door.close()
                    asked.close()
                    for other, process in running.values():
                        other.close()
                        os.close(process)
                    return told, descriptors
                for descriptor in descriptors:
                    os.close(descriptor)
                Path(told["pid_file"]).with_suffix(".new").write_text(str(pid))
                Path(told["pid_file"]).with_suffix(".new").rename(told["pid_file"])
                asked.sendall(pid.to_bytes(4))
                running[pid] = asked, (process := os.pidfd_open(pid))
                selector.register(process, selectors.EVENT_READ, pid)
                selector.register(asked, selectors.EVENT_READ, -pid)
            elif key.data < 0 and -key.data in running:  # the launcher is gone
                selector.unregister(key.fileobj)
                os.kill(-key.data, signal.SIGKILL)
            elif key.data in running:
                asked, process = running.pop(key.data)
                _, status = os.waitpid(key.data, 0)
                for one in (asked, process):
                    if one in selector.get_map():
                        selector.unregister(one)
                os.close(process)
                with contextlib.suppress(OSError):  # the launcher is gone
                    asked.sendall(status.to_bytes(4))
                asked.close()


def _request(asked: socket.socket) -> tuple[dict[str, object], list[int]]:
    length, more, _, _ = asked.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    descriptors = array.array("i", more[0][2])
    text = b""
    while len(text) < int.from_bytes(length):
        text += asked.recv(1 << 20)
    return json.loads(text), list(descriptors)


def _become(told: dict[str, object], descriptors: list[int]) -> None:
    """Run the words as a fresh interpreter would, and end as it would, but that the imported is not taken apart."""
    import threading

    code: object = 0
    try:
        _run(told, descriptors)
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(int(code or 0))


def _run(told: dict[str, object], descriptors: list[int]) -> None:
    import random
    import runpy

    import numpy as np

    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    if os.environ.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True, line_buffering=True)  # type: ignore[union-attr]
    random.seed()
    np.random.seed()
    kind, *words = told["words"]
    sys.path[0] = str(Path(kind).parent) if kind not in ("-c", "-m") else "" if kind == "-c" else os.getcwd()
    sys.path[1:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry and entry not in sys.path]
    if kind == "-c":
        sys.argv = ["-c", *words[1:]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        main.__builtins__ = __builtins__
        exec(compile(words[0], "<string>", "exec", dont_inherit=True), main.__dict__)  # noqa: S102
    elif kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *words]
        runpy.run_path(kind, run_name="__main__")


def _warm() -> None:
    """What nearly all of these processes import; the first step of an optimizer imports torch._dynamo."""
    import gc
    import importlib
    import logging
    import pkgutil
    import re

    names = ["torch._dynamo", "choral.privacy.per_sample.model"]
    for package in ("choral.cli", "choral.jobs", "choral.network", "choral.trainers"):
        found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        names += [one.name for one in found if not re.search("flower|nvflare|numba", one.name)]
    for name in names:
        with contextlib.suppress(ImportError):  # of what is not installed here
            importlib.import_module(name)
    logging.root.handlers.clear()  # Opacus makes one as it is imported, and a command's own would then be none
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        _launch(sys.argv[2], sys.argv[3], sys.argv[4:])
    _warm()
    _become(*_serve(sys.argv[2]))
