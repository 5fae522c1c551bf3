"""Reports on disk: JSON is the truth, HTML a drawing of it, Markdown a summary."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from choral import verify
from choral.audits.findings.schema import ReportError, check_version
from choral.errors import ConfigError

ReportT = TypeVar("ReportT", bound=msgspec.Struct)


def save_report(
    report: ReportT,
    path: str | Path,
    page: Callable[[ReportT], str],
    summary: Callable[[ReportT], str],
    drawing: Callable[[ReportT], str] | None = None,
) -> Path:
    """Write ``report`` by suffix, in one step: a reader finds the old file or the new one, whole.

    Raises: ConfigError for another suffix; ReportError for one that could not be read back.
    """
    path = Path(path)
    if path.suffix == ".json":
        content = as_json(report)
    elif path.suffix == ".html":
        content = page(report).encode()
    elif path.suffix == ".md":
        content = summary(report).encode()
    elif path.suffix == ".svg" and drawing is not None:
        content = drawing(report).encode()
    else:
        known = ".json, .html or .md" if drawing is None else ".json, .html, .md or .svg"
        raise ConfigError(f"cannot save a report as {path.name!r}", hint=f"end the name in {known}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content)
    os.replace(draft, path)
    return path


def as_json(report: msgspec.Struct) -> bytes:
    """The report as its JSON file. Raises: ReportError."""
    return msgspec.json.format(_readable(report), indent=1) + b"\n"


def put_verifier(folder: Path) -> Path:
    """Copy verify.py beside a report, for readers who have no Choral."""
    path = folder / "verify.py"
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(Path(verify.__file__).read_bytes())
    os.replace(draft, path)
    return path


def _readable(report: msgspec.Struct) -> bytes:
    """Return its JSON. Raises: ReportError if it could not be read back, before anything is written."""
    try:
        raw = msgspec.json.encode(report)
        if msgspec.json.encode(msgspec.json.decode(raw, type=type(report))) == raw:
            return raw
        said = "another report would be read back"
    except (TypeError, ValueError) as error:  # msgspec's are ValueErrors
        said = str(error)
    raise ReportError(f"the report cannot be written as JSON: {said}", hint="Save it as .html or .md, and tell us.")


def read_report(path: str | Path, kind: type[ReportT]) -> ReportT:
    """Decode a report strictly."""
    path = Path(path)
    if not path.is_file():
        raise ReportError(f"no report at {path}", hint="name a report.json")
    raw = path.read_bytes()
    check_version(raw, str(path))
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise ReportError(
            f"{path} does not hold what it should: {error}", hint="it was edited, or is another kind"
        ) from None
