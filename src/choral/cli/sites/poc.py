"""``choral poc``: a job with sites, rehearsed on one machine by real processes.

The coordinator is `choral serve`, each site is `choral join`, each a process of its own with its own files; between
them is mutual TLS. They end with this command, whatever ends it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from choral.cli.arguments import parse_with_config
from choral.jobs.rehearsal import (
    RehearsedSites,
    approve_training,
    gather_receipts,
    ledger_of,
    make_rehearsal,
    reopen_rehearsal,
)
from choral.jobs.settings import Settings, read_job
from choral.locks import refuse_without_locks
from choral.network.errors import SiteError
from choral.privacy.accounting.budget import at_least, shown

_LAST_LINES, _PATIENCE, _SECONDS_TO_END = 15, 60, 10
_SAYS = """\
This was a rehearsal: one machine, one user, who holds every key and gave every
approval. It shows that the job runs, and protects nobody from anybody.
docs/deployment.md has the steps for real sites."""


@dataclass(frozen=True, kw_only=True)
class PocFlags:
    """Rehearse a job with sites on this machine: keys, folders, approvals, a process for each site, one report.

    The coordinator runs `choral serve`, each site `choral join`, as they would on machines of their own. DIR keeps all
    of it: what was served (job.toml), each site's folder, each process's log, the run and its report.

    Every key of CONFIG is a flag of the same name below; the flag wins.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """TOML file with the settings, e.g. examples/digits.toml."""
    out: Path
    """Folder for everything; must be new or empty, unless --resume."""
    sites: int | None = None
    """How many sites, for a task that comes with Choral: its data is split among them. By default 3."""
    data: Path | None = None
    """For training code in a file: a folder with a file or a folder for each site, named after the site."""
    resume: bool = False
    """Go on with the rehearsal that the folder holds."""
    json: bool = False
    """Print the coordinator's audit and what each site spent by its own ledger as JSON, in the place of the summary."""
    quiet: bool = False
    """No progress and no summary, only errors."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


def poc(words: list[str]) -> int:
    wanted = parse_with_config("poc", words, PocFlags, read_job, "out")
    refuse_without_locks(str(wanted.out))
    if wanted.resume:
        rehearsal = reopen_rehearsal(wanted.settings, wanted.out)
    else:
        rehearsal = make_rehearsal(
            wanted.settings, wanted.out, job=wanted.config.stem, sites=wanted.sites, data=wanted.data
        )
    quiet = wanted.quiet or wanted.json
    if not quiet:
        _say(f"made keys, folders and approvals of {', '.join(rehearsal.names)} in {rehearsal.path}")
    if code := _run(rehearsal, resume=wanted.resume, quiet=quiet):
        return code
    code = _report(rehearsal, quiet=quiet, as_json=wanted.json)
    if not quiet:
        print(f"report: {rehearsal.run / 'report.html'}")
        print(f"a site's own log: choral site log --site {shlex.quote(str(rehearsal.site(rehearsal.names[0])))}")
        print(f"\n{_SAYS}")
    return code


def _report(rehearsal: RehearsedSites, *, quiet: bool, as_json: bool) -> int:
    """The coordinator's audit, and beside it what it never sees: the sites' ledgers. 1 if a claim is violated."""
    from choral.audits import audit
    from choral.audits.report.storage import as_json as encoded
    from choral.trainers import Run

    gather_receipts(rehearsal)
    result = audit(Run.load(rehearsal.run))
    for name in ("report.json", "report.html"):
        result.save(rehearsal.run / name)
    spent = {name: ledger_of(rehearsal, name) for name in rehearsal.names}
    if as_json:
        sites = {name: cost and {"epsilon": cost[0], "promised": cost[1]} for name, cost in spent.items()}
        folder = str(rehearsal.run)
        print(json.dumps({"folder": folder, "sites": sites, "report": json.loads(encoded(result))}, indent=1))
    if not quiet:
        result.print()
        for name, cost in spent.items():
            if cost is not None:
                print(f"{name}, by its own ledger: {at_least(cost[0])} spent of epsilon {shown(cost[1])}")
    return int(result.verdict == "violated" or any(cost is not None and cost[0] > cost[1] for cost in spent.values()))


def _run(rehearsal: RehearsedSites, *, resume: bool, quiet: bool) -> int:
    """Raises: SiteError if a site's process ends before the coordinator's."""
    serve = ["serve", str(rehearsal.job), "--directory", str(rehearsal.directory), "--out", str(rehearsal.run)]
    serve += [flag for flag, given in (("--resume", resume), ("--quiet", quiet)) if given]
    with _ended_with_us() as children:
        for name in rehearsal.names:
            with rehearsal.log(name).open("ab") as log:
                words = ["join", str(rehearsal.site(name)), "--patience", str(_PATIENCE)]
                children[name] = _started(words, stdout=log, stderr=log)
        if not (rehearsal.run / "run.json").exists():
            approve_training(rehearsal)  # of a rehearsal that was stopped before it
        code = _served(rehearsal, children, serve)
        if not code and not (rehearsal.run / "run.json").exists() and approve_training(rehearsal):
            code = _served(rehearsal, children, serve)  # once more: the first time means and deviations were computed
    if code:
        for name in rehearsal.names:
            _say(f"the end of {rehearsal.log(name)}:\n{_tail(rehearsal.log(name))}")
    return code


def _served(rehearsal: RehearsedSites, children: dict[str, subprocess.Popen[bytes]], words: list[str]) -> int:
    """The coordinator's exit code. Raises: SiteError."""
    coordinator = children[""] = _started(words)
    while (code := coordinator.poll()) is None:
        if gone := [name for name in rehearsal.names if children[name].poll() is not None]:
            raise _ended(rehearsal, gone[0], children[gone[0]].returncode)
        time.sleep(0.1)
    return code


def _ended(rehearsal: RehearsedSites, name: str, code: int) -> SiteError:
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return SiteError(
        f"the process of {name} ended {how}; all others were ended. The end of its log:\n{_tail(rehearsal.log(name))}",
        hint=f"the whole log is {rehearsal.log(name)}; completed rounds are kept, and --resume goes on from them",
    )


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (nothing)"


def _started(words: list[str], **streams: Any) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C reaches this process alone, which ends the others in their order."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(  # noqa: S603  (this program)
        [sys.executable, "-m", "choral", *words],
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        **streams,
    )


@contextmanager
def _ended_with_us() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes by name, the coordinator's as "": none is left on the way out, not even of SIGTERM or a closed
    terminal. Only kill -9 of this process leaves them; then the sites give up after a minute without a coordinator.
    """
    children: dict[str, subprocess.Popen[bytes]] = {}
    ours = threading.current_thread() is threading.main_thread()
    kept = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP) if ours}
    try:
        yield children
    finally:
        try:
            for name in ("", *(name for name in children if name)):  # the coordinator first, which keeps its rounds
                if name in children:
                    children[name].send_signal(signal.SIGTERM if name else signal.SIGINT)
            end = time.monotonic() + _SECONDS_TO_END
            for child in children.values():
                _wait(child, end)
        finally:
            for child in children.values():
                child.kill()  # does nothing to who has ended
                child.wait()
            for number, handler in kept.items():
                signal.signal(number, handler)


def _wait(child: subprocess.Popen[bytes], end: float) -> None:
    try:
        child.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"choral: {text}", file=sys.stderr, flush=True)
