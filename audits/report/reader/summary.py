"""Page one of a comparison, the plain reading of epsilon, and who must be trusted, drawn from the report's fields."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from choral.audits.findings import text
from choral.audits.findings.tally import beyond_attack
from choral.audits.report.reader.hazards import hazards
from choral.metrics import is_falling

if TYPE_CHECKING:
    from choral.audits.comparison.comparison import Comparison
    from choral.audits.findings.schema import ArmResult


class Recommendation(NamedTuple):
    """arm: None where none is within the tolerance. sentence: why, and what it costs. nearest: then, which is."""

    arm: ArmResult | None
    sentence: str
    nearest: ArmResult | None = None


def page_one(report: Comparison) -> list[tuple[str, str]]:
    """Questions of a reader with five minutes, and the answers."""
    private = [arm for arm in report.arms if arm.claim]
    answers = [
        ("What was done", _done(report)),
        ("On whose data", _whose(report)),
        ("Recommended", recommended(report).sentence),
        ("What is promised, against whom", _promised(report, private)),
        ("In plain words", _in_words(report, private)),
        ("Against whom not", _not_against(report, private)),
        ("What all of it costs", _total(report)),
        ("What no attack here could have refuted", beyond_attack(report) or _attacked(private)),
        ("What nobody looked at", _unassessed(report)),
        ("Rehearsal or sites", _where(report)),
        ("Who signed", _signed(report)),
        ("Before you sign", _before(report)),
    ]
    return [(question, answer) for question, answer in answers if answer]


def recommended(report: Comparison) -> Recommendation:
    """The cheapest private configuration within the tolerance of the baseline: the least money, or else time.

    Where data can stay with their owners, of those that leave them there.
    """
    base = next(arm for arm in report.arms if arm.name == report.baseline)
    sound = [arm for arm in report.arms if arm.claim and (arm.audit is None or arm.audit.verdict == "holds")]
    if not sound:
        return Recommendation(None, "None: no configuration has a promise whose evidence holds.")
    sound = [arm for arm in sound if arm.kind == "federated"] or sound
    worse = {arm.name: _loss(report, arm, base) for arm in sound}
    allowed = text.width(report.tolerance, report.metric) + (" points" if text.is_percent(report.metric) else "")
    fit = [arm for arm in sound if worse[arm.name] <= report.tolerance]
    if not fit:
        nearest = min(sound, key=lambda arm: worse[arm.name])
        return Recommendation(
            None,
            f"None: no private configuration is within {allowed} of {base.name}, the tolerance of this report. The"
            f" nearest is {nearest.name} ({_reaches(report, nearest)}, {_price(report, nearest)}).",
            nearest,
        )
    bills = {bill.arm: bill.usd for bill in report.costs.bills} if report.costs else {}
    priced = all(bills.get(arm.name) is not None for arm in fit)
    cheapest = min(fit, key=lambda arm: (bills[arm.name] or 0.0) if priced else arm.seconds.mean)
    price = _price(report, cheapest)
    return Recommendation(
        cheapest,
        f"{cheapest.name}: {_reaches(report, cheapest)}, {price}, the cheapest private configuration within {allowed}"
        f" of {base.name}: who asked for this report chose these {allowed}.",
    )


def _price(report: Comparison, arm: ArmResult) -> str:
    usd = next((bill.usd for bill in report.costs.bills if bill.arm == arm.name), None) if report.costs else None
    time = f"{text.duration(arm.seconds.mean)} a run"
    return time if usd is None else f"{text.money(usd)} and {time}"


def plain_reading(epsilon: float, delta: float, unit: str) -> list[str]:
    """What epsilon and delta allow an adversary, in odds and rates."""
    rate = _found_of_all(epsilon, delta)
    times, even = _odds(epsilon)
    whose = f"whether one {unit}'s data took part" if unit == "client" else "whether one record took part"
    said = [
        f"Whoever guesses {whose}, and is wrong about 1 % of those that did not, is right about at most"
        f" {100 * rate:.3g} % of those that did.",
        f"What an adversary thought before, as odds, changes by a factor of {times} at most: from even odds to"
        f" {even} certainty.",
        f"With probability δ = {text.power(delta)} at most, more than that may be learned.",
    ]
    if _is_weak(epsilon, delta):
        said.append("By itself this is a weak bound: it excludes little. What was measured stands beside it.")
    return said


def _odds(epsilon: float) -> tuple[str, str]:
    """By what odds change at most, and how certain that makes who had even ones."""
    factor = math.exp(min(epsilon, 700.0))
    times = f"{factor:.3g}" if factor < 100 else f"{factor:,.0f}" if factor < 1e6 else f"10^{math.log10(factor):.0f}"
    return times, f"{100.0 / (1.0 + math.exp(-min(epsilon, 700.0))):.4g} %"


def _found_of_all(epsilon: float, delta: float) -> float:
    """The most of those who took part that are found by who is wrong about 1 % of the others."""
    return min(math.exp(min(epsilon, 700.0)) * 0.01 + delta, 1.0)


def _is_weak(epsilon: float, delta: float) -> bool:
    return _found_of_all(epsilon, delta) >= 0.5


def promises(private: list[ArmResult]) -> list[tuple[tuple[float, float, str], list[str]]]:
    """(epsilon, delta, unit) as they are quoted, each once, and the configurations that promise it."""
    found: dict[tuple[str, float, str], tuple[tuple[float, float, str], list[str]]] = {}
    for arm in private:
        if claim := arm.claim:
            key = (text.cost(claim.quoted), claim.delta, claim.unit)
            found.setdefault(key, ((claim.quoted, claim.delta, claim.unit), []))[1].append(arm.name)
    return list(found.values())


def trust_rows(report: Comparison) -> list[tuple[str, str, str, str, str]]:
    """Of each configuration: what the data owner gives away, and what server, other parties and readers may learn."""
    return [(arm.name, *_trust(arm)) for arm in report.arms]


def _trust(arm: ArmResult) -> tuple[str, str, str, str]:
    claim = arm.claim
    reader = f"held off by ε = {text.cost(claim.quoted)} for each {claim.unit}" if claim else "no promise"
    if arm.kind == "centralized":
        return "hands over all records", "trusted: holds every record", "see nothing", reader
    name = str((arm.secure_sum or {}).get("name", "plain")).lower()
    summed = name not in ("", "plain")
    own = claim is not None and arm.shares is None and claim.unit == "record"
    sent = "keeps records; sends " + ("updates with its own noise" if own else "updates")
    if arm.shares is not None:
        sent = "keeps records; sends updates with a share of the noise"
    server = "sees sums alone, under the trust of the secure sum" if summed else "sees every update"
    if own:
        server += ", and is held off by each party's own noise"
    others = "see models" + (" and, as many as collude, nothing else" if summed else "")
    return sent, server, others, reader


def releases(report: Comparison) -> list[str]:
    """What is published of the training or held-out records without noise."""
    found = [f"The final {report.metric} of every configuration, on the evaluation data, which is taken to be public."]
    if any(arm.fairness for arm in report.arms):
        found.append("The final model's worth at each party, on records that it holds out: in the clear.")
    if any(not arm.claim for arm in report.arms):
        names = ", ".join(arm.name for arm in report.arms if not arm.claim)
        found.append(f"The configurations without a promise ({names}): models, curves and sums of the same records.")
    if report.context is not None and report.context.releases:
        found += report.context.releases
    else:
        found.append("Other releases of the same records: not stated ([report.context] releases).")
    return found


def _loss(report: Comparison, arm: ArmResult, base: ArmResult) -> float:
    lost = arm.metric.mean - base.metric.mean
    return lost if is_falling(report.metric) else -lost


def _reaches(report: Comparison, arm: ArmResult) -> str:
    promise = f" at ε = {text.cost(arm.claim.quoted)} for each {arm.claim.unit}" if arm.claim else ""
    return f"{report.metric} {text.score(arm.metric.mean, report.metric)}{promise}"


def _done(report: Comparison) -> str:
    seeds = max(len(arm.seeds) for arm in report.arms)
    return (
        f"One model of {report.arms[0].parameters:,} parameters was trained in {len(report.arms)} ways, each"
        f" {seeds} time{'s' if seeds > 1 else ''}, and judged by {report.metric}; {report.baseline} is what the others"
        " are held against."
    )


def _whose(report: Comparison) -> str:
    most = max(report.arms, key=lambda arm: arm.parties)
    said = f"{most.examples:,} records of {most.parties} data owners"
    stated = report.context
    if stated is not None and stated.region:
        said += f"; {stated.region}"
    return said + ("." if stated is not None and stated.purpose else ". Purpose and people: not stated.")


def _chosen(report: Comparison, private: list[ArmResult]) -> ArmResult | None:
    """The configuration that page one speaks of; None if no claim is made."""
    found = recommended(report)
    arm = found.arm or found.nearest or (private[0] if private else None)
    return arm if arm is not None and arm.claim else None


def _promised(report: Comparison, private: list[ArmResult]) -> str:
    if not private:
        return "Nothing: no configuration promises differential privacy."
    arm = _chosen(report, private)
    if arm is None or arm.claim is None:
        return ""
    return (
        f"{arm.name}: ε = {text.cost(arm.claim.quoted)}, δ = {text.power(arm.claim.delta)}, for each {arm.claim.unit},"
        f" against {arm.claim.adversary}."
    )


def _in_words(report: Comparison, private: list[ArmResult]) -> str:
    """What the promise of page one allows: the odds of :func:`plain_reading`, and whether that is weak."""
    arm = _chosen(report, private)
    if arm is None or arm.claim is None:
        return ""
    claim = arm.claim
    times, even = _odds(claim.quoted)
    whose = f"Who guesses whether one {claim.unit} took part"
    said = f"{whose} may go from even odds to {even} certainty (odds times {times})."
    if claim.unit == "record":
        said += " Someone with several records is protected less."
    return said + (" This is a weak promise." if _is_weak(claim.quoted, claim.delta) else "")


def _not_against(report: Comparison, private: list[ArmResult]) -> str:
    """Of the promise on page one, and of what else was trained on the same records."""
    arm = _chosen(report, private)
    if arm is None:
        return ""
    found = ["the party that holds a record"]
    if arm.shares is not None:
        found.append(f"the server with {arm.shares.colluders + 1} or more other parties")
    if _is_rehearsal(report):
        found.append("in this rehearsal, whoever owns the machine")
    unpromised = ", ".join(each.name for each in report.arms if not each.claim)
    said = f"{'; '.join(found)}."
    if unpromised:
        said += f" Nor does it cover the models of {unpromised}."
    return said[:1].upper() + said[1:]


def _before(report: Comparison) -> str:
    """What only a human can do."""
    stated = report.context is not None and bool(report.context.purpose)
    todo = [] if stated else ["state purpose and people ([report.context])"]
    todo.append("have this ε and this tolerance judged by somebody who did not choose them")
    if any(not arm.claim for arm in report.arms):
        todo.append("keep in the house what has no bound")
    if _is_rehearsal(report):
        todo.append("repeat it at sites, each with a key of its own")
    said = "; ".join(todo)
    return f"{said[:1].upper()}{said[1:]}. The block to sign is at the end."


def _total(report: Comparison) -> str:
    """For whoever reads the whole report."""
    parts: list[str] = []
    for each in report.composed:
        total = "unknown" if each.epsilon is None else f"ε = {text.cost(each.epsilon)} at δ = {text.power(each.delta)}"
        shown = f"all {each.runs} private trainings that are" if each.runs > 1 else "the private training that is"
        counted = " (each seed and each ε of the curves counts)" if each.runs > 1 and not parts else ""
        parts.append(f"{shown} shown{counted}, for each {each.unit}: {total}")
    unpromised = [arm.name for arm in report.arms if not arm.claim]
    if unpromised and parts:
        parts.append("with those without any bound the whole has none")
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _attacked(private: list[ArmResult]) -> str:
    return "Every promise was put to an attack that could have refuted it." if private else ""


def _unassessed(report: Comparison) -> str:
    """The hazards below that are not assessed, by name."""
    names = [each.name for each in hazards(report) if each.status == "not assessed"]
    return f"{', '.join(names).capitalize()}: see the hazards below." if names else ""


def _is_rehearsal(report: Comparison) -> bool:
    """Whether any of it was, or nothing says otherwise."""
    cited = [each for arm in report.arms for each in arm.manifests]
    return not cited or any(each.rehearsal for each in cited)


def _where(report: Comparison) -> str:
    if not _is_rehearsal(report):
        return "At sites of their own: each party signed with a key that it alone holds."
    return (
        "A rehearsal in one process: every party's data was on one machine, whose owner could read all of it."
        " What is said of the server holds for the protocol, and was not tried against a real one."
    )


def _signed(report: Comparison) -> str:
    cited = [each for arm in report.arms for each in arm.manifests]
    if not cited:
        return "Nobody: no manifest binds these runs to what is said here."
    gone = sum(len(each.gone) for each in cited)
    said = (
        f"{len(cited)} manifests, by {min(each.signed for each in cited)} to {max(each.signed for each in cited)} keys"
    )
    said += f"; {gone} parties did not sign" if gone else ""
    return said + (
        ", all made by one process: they prove that the files belong together, and no more."
        if any(each.rehearsal for each in cited)
        else "."
    )
