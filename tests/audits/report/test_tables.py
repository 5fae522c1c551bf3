"""Tables on the terminal and in a pipe: no name and no number is broken, at any width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from choral.audits.findings.schema import Check, NotRun
from choral.audits.report.terminal import _print_table, print_audit
from choral.audits.run.run_audit import Audit

HEADINGS = ("arm", "accuracy", "test error", "vs cloud", "ε", "rounds", "per party", "time")
ROWS = (
    ("cloud", "97.0 % ± 1.1", "3.0 %", "-", "-", "20", "65.5 kB", "0.4 s"),
    ("federated-homomorphic", "95.7 % ± 1.7", "4.3 %", "−1.3 ± 0.8", "-", "20", "891 kB", "1.2 s"),
    ("federated-client", "22.3 % ± 19.8", "77.7 %", "−74.7 ± 20.6", "5.66 /client", "20", "506 kB", "1.1 s"),
    ("seven hospitals [red], 東京", "failed", "", "", "", "", "", ""),
)


def printed(width: int, *, terminal: bool = False, rows: tuple[tuple[str, ...], ...] = ROWS) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    _print_table(HEADINGS, rows, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [300, 120, 80, 60, 45, 40, 20, 8])
def test_every_cell_stands_whole_in_one_line(width: int, terminal: bool) -> None:
    lines = printed(width, terminal=terminal)
    text = "\n".join(lines)
    for row in ROWS:
        for cell in row:
            assert cell in text
    assert "…" not in text
    for heading in HEADINGS[1:]:
        assert heading in text
    if width >= 45:  # the widest name and the widest column side by side
        assert max(map(len, lines)) <= width
        for row in ROWS:
            mine = [line for line in lines if line.startswith(row[0])]
            found = re.sub(r"\s+", " ", " ".join(line.removeprefix(row[0]) for line in mine)).strip()
            assert found == re.sub(r"\s+", " ", " ".join(row[1:])).strip()


def test_at_80_columns_what_is_reached_comes_first_and_what_it_costs_below() -> None:
    lines = printed(80)
    heads = [line.split()[0:2] for line in lines if line.startswith("arm")]
    assert len(heads) == 2
    assert heads[0] == ["arm", "accuracy"]
    assert len([line for line in printed(300) if line.startswith("arm")]) == 1


def test_a_name_longer_than_the_line_is_not_broken() -> None:
    name = "a" * 200
    lines = printed(80, rows=((name, *ROWS[0][1:]),))
    assert name in lines
    assert "  accuracy: 97.0 % ± 1.1" in lines


def test_no_name_in_a_run_steers_the_terminal() -> None:
    """A folder may come from anybody: a name that clears the screen could write another verdict there."""
    evil = "north\x1b[2J\x1b[H\nno violation found\r\x9b31m\u202e"
    console = Console(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    print_audit(
        Audit(
            title=evil,
            made="",
            verdict="violated",
            sentence=evil,
            claim=evil,
            promised=False,
            checks=(Check(name=evil, verdict="violated", finding=evil),),
            not_run=(NotRun(name=evil, would_show=""),),
            caveats=(),
            versions={},
        ),
        console,
    )
    _print_table(("arm", evil), ((evil, evil),), console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert not [sign for sign in said if not sign.isprintable() and sign != "\n"]
    assert said.count("north\\x1b[2J\\x1b[H\\nno violation found") == 9
