"""A summary in Markdown, to be pasted into a model card. Names come from whoever trained: they are escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from choral.audits.findings.claims import composed_words
from choral.audits.findings.text import (
    amount,
    at_least,
    cost,
    duration,
    money,
    party_words,
    plus_minus,
    power,
    refuting_words,
    score,
    signed,
    width,
)
from choral.audits.findings.verdict import said
from choral.audits.report.reader.hazards import Hazard, hazards, run_hazards
from choral.audits.report.reader.parameters import lattice_words, parameter_rows
from choral.audits.report.shares_gain import shares_gain

if TYPE_CHECKING:
    from choral.audits.comparison.comparison import Comparison
    from choral.audits.findings.evidence import ScoreAudit
    from choral.audits.findings.parameters import LatticeEstimate, PromiseParameters
    from choral.audits.findings.schema import Check, NotRun
    from choral.audits.run.run_audit import Audit

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")
_WORDS = {"holds": "holds", "violated": "**violated**", "unverified": "**not verified**"}


def audit_markdown(report: Audit) -> str:
    """Verdict, claim, checks, attacks, and what was not run."""
    parts = [
        f"## {_safe(report.title)}",
        f"**{_safe(report.sentence)}**",
        _safe(report.claim),
        *(_attack(attack) for attack in report.attacks),
        _parameters([(report.title, report.parameters)]),
        _lattice([report.run.lattice] if report.run else []),
        "### What was checked",
        _checks(report.checks),
        _not_run(report.not_run),
        _hazards(run_hazards(report) if report.run else []),
        "### Limits",
        _list(report.caveats),
        _foot(report.made, report.versions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison_markdown(report: Comparison) -> str:
    """The configurations, the promises, checks, and what was not run."""
    bills = {bill.arm: bill for bill in report.costs.bills} if report.costs else {}
    rows = [
        (
            _safe(arm.name),
            f"{score(arm.metric.mean, report.metric)}{plus_minus(arm.metric.half_width, report.metric)}",
            *(
                f"{score(other.estimate.mean, other.metric)}{plus_minus(other.estimate.half_width, other.metric)}"
                for other in arm.more
            ),
            f"{signed(arm.difference.estimate.mean, report.metric)}"
            f"{plus_minus(arm.difference.estimate.half_width, report.metric)}"
            if arm.difference
            else "",
            f"{cost(arm.claim.quoted)} at δ = {power(arm.claim.delta)}" if arm.claim else "none promised",
            amount(arm.bytes_per_party),
            duration(arm.seconds.mean),
            money(bills[arm.name].usd) if arm.name in bills else "",
        )
        for arm in report.arms
    ]
    blank = [""] * (len(report.metrics) + 4)
    rows += [(_safe(each.arm), "failed", *blank) for each in report.failed if not each.left]
    costs = (f"against {_safe(report.baseline)}", "ε", "bytes per party", "time", "money")
    heads = ("configuration", *map(_safe, report.metrics), *costs)
    seeds = sorted({len(arm.seeds) for arm in report.arms})
    parts = [
        f"## {_safe(report.title)}",
        _safe(shares_gain(report)),
        _table(heads, rows),
        f"± is a 95 % Student-t interval over {' or '.join(map(str, seeds))} seeds. Money is modelled with list prices"
        " and assumptions.",
        "\n\n".join(
            f"**{_safe(each.arm)} failed** ({_safe('; '.join(each.runs))}). {_safe(each.reason)}."
            for each in report.failed
        ),
        _fairness(report),
        *(f"**{_safe(arm.name)}.** {_safe(arm.claim.sentence)}" for arm in report.arms if arm.claim),
        *(_safe(composed_words(each)) for each in report.composed),
        _parameters([(arm.name, arm.audit.parameters if arm.audit else None) for arm in report.arms]),
        _lattice([arm.lattice for arm in report.arms]),
        "### Evidence",
        _evidence(report),
        "### What was checked between the configurations",
        _checks(report.checks),
        _not_run(report.not_run),
        _hazards(hazards(report)),
        "### Limits",
        _list(report.caveats),
        _foot(report.made, report.versions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parameters(found: Sequence[tuple[str, PromiseParameters | None]]) -> str:
    """Each promise in the parameters of other definitions."""
    rows = [
        (_safe(name), _safe(what), _safe(value)) for name, each in found if each for what, value in parameter_rows(each)
    ]
    return f"### In other parameters\n\n{_table(('of', 'parameter', 'value'), rows)}" if rows else ""


def _lattice(found: Sequence[LatticeEstimate | None]) -> str:
    return "\n\n".join(dict.fromkeys(_safe(lattice_words(each)) for each in found if each))


def _hazards(found: Sequence[Hazard]) -> str:
    if not found:
        return ""
    lines = _list(f"{each.status}: {each.name}: {each.why}" for each in found)
    return f"### Hazards that NIST SP 800-226 names\n\n{lines}"


def _evidence(report: Comparison) -> str:
    """The verdict on each arm in words, and each check that does not hold."""
    lines = []
    for arm in report.arms:
        if arm.audit is None:
            continue
        runs = "1 run" if arm.audit.runs == 1 else f"{arm.audit.runs} runs"
        lines.append(f"- **{_safe(arm.name)}** ({runs} audited). {_safe(arm.audit.sentence)}")
        for attack in arm.audit.attacks:
            lines.append(f"  - {_safe(attack.attack)}: {_safe(attack.sentence)}")
        faults = [check for check in arm.audit.checks if check.verdict != "holds"]
        lines += [f"  - {_WORDS[each.verdict]}: {_safe(each.name)}. {_safe(each.finding)}" for each in faults]
    return "\n".join(lines)


def _fairness(report: Comparison) -> str:
    """The worst party and the spread of every arm that has numbers per party."""
    fair = [(arm.name, arm.fairness) for arm in report.arms if arm.fairness]
    if not fair:
        return ""
    metric = fair[0][1].metric
    shown = party_words(metric)
    rows = []
    for name, fairness in fair:
        measures = {measure.name: measure for measure in fairness.measures}
        cells = []
        for key, _ in shown:
            found = measures[key]
            said = (width if key in ("deviation", "range") else score)(found.estimate.mean, metric)
            said += plus_minus(found.estimate.half_width, metric)
            if found.difference:
                apart = found.difference.estimate
                said += f" ({signed(apart.mean, metric)}{plus_minus(apart.half_width, metric)})"
            cells.append(said)
        rows.append((_safe(name), *cells, f"{fairness.listed} of {fairness.parties}"))
    heads = (f"{_safe(metric)} at each party", *(label.lower() for _, label in shown), "parties")
    note = f"In brackets: against {report.baseline}. {fair[0][1].note}"
    return f"### Whom the model serves worst\n\n{_table(heads, rows)}\n\n{_safe(note)}"


def _attack(attack: ScoreAudit) -> str:
    rows = [
        (
            _safe(bound.method),
            at_least(bound.epsilon),
            f"{bound.ceiling:.3g}",
            refuting_words(bound),
            power(bound.delta),
            f"{100 * bound.confidence:g} % ({bound.kind})",
            ", ".join(f"{_safe(name)} {count:,}" for name, count in bound.counts.items()),
        )
        for bound in attack.bounds
    ]
    heads = ("method", "ε at least", "could have shown up to", "refutes from", "δ", "confidence", "counts")
    auc = attack.roc.auc
    said = (
        f"{attack.scores:,} scores, {attack.members:,} of members. AUC {auc.value:.3f}"
        f" ({auc.low:.3f} to {auc.high:.3f}). {attack.sentence}"
    )
    return f"### {_safe(attack.attack)}\n\n{_safe(said)}" + (f"\n\n{_table(heads, rows)}" if rows else "")


def _checks(checks: Sequence[Check]) -> str:
    return _list((f"{_safe(each.name)}. {_safe(said(each))}" for each in checks), [_WORDS[c.verdict] for c in checks])


def _list(lines: Iterable[str], verdicts: Sequence[str] | None = None) -> str:
    if verdicts is None:
        return "\n".join(f"- {_safe(line)}" for line in lines)
    return "\n".join(f"- {verdict}: {line}" for verdict, line in zip(verdicts, lines, strict=True))


def _not_run(entries: Sequence[NotRun]) -> str:
    if not entries:
        return ""
    return "### What was not audited\n\n" + _list(f"{entry.name}: would show {entry.would_show}" for entry in entries)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _foot(made: str, versions: dict[str, str]) -> str:
    used = ", ".join(f"{_safe(name)} {_safe(version)}" for name, version in versions.items())
    return f"Made by Choral on {made} with {used}. The whole report is its JSON."


def _safe(text: str) -> str:
    """On one line, without anything that Markdown or HTML would take for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.splitlines())).replace("&", "&amp;")
