"""How reports look in Python and in notebooks: a line, and a small table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from choral.audits.findings.text import OVERALL, plus_minus, score

if TYPE_CHECKING:
    from choral.audits.comparison.comparison import Comparison
    from choral.audits.run.run_audit import Audit


def comparison_line(report: Comparison) -> str:
    """One line: each configuration with the metric that it is judged by."""
    arms = ", ".join(f"{arm.name} {score(arm.metric.mean, report.metric)}" for arm in report.arms)
    return f"<Comparison by {report.metric}: {arms}; .print(), .save('report.html')>"


def comparison_table(report: Comparison) -> str:
    """The table of configurations, as HTML."""
    headings = ("configuration", report.metric, "epsilon", "verdict")
    rows = [
        (
            arm.name,
            f"{score(arm.metric.mean, report.metric)}{plus_minus(arm.metric.half_width, report.metric)}",
            f"{arm.claim.quoted:.3g} per {arm.claim.unit}" if arm.claim else "none",
            OVERALL[arm.audit.verdict] if arm.audit else "not audited",
        )
        for arm in report.arms
    ]
    return _table(headings, rows, report.title)


def audit_line(report: Audit) -> str:
    """One line: the verdict."""
    return f"<Audit: {OVERALL[report.verdict]}; {len(report.checks)} checks; .print(), .save('audit.html')>"


def audit_table(report: Audit) -> str:
    """The checks with their verdicts, as HTML."""
    rows = [(check.name, OVERALL[check.verdict], check.finding) for check in report.checks]
    return _table(("check", "verdict", "finding"), rows, f"{report.title}: {OVERALL[report.verdict]}")


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], title: str) -> str:
    head = "".join(f"<th style='text-align:left'>{html.escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"
