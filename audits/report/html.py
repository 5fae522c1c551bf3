"""One offline HTML file per report, drawn from the report's fields alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.audits.costs.bills import mean
from choral.audits.findings import text
from choral.audits.findings.claims import composed_words, no_claim
from choral.audits.findings.context import CONTEXT_WORDS
from choral.audits.findings.evidence import Bound, ScoreAudit
from choral.audits.findings.schema import ORDER, ArmResult, BudgetPoint, WeightsMatch
from choral.audits.findings.tally import every_check, tally
from choral.audits.findings.verdict import FAILED
from choral.audits.report.charts import evidence_figures, figures, price_figures
from choral.audits.report.charts.price_figures import crossovers
from choral.audits.report.charts.svg import arm_classes
from choral.audits.report.charts.winner_figures import winners
from choral.audits.report.reader import summary
from choral.audits.report.reader.glossary import GLOSSARY
from choral.audits.report.reader.hazards import hazards
from choral.audits.report.reader.parameters import lattice_words, parameter_rows
from choral.audits.report.settings_shown import settings, settings_text
from choral.audits.report.shares_gain import shares_gain
from choral.audits.report.storage import as_json
from choral.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment

    from choral.audits.comparison.comparison import Comparison
    from choral.audits.run.run_audit import Audit

_WORDS = {"holds": "holds", "violated": "violated", "unverified": "not verified"}
_SPREAD_WORDS = {
    "epsilon": "ε spent",
    "noise_multiplier": "Noise multiplier",
    "sample_rate": "Sample rate",
    "examples": "Records",
}


def comparison_page(report: Comparison, *, full: bool = False) -> str:
    """The comparison as HTML; full: with all details open.

    Every name and title in it is escaped: they come from whoever ran the arms.
    """
    colours = _colours(report)
    private = [arm for arm in report.arms if arm.claim]
    references = [
        arm for arm in report.arms if not arm.claim and (arm.name == report.baseline or arm.kind == "federated")
    ]
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            report=report,
            full=full,
            page_one=summary.page_one(report),
            trust_rows=summary.trust_rows(report),
            releases=summary.releases(report),
            hazards=hazards(report),
            context_words=CONTEXT_WORDS,
            glossary=GLOSSARY,
            colours=colours,
            private=private,
            fair=(fair := [arm for arm in report.arms if arm.fairness]),
            fair_words=text.party_words(of_parties(fair)),
            party_counts=party_counts(report.arms),
            percent=text.is_percent(of_parties(fair)),
            cards=cards(report),
            lead=lead(report),
            tally=tally(every_check(report)),
            idle=sum(not check.refutable for check in every_check(report)),
            evidence=(shown := evidence_rows(report.arms)),
            attacked=sum(attack is not None for _, attack, _ in shown),
            probed=any(arm.audit and arm.audit.probe for arm in report.arms),
            confidence=next((bound.confidence for _, _, bound in shown if bound), 0.95),
            overall=text.OVERALL,
            failed=FAILED,
            statements=statements(report.arms),
            settings=settings(report.arms),
            rounds=rounds_figures(report, colours),
            by_bytes=price_figures.progress_figure(report.arms, report.metric, colours, "bytes"),
            by_seconds=price_figures.progress_figure(report.arms, report.metric, colours, "seconds"),
            crossovers=crossovers(report.costs),
            winners=winners(report.costs),
            budget=figures.budget_figure(report.budgets, references[:2], report.metric, colours)
            if report.budgets
            else None,
            budget_rows=budget_rows(report),
            holders=figures.owners_figure(report.arms, colours) if private else None,
        )
    )


def comparison_drawing(report: Comparison) -> str:
    """The curves over rounds, one metric under the other, as one SVG file that fetches nothing."""
    drawings = [drawing.wide for _, drawing, _ in rounds_figures(report, _colours(report))]
    height = figures.ROUNDS_HEIGHT
    placed = "".join(f'<g transform="translate(20 {20 + height * n})">{each}</g>' for n, each in enumerate(drawings))
    size = f"{figures.WIDE + 40:g}", f"{height * len(drawings) + 40:g}"
    style = _environment().get_template("drawing.html").render() + "svg { font-family: system-ui, sans-serif; }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {" ".join(size)}" width="{size[0]}" height="{size[1]}">'
        f'<style>{style}</style><rect width="100%" height="100%" style="fill: var(--paper)"/>{placed}</svg>\n'
    )


def _colours(report: Comparison) -> dict[str, int]:
    return arm_classes([arm.name for arm in report.arms] + [curve.arm for curve in report.budgets], ORDER)


def rounds_figures(report: Comparison, colours: Mapping[str, int]) -> list[tuple[str, figures.Figure, str]]:
    """(metric, drawing, what to know of it) for every metric, the one that arms are judged by first."""
    made = []
    for place, metric in enumerate(report.metrics):
        levels = {each.name: each.level for each in report.references if each.metric == metric}
        identity = f"rounds-{place}" if place else "rounds"
        drawing = figures.rounds_figure(report.arms, metric, colours, levels, identity)
        said = "The axis is logarithmic: 0, the least value, is infinitely far down." if text.is_gap(metric) else ""
        if levels:
            said += f" Level lines: {', '.join(f'{name} ({text.score(y, metric)})' for name, y in levels.items())}."
        made.append((metric, drawing, said.strip()))
    return made


def audit_page(report: Audit) -> str:
    """The audit of one run, or of a model that was trained elsewhere, as HTML."""
    return (
        _environment()
        .get_template("audit.html")
        .render(
            report=report,
            lead=audit_lead(report),
            overall=text.OVERALL[report.verdict],
            trace=figures.trace_figure(report.traces[0]) if report.traces else None,
            rocs=[
                (attack, evidence_figures.roc_figure(attack, f"roc-{place}"))
                for place, attack in enumerate((*report.attacks, *([report.probe.canaries] if report.probe else [])))
            ],
            inversion=evidence_figures.inversion_figure(report.inversion) if report.inversion else None,
            settings=settings_text(report.run.config) if report.run and report.run.config else "",
        )
    )


def audit_lead(report: Audit) -> str:
    """The verdict in a sentence or two, with what it does not cover."""
    said = report.sentence
    if not report.promised:
        said += " No differential privacy is promised, so there is no budget to break."
    elif report.verdict == "holds" and report.budgets:
        said += " Recomputed from the ledgers, no data owner has spent more than was claimed or promised."
    if report.run and report.run.completed < report.run.rounds:
        said += f" The run was interrupted after round {report.run.completed} of {report.run.rounds}."
    if report.traces:
        trace = report.traces[0]
        first, last = text.score(trace.values[0], trace.name), text.score(trace.values[-1], trace.name)
        said += f" Its {trace.name} went from {first} to {last}."
    return said


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError:
        hint = 'pip install "choral[report]"; or save as .json'
        raise ConfigError("HTML is drawn by jinja2, which is not installed", hint=hint) from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores, amounts = ("score", "is_percent", "plus_minus", "signed", "width"), ("amount", "power", "cost")
    said = (*scores, *amounts, "duration", "money", "energy")
    environment.globals.update({name: getattr(text, name) for name in said})
    environment.globals.update(
        job_sentence=price_figures.job_sentence,
        no_claim=no_claim,
        composed_words=composed_words,
        refuting_words=text.refuting_words,
        parameter_rows=parameter_rows,
        lattice_words=lattice_words,
        plain_reading=summary.plain_reading,
        words=_WORDS,
        spread_words=_SPREAD_WORDS,
    )
    environment.filters.update(promises=summary.promises, plain=_plain)
    environment.filters["capitalize_first"] = lambda sentence: sentence[:1].upper() + sentence[1:]
    environment.filters["json_digest"] = lambda report: sha256(as_json(report)).hexdigest()
    environment.filters["mean_of"] = lambda items, name: mean([getattr(item, name) for item in items])
    environment.filters["words"] = lambda key: str(key).replace("_", " ")
    return environment


def _plain(value: Any) -> str:
    """A setting or statement in a line of text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not applicable"}[value]
    if isinstance(value, Mapping):
        return "; ".join(f"{str(key).replace('_', ' ')}: {_plain(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def lead(report: Comparison) -> str:
    """The result in a few sentences."""
    base = next(arm for arm in report.arms if arm.name == report.baseline)
    metric = report.metric
    said = [gain] if (gain := shares_gain(report)) else []
    said.append(f"Trained on {_where(base)} ({base.name}), the model reaches {_reached(base, metric)}.")
    spread = _plain_federated(report)
    if spread and spread is not base:
        said.append(f"With {_where(spread)} ({spread.name}), it reaches {score_of(spread, metric)}.")
    private = [arm for arm in report.arms if arm.claim and arm is not base]
    reached: dict[str, list[str]] = {}
    for arm in private:
        if arm.claim:
            reached.setdefault(arm.claim.unit, []).append(
                f"{score_of(arm, metric)} {'pooled' if arm.kind == 'centralized' else 'distributed'}"
                f" ({arm.name}, ε\u00a0=\u00a0{text.cost(arm.claim.quoted)})"
            )
    for unit, scores in sorted(reached.items(), reverse=True):  # record before client
        said.append(f"With differential privacy for each {unit}, it reaches {' and '.join(scores)}.")
    return " ".join(said)


def _where(arm: ArmResult) -> str:
    if arm.kind == "centralized":
        return f"the pooled data of {arm.parties} parties"
    return f"the data left at their {arm.parties} parties"


def _reached(arm: ArmResult, metric: str) -> str:
    value = score_of(arm, metric)
    return f"{value} {metric}" if text.is_percent(metric) else f"{metric} {value}"


def score_of(arm: ArmResult, metric: str) -> str:
    return text.score(arm.metric.mean, metric)


def _plain_federated(report: Comparison) -> ArmResult | None:
    return next((arm for arm in report.arms if arm.kind == "federated" and not arm.claim), None)


def cards(report: Comparison) -> list[dict[str, str]]:
    """Headline numbers: the baseline, then what distribution, the secure sum and privacy cost against it."""
    metric = report.metric
    base = next(arm for arm in report.arms if arm.name == report.baseline)
    kind = "pooled data" if base.kind == "centralized" else f"{base.parties} parties"
    note = f"{base.name}: {kind}, {'with' if base.claim else 'no'} privacy"
    interval = text.plus_minus(base.metric.half_width, metric).strip() or "one seed"
    found = [_card("Baseline", score_of(base, metric), note, interval)]
    spread = _plain_federated(report)
    if spread and spread.difference:
        found.append(_cost("Distribution", spread, metric, f"{spread.name}, data stay with {spread.parties} parties"))
    if report.matches:
        found.append(_match_card(report.matches))
    for arm in report.arms:
        if arm.claim and arm.difference:
            where = "pooled" if arm.kind == "centralized" else "distributed"
            kind = ", in shares" if arm.shares else ", per client" if arm.claim.unit == "client" else ""
            found.append(
                _cost(
                    f"Privacy, {where}{kind}",
                    arm,
                    metric,
                    f"{arm.name} at ε\u00a0=\u00a0{text.cost(arm.claim.quoted)} per {arm.claim.unit}",
                )
            )
    return found


def _match_card(matches: tuple[WeightsMatch, ...]) -> dict[str, str]:
    gaps = [row.difference for row in matches if row.difference is not None]
    if len(gaps) < len(matches):
        return _card("Secure sum", "differs", f"{matches[0].arm}: the weights cannot be compared")
    if max(gaps) == 0:
        return _card("Secure sum", "no accuracy lost", f"{matches[0].arm}: not one weight differs")
    return _card("Secure sum", text.power(max(gaps)), f"{matches[0].arm}: largest difference of a weight")


def _cost(label: str, arm: ArmResult, metric: str, note: str) -> dict[str, str]:
    if arm.difference is None:
        return _card(label, "–", note)
    estimate = arm.difference.estimate
    interval = text.plus_minus(estimate.half_width, metric).strip()
    unit = "points" if text.is_percent(metric) else ""
    interval = " ".join(part for part in (interval, unit) if part) + ("" if interval else " (one seed)")
    return _card(label, text.signed(estimate.mean, metric), note, interval)


def _card(label: str, value: str, note: str, interval: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "interval": interval}


def evidence_rows(arms: Sequence[ArmResult]) -> list[tuple[ArmResult, ScoreAudit | None, Bound | None]]:
    """Each audited arm with the first attack on it by coins, and the bound that decides."""
    rows = []
    for arm in arms:
        if arm.audit:
            attack = next((each for each in arm.audit.attacks if each.design == "coins" and each.null), None)
            found = (bound for bound in attack.bounds if bound.method == attack.decisive) if attack else iter(())
            rows.append((arm, attack, next(found, None)))
    return rows


def budget_rows(report: Comparison) -> list[tuple[float, list[BudgetPoint | None]]]:
    """One row per epsilon asked for, one cell per arm."""
    asked = sorted({point.asked for curve in report.budgets for point in curve.points})
    by_arm = [{point.asked: point for point in curve.points} for curve in report.budgets]
    return [(epsilon, [points.get(epsilon) for points in by_arm]) for epsilon in asked]


def of_parties(fair: Sequence[ArmResult]) -> str:
    """The metric of the numbers per party."""
    return next((arm.fairness.metric for arm in fair if arm.fairness), "")


def party_counts(arms: Sequence[ArmResult]) -> list[str]:
    """How many parties the numbers per party are of, once for all arms of which it is the same."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        if fair := arm.fairness:
            said = (
                f"{fair.listed} of {fair.parties} parties hold out at least {fair.least} records (the fewest over"
                f" seeds), none of them fewer than {fair.records}; the others are not evaluated."
            )
            if fair.listed == fair.parties:
                said = f"All {fair.parties} parties hold out {fair.records} records or more."
            found.setdefault(said, []).append(arm.name)
    return [said if len(found) == 1 else f"{', '.join(names)}: {said}" for said, names in found.items()]


def statements(arms: tuple[ArmResult, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Each distinct secure-sum statement with the arms that it holds for."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    for arm in arms:
        if arm.secure_sum is None:
            continue
        for names, statement in found:
            if statement == arm.secure_sum:
                names.append(arm.name)
                break
        else:
            found.append(([arm.name], arm.secure_sum))
    return [(", ".join(names), statement) for names, statement in found]
