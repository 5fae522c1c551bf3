"""What `choral audit` writes for others: a registry's record, and a list of hazards."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.audits import Audit
    from choral.audits.findings.context import Context
    from choral.trainers import Run


def print_hazards(report: Audit) -> None:
    from choral.audits.report.reader.hazards import run_hazards
    from choral.doors import visible

    for each in run_hazards(report):
        print(visible(f"{each.status:>12}  {each.name}: {each.why}"))


def write_record(folder: Path, file: Path, stated: Path | None) -> None:
    """Write a draft for the OpenDP Deployments Registry. Raises: ConfigError (what it requires is not stated)."""
    from choral.audits.report.reader.registry import as_yaml, registry_record
    from choral.trainers import Run

    run = Run.load(folder)
    record = registry_record(run, _context(run, stated), datetime.now(UTC).date().isoformat())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_yaml(record) + "\n", encoding="utf-8")
    print(f"registry record (draft): {file}")


def _context(run: Run, stated: Path | None) -> Context:
    from choral.audits.findings.context import Context
    from choral.jobs.settings import read_settings

    if stated is not None:
        return read_settings(stated, Context)
    try:
        return msgspec.convert((run.info.config.get("report") or {}).get("context") or {}, Context)
    except (msgspec.ValidationError, AttributeError):
        raise ConfigError("the run's settings hold no readable [report.context]", hint="give --context FILE") from None
