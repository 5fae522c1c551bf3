"""Scores of canaries from a file: CSV headed ``score,member``, or JSON ``{"scores": [...], "members": [...]}``.

A file may state where its memberships come from: a first line ``# design: coins`` of the CSV, or ``"design": "coins"``.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec

from choral.errors import ConfigError, DataError

_FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1}
_LARGEST = 1 << 30
_HINT = 'expected CSV with the header "score,member" or JSON {"scores": [...], "members": [...]}'
_STATES = "# design:"
Design = Literal["coins", "runs", "split"]


class _Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    scores: list[float]
    members: list[int | bool]
    design: Design | None = None


class ScoreFile(NamedTuple):
    """What a file holds; design: None where it does not state it. See
    :func:`choral.audits.attacks.score_audit.audit_scores`."""

    scores: list[float]
    members: list[int]
    design: Design | None


def read_scores(path: str | Path) -> tuple[list[float], list[int]]:
    """The scores and the memberships (0 or 1) of :func:`read_score_file`."""
    return read_score_file(path)[:2]


def read_score_file(path: str | Path) -> ScoreFile:
    """The scores and the memberships (0 or 1), one of each per canary, in the file's order, and the stated design.

    Raises: ConfigError for another suffix; DataError, naming the line, for a file that is missing, larger than 1 GiB or
        not as described. Lengths and values are checked by :func:`choral.audits.attacks.score_audit.audit_scores`.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ConfigError(f"cannot read scores from {path.name!r}", hint="end the name in .csv or .json")
    if not path.is_file():
        raise DataError(f"no file of scores at {path}", hint='expected CSV with the header "score,member", or JSON')
    if path.stat().st_size > _LARGEST:
        raise DataError(f"{path} is larger than 1 GiB", hint="score fewer canaries")
    raw = path.read_bytes()
    return _from_json(path, raw) if path.suffix == ".json" else _from_csv(path, raw)


def _from_json(path: Path, raw: bytes) -> ScoreFile:
    try:
        found = msgspec.json.decode(raw, type=_Scores)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint=_HINT) from None
    return ScoreFile(found.scores, [int(flag) for flag in found.members], found.design)


def _from_csv(path: Path, raw: bytes) -> ScoreFile:
    try:
        text = raw.decode("utf-8-sig")
        stated, first = None, 2
        if text.startswith(_STATES):
            line, _, text = text.partition("\n")
            stated, first = _design(path, line.removeprefix(_STATES).strip()), 3
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip() for name in next(rows, [])]
        if header not in (["score", "member"], ["member", "score"]):
            raise DataError(f"{path} begins with {header}", hint=_HINT)
        swapped = header[0] == "member"
        scores, members = [], []
        for number, row in enumerate(rows, start=first):
            score, member = _row(path, number, row[::-1] if swapped else row)
            scores.append(score)
            members.append(member)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}", hint=_HINT) from None
    return ScoreFile(scores, members, stated)


def _design(path: Path, word: str) -> Design:
    for design in get_args(Design):
        if word == design:
            return design  # type: ignore[no-any-return]
    raise DataError(f"{path}, line 1: design is {word[:20]!r}, expected one of {', '.join(get_args(Design))}")


def _row(path: Path, number: int, row: list[str]) -> tuple[float, int]:
    if len(row) != 2:
        raise DataError(f"{path}, line {number}, has {len(row)} fields, expected 2", hint=_HINT)
    score, member = row[0].strip(), row[1].strip().lower()
    if member not in _FLAGS:
        raise DataError(f"{path}, line {number}: member is {member[:20]!r}, expected 0 or 1", hint=_HINT)
    try:
        if "_" in score:
            raise ValueError
        return float(score), _FLAGS[member]
    except ValueError:
        raise DataError(f"{path}, line {number}: score is {score[:20]!r}, expected a number", hint=_HINT) from None
