"""Reports on the terminal: tables that fit 80 columns and survive a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from choral.audits.findings.claims import composed_words
from choral.audits.findings.schema import Check
from choral.audits.findings.text import OVERALL, amount, cost, duration, plus_minus, score, signed, width
from choral.audits.findings.verdict import said
from choral.audits.report.shares_gain import shares_gain
from choral.doors import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from choral.audits.comparison.comparison import Comparison
    from choral.audits.findings.schema import ArmResult, Claim
    from choral.audits.run.run_audit import Audit

_GAP = 2  # between columns
_MARKS = {"holds": "ok", "violated": "VIOLATED", "unverified": "unverified"}


def _text(*parts: str | tuple[str, str], style: str = "") -> Text:
    """Names and reasons come from whoever made the run: none of them steers the terminal."""
    from rich.text import Text

    styled = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((visible(words), how) for words, how in styled), style=style)


def print_comparison(report: Comparison, console: Console | None = None) -> None:
    from rich.console import Console

    console = console or Console()
    console.print(_text(report.title, style="bold"))
    if gain := shares_gain(report):
        console.print(_text(gain))
    headings = ("configuration", *report.metrics, f"vs {report.baseline}", "ε", "rounds", "per party", "time")
    rows = [(arm.name, *_cells(arm, report.metric)) for arm in report.arms]
    rows += [(each.arm, "failed", *[""] * (len(headings) - 2)) for each in report.failed if not each.left]
    _print_table(headings, rows, console)
    for each in report.failed:
        what = "" if not each.left and len(each.runs) == 1 else f" ({', '.join(each.runs)})"
        console.print(_text(("FAILED  ", "bold red"), f"{each.arm}{what}. ", (f"{each.reason}.", "dim")))
    console.print(_text(legend(report), style="dim"))
    for total in report.composed:
        console.print(_text(composed_words(total)))
    _print_fairness(report, console)
    for check in report.checks:
        _print_check(check, console)
    for arm in report.arms:
        _print_evidence(arm, console)


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """A table in which no name or number is broken: columns that do not fit stand in further tables below it.

    The first column, of names, is repeated there. Where even one column does not fit beside it, each row is a list.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table

    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    if len(widths) > 1 and widths[0] + _GAP + max(widths[1:]) > console.width:
        for name, *cells in rows:
            console.print(_text(name), soft_wrap=True)
            for heading, cell in zip(headings[1:], cells, strict=True):
                console.print(_text(f"  {heading}: {cell or '-'}"), soft_wrap=True)
        return
    parts: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if parts[-1] and widths[0] + sum(widths[c] + _GAP for c in [*parts[-1], column]) > console.width:
            parts.append([])
        parts[-1].append(column)
    for shown in parts:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column(_text(headings[0]), no_wrap=True)
        for column in shown:
            table.add_column(_text(headings[column]), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(_text(row[column]) for column in (0, *shown)))
        console.print(table)


def _print_evidence(arm: ArmResult, console: Console) -> None:
    """The verdict on one configuration, and each of its checks that does not hold."""
    if arm.audit is None:
        return
    runs = "1 run" if arm.audit.runs == 1 else f"{arm.audit.runs} runs"
    found = Check(name=f"{arm.name}, {runs} audited", verdict=arm.audit.verdict, finding=arm.audit.sentence)
    _print_check(found, console)
    for check in arm.audit.checks:
        if check.verdict != "holds":
            _print_check(check, console)


def _print_fairness(report: Comparison, console: Console) -> None:
    """The worst party of each configuration, and the standard deviation over parties; one to a line."""

    said, metric = [], ""
    for arm in report.arms:
        if arm.fairness is None:
            continue
        metric = arm.fairness.metric
        measures = {measure.name: measure.estimate for measure in arm.fairness.measures}
        worst = measures["worst"]
        said.append(
            f"{arm.name} {score(worst.mean, metric)}{plus_minus(worst.half_width, metric)}"
            f" (spread {width(measures['deviation'].mean, metric)})"
        )
    if said:
        console.print(_text(f"Worst party's {metric}, held-out records, in the clear:"))
        for line in said:
            console.print(_text(f"  {line}"), soft_wrap=True)


def _cells(arm: ArmResult, metric: str) -> tuple[str, ...]:
    return (
        f"{score(arm.metric.mean, metric)}{plus_minus(arm.metric.half_width, metric)}",
        *(score(other.estimate.mean, other.metric) for other in arm.more),
        f"{signed(arm.difference.estimate.mean, metric)}{plus_minus(arm.difference.estimate.half_width, metric)}"
        if arm.difference
        else "-",
        _epsilon(arm.claim),
        str(arm.rounds),
        amount(arm.bytes_per_party),
        duration(arm.seconds.mean),
    )


def _epsilon(claim: Claim | None) -> str:
    """The usual unit, the record, goes without saying; the legend says it."""
    if claim is None:
        return "-"
    return cost(claim.quoted) + ("" if claim.unit == "record" else f" /{claim.unit}")


def legend(report: Comparison) -> str:
    """What the columns mean, in the words that the numbers need."""
    counts = sorted({len(arm.seeds) for arm in report.arms})
    seeds = " or ".join(map(str, counts)) + (" seeds" if counts != [1] else " seed: no interval")
    unpaired = any(arm.difference and not arm.difference.paired for arm in report.arms)
    pairing = "not paired where seeds differ (Welch)" if unpaired else "paired by seed"
    units = {arm.claim.unit for arm in report.arms if arm.claim}
    promise = "the worst data owner's, per record"
    if units - {"record"}:
        promise += " unless marked; other units are not on one scale with it"
    return (
        f"± is a 95 % Student-t interval over {seeds}; differences {pairing}. ε: {promise}."
        " per party: sent and received by the busiest party; for pooled configurations, its raw data, moved once."
    )


def print_audit(report: Audit, console: Console | None = None) -> None:
    from rich.console import Console

    console = console or Console()
    console.print(_text(f"{report.title}: {OVERALL[report.verdict]}", style="bold"))
    console.print(_text(report.sentence))
    console.print(_text(report.claim))
    if report.budgets:
        rows = []
        for row in report.budgets:
            known = (row.claimed, row.recomputed, row.guarantee)
            numbers = (cost(value) if value is not None else "-" for value in known)
            rows.append((row.holder, f"{row.promised:g}", *numbers, _MARKS[row.verdict]))
        _print_table(("data owner", "promised", "claimed", "from ledger", "guaranteed", "verdict"), rows, console)
    for check in report.checks:
        _print_check(check, console)
    for attack in report.attacks:
        for note in attack.notes:
            console.print(_text(f"note: {note}", style="yellow"))
    if report.not_run:
        missing = ", ".join(audit.name for audit in report.not_run)
        console.print(_text(f"Not audited: {missing}.", style="dim"))


def _print_check(check: Check, console: Console) -> None:
    style = {"holds": "green", "violated": "bold red", "unverified": "yellow"}[check.verdict]
    console.print(_text((f"{_MARKS[check.verdict]}  ", style), (f"{check.name}. ", ""), (said(check), "dim")))
