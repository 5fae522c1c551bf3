"""The hazards that NIST SP 800-226 (2025-03) names, and which of them a comparison holds off.

*held*: something was looked at that could have shown otherwise, and did not. *not held*: it did. *not assessed*: nobody
looked, only a human can tell, or it is so by how the program is built, which nothing in a run shows. "Held" supports an
evaluation; it replaces none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from choral.audits.comparison.comparison import Comparison
    from choral.audits.run.run_audit import Audit

Status = Literal["held", "not held", "not assessed"]


class Hazard(NamedTuple):
    """name: as the standard speaks of it. why: in a sentence."""

    name: str
    status: Status
    why: str


_FLOATING_POINT = Hazard(
    "Floating point",
    "not assessed",
    "by construction noise and sums are integers on a grid, and rounding is paid for; nothing in a run shows it",
)


def _randomness(probed: Status) -> Hazard:
    """The probe trains twice from one public state: noise that anybody could draw again repeats itself there."""
    said = "by construction from the operating system, never from a seed"
    of = {"held": "; the probe saw no noise come again", "not held": "; the probe found faults", "not assessed": ""}
    return Hazard("Randomness", probed, said + of[probed])


def hazards(report: Comparison) -> list[Hazard]:
    """Each hazard, and how it stands here."""
    return [*_of_mechanism(report), *_of_data(report), *_of_use(report)]


def run_hazards(report: Audit) -> list[Hazard]:
    """The same of the audit of one run."""
    probe, signed = report.probe, report.manifest
    books: Status = "held" if report.promised and report.verdict == "holds" else "not held"
    probed: Status = "not assessed" if probe is None else "not held" if probe.violated else "held"
    person = "For a person with up to" in report.claim or "for each client" in report.claim
    return [
        Hazard("Accounting", books, report.sentence),
        _FLOATING_POINT,
        _randomness(probed),
        Hazard("Implementation of the mechanism", probed, probe.sentence if probe else "not probed (--probe)"),
        Hazard("Timing and other side channels", "not assessed", "how long an answer takes was not measured"),
        Hazard("Unit of privacy", "held" if person else "not assessed", "how many records one person has, if stated"),
        Hazard("Composition", "not assessed", "this is one run; other releases of the same records add to it"),
        Hazard("Releases without noise", "not assessed", "what else was published is the curator's to say"),
        Hazard("Tuning", "not assessed", "values that were chosen on these records are outside of the guarantee"),
        Hazard("Data collection", "not assessed", "outside of what a program sees"),
        Hazard("Access control", "not assessed", "who may read data, ledgers and models is not recorded"),
        Hazard("Bias", "not assessed", "the report of a comparison shows the worst party"),
        Hazard(
            "Trust model",
            "not held" if signed is not None and signed.rehearsal else "not assessed",
            "a rehearsal: one machine had every party's data"
            if signed is not None and signed.rehearsal
            else "that parties are at machines of their own was not checked",
        ),
    ]


def _of_mechanism(report: Comparison) -> list[Hazard]:
    private = [arm for arm in report.arms if arm.claim]
    if not private:
        return [Hazard("Mechanism", "not held", "no configuration promises differential privacy")]
    sound = [arm for arm in private if arm.audit is not None]
    books: Status = "held" if sound and all(arm.audit and arm.audit.verdict == "holds" for arm in sound) else "not held"
    probed = [arm for arm in private if arm.audit and arm.audit.probe]
    faults = [arm.name for arm in probed if arm.audit and arm.audit.probe and arm.audit.probe.violated]
    probe = Hazard(
        "Implementation of the mechanism",
        "not held" if faults else "held" if probed else "not assessed",
        f"faults found by the probe: {', '.join(faults)}"
        if faults
        else f"the trainer of {len(probed)} of {len(private)} private configurations was probed, without a fault"
        if probed
        else "the private trainer was not probed ([audit] probe = true)",
    )
    return [
        _FLOATING_POINT,
        _randomness(probe.status),
        Hazard("Accounting", books, "every ledger was recomputed by several accountants" if books == "held" else
               "a ledger is missing, or does not support its claim"),
        probe,
        Hazard("Timing and other side channels", "not assessed", "how long an answer takes was not measured; steps of"
               " noise in shares have a fixed number of rows"),
    ]  # fmt: skip


def _of_data(report: Comparison) -> list[Hazard]:
    stated, private = report.context, [arm for arm in report.arms if arm.claim]
    person = any("For a person with up to" in arm.claim.sentence for arm in private if arm.claim)
    client = any(arm.claim.unit == "client" for arm in private if arm.claim)
    unit: Status = "held" if person or client else "not assessed"
    known = bool(report.composed) and all(each.epsilon is not None for each in report.composed)
    tuned = [arm.name for arm in report.arms if _tuned(arm.config)]
    return [
        Hazard(
            "Unit of privacy",
            unit,
            "what holds for a person, or a client, is stated"
            if unit == "held"
            else "how many records one person has is not stated (privacy.records_per_person)",
        ),
        Hazard(
            "Composition",
            "held" if known else "not assessed",
            "all private trainings shown are composed; other releases are the curator's to add"
            if known
            else "not every ledger is there, so the total is unknown",
        ),
        Hazard(
            "Releases without noise",
            "not held" if any(not arm.claim for arm in report.arms) else "held",
            "configurations without a promise are shown beside the private ones; publish those for public data alone"
            if any(not arm.claim for arm in report.arms)
            else "every configuration that is shown has a promise",
        ),
        Hazard(
            "Tuning",
            "not held" if tuned else "not assessed",
            f"{', '.join(tuned)} chose among values by training without privacy"
            if tuned
            else "where the settings come from is not recorded; values chosen on these records would be outside ε",
        ),
        Hazard(
            "Data collection",
            "not assessed",
            f"stated: {stated.legal_basis}" if stated and stated.legal_basis else "outside of what a program sees",
        ),
    ]


def _of_use(report: Comparison) -> list[Hazard]:
    stated = report.context
    fair = any(arm.fairness for arm in report.arms)
    rehearsal = any(each.rehearsal for arm in report.arms for each in arm.manifests)
    return [
        Hazard(
            "Access control",
            "not assessed",
            f"stated: {stated.access}"
            if stated and stated.access
            else "who may read data, ledgers and models is not stated",
        ),
        Hazard(
            "Trust model",
            "not held" if rehearsal else "not assessed",
            "a rehearsal: one machine had every party's data"
            if rehearsal
            else "that parties are at machines of their own was not checked",
        ),
        Hazard(
            "Bias",
            "held" if fair else "not assessed",
            "the worst party and the spread over parties are measured for every configuration"
            if fair
            else "no numbers for each party were asked for ([evaluation] per_party = true)",
        ),
        Hazard(
            "Interpretation",
            "not assessed",
            "unit, adversary, ε, δ and what no attack could have refuted stand on the first page; only readers can tell"
            " how they take it",
        ),
    ]


def _tuned(config: dict[str, object]) -> bool:
    tune = config.get("tune")
    return isinstance(tune, dict) and any(isinstance(values, list) and values for values in tune.values())
