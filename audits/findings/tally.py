"""How many checks of a comparison could have failed, and how they came out; what no attack could have refuted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from choral.audits.findings.schema import Check, Verdict
from choral.audits.findings.text import cost
from choral.audits.findings.verdict import could_refute, evidence_checks

if TYPE_CHECKING:
    from choral.audits.comparison.comparison import Comparison


def every_check(report: Comparison) -> list[Check]:
    """Those between the arms, and those of each arm's evidence; a probe that several arms share counts once."""
    found, probes = [*report.checks], []
    for audited in (arm.audit for arm in report.arms if arm.audit):
        shared = {check.name for check in evidence_checks((), audited.probe, None)} if audited.probe in probes else ()
        found += [check for check in audited.checks if check.name not in shared]
        probes += [audited.probe] if audited.probe else []
    return found


def beyond_attack(report: Comparison) -> str:
    """Which claims no attack here could have refuted, in a sentence; "" if each was put to a test that could."""
    untested = []
    for arm in (arm for arm in report.arms if arm.claim and arm.audit):
        attacks = [*arm.audit.attacks, *([arm.audit.probe.canaries] if arm.audit.probe else [])] if arm.audit else []
        if not any(map(could_refute, attacks)):
            reach = [bound.ceiling for each in attacks for bound in each.bounds if bound.method == each.decisive]
            most = f"too weak: they reach {max(reach):.2f}" if reach else "no attack was run on it"
            untested.append(f"{arm.name} at ε\u00a0=\u00a0{cost(arm.claim.quoted if arm.claim else 0.0)} ({most})")
    return f"No attack here could have refuted {'; '.join(untested)}." if untested else ""


def tally(checks: Sequence[Check]) -> list[tuple[Verdict, int]]:
    """How many of the checks that could have failed came out which way, the worst first."""
    order: tuple[Verdict, ...] = ("violated", "unverified", "holds")
    counts = [(verdict, sum(check.verdict == verdict and check.refutable for check in checks)) for verdict in order]
    return [(verdict, count) for verdict, count in counts if count]
