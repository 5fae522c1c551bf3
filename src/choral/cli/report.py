"""The command ``choral report``: a report that was saved, drawn and printed again."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import tyro

from choral.cli.arguments import parse
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.audits import Audit, Comparison

STATISTICS = "statistics.json"


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Draw report.html again from the report.json of a folder, and print the table. Nothing is trained or audited.

    Of `choral stats`, statistics.html from statistics.json.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder with a report.json, of `choral compare` or `choral audit`, or a statistics.json; or the file itself."""
    out: Path | None = None
    """File to draw: .html, .md, or .svg (curves of a comparison); by default report.html beside report.json."""
    full: bool = False
    """Open all details in the HTML of a comparison, so that they are printed, too."""
    check: bool = False
    """Draw nothing: is the page that is there the one that is drawn from the JSON? Exit code 1 if it is not."""
    json: bool = False
    """Print the report as JSON, and nothing else."""
    quiet: bool = False
    """Print nothing but errors."""


def report(words: list[str]) -> int:
    """Return the exit code that the command which made the report ended with; with --check, whether the page holds."""
    wanted = parse("report", words, ReportFlags)
    file = _file(wanted.folder)
    if wanted.check:
        return _check(file, wanted.out or file.with_suffix(".html"))
    if file.name == STATISTICS:
        return _statistics(file, wanted)
    found = _read(file)
    drawn = _drawn(found, wanted.out or file.with_suffix(".html"), wanted.full)
    if wanted.json:
        print_json(found)
    elif not wanted.quiet:
        found.print()
        print(f"report: {drawn}")
    return found.exit_code


def _file(given: Path) -> Path:
    """The report that is meant: of a folder its report.json, else its statistics.json."""
    if not given.is_dir():
        return given
    found = [given / name for name in ("report.json", STATISTICS)]
    return found[1] if found[1].is_file() and not found[0].is_file() else found[0]


def _statistics(file: Path, wanted: ReportFlags) -> int:
    from choral.trainers.analytics.result import FederatedStatistics

    found = FederatedStatistics.load(file)
    drawn = found.save(wanted.out or file.with_suffix(".html"))
    if wanted.json:
        print(file.read_text(encoding="utf-8"), end="")
    elif not wanted.quiet:
        print(found.table())
        print(f"report: {drawn}")
    return 0


def _check(file: Path, page: Path) -> int:
    """Hold a page against the one that is drawn of its JSON. Raises: ConfigError for a page that is not there."""
    from choral.audits import Comparison
    from choral.trainers import FederatedStatistics
    from choral.trainers.run_folder.info import versions

    if page.suffix != ".html" or not page.is_file():
        raise ConfigError(f"no page at {page}", hint="name a report.html, or leave --out out")
    found = FederatedStatistics.load(file) if file.name == STATISTICS else _read(file)
    with tempfile.TemporaryDirectory() as folder:
        drawn = [found.save(Path(folder) / "page.html").read_bytes()]
        if isinstance(found, Comparison):
            drawn.append(found.save(Path(folder) / "full.html", full=True).read_bytes())
        same = found.save(Path(folder) / "page.json").read_bytes() == file.read_bytes()
    wrong = [] if same else [f"{file.name} is not as Choral writes it: it was edited"]
    wrong += [] if page.read_bytes() in drawn else [f"{page.name} is not the page that is drawn from {file.name}"]
    for each in wrong:
        print(f"DOES NOT HOLD: {each}")
    made = getattr(found, "versions", {}).get("choral")
    if wrong and made not in (None, versions()["choral"]):
        print(f"  it was made by Choral {made}, which writes and draws in its own way: check it with that")
    if not wrong:
        print(f"Holds: {page.name} is what is drawn from {file.name}, which choral verify holds against manifests.")
    return 1 if wrong else 0


def _drawn(found: Audit | Comparison, path: Path, full: bool) -> Path:
    from choral.audits import Comparison

    if isinstance(found, Comparison):
        return found.save(path, full=full)
    if full:
        raise ConfigError("--full is of a comparison", hint="leave it out: the audit of one run is printed whole")
    return found.save(path)


def print_json(report: Audit | Comparison) -> None:
    """What report.json holds."""
    from choral.audits.report.storage import as_json

    print(as_json(report).decode(), end="")


def _read(file: Path) -> Audit | Comparison:
    """Raises: ConfigError where there is no report; ReportError for one that cannot be read."""
    from choral.audits import Audit, Comparison

    try:
        kind = msgspec.json.decode(file.read_bytes()).get("kind")
    except OSError:
        made = file.parent / "run.json"
        hint = f"choral audit {file.parent} makes one" if made.is_file() else "choral compare and choral audit make one"
        raise ConfigError(f"no report at {file}", hint=hint) from None
    except (msgspec.MsgspecError, AttributeError):
        raise ConfigError(f"{file} is no report", hint="it was edited, or is another file") from None
    return Comparison.load(file) if kind == "comparison" else Audit.load(file)
