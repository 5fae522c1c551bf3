"""The first sentence of a comparison with noise in shares: what the shares gained, and under which trust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.audits.findings.text import cost, is_percent, score

if TYPE_CHECKING:
    from choral.audits.comparison.comparison import Comparison
    from choral.audits.findings.schema import ArmResult, SharesTrust


def shares_gain(report: Comparison) -> str:
    """ "" where no configuration's noise is in shares, or none has each party add all of its own."""
    records = [arm for arm in report.arms if arm.claim and arm.claim.unit == "record"]
    shared = next((arm for arm in records if arm.shares), None)
    own = next((arm for arm in records if arm.kind == "federated" and not arm.shares), None)
    if shared is None or own is None or shared.shares is None or shared.claim is None:
        return ""
    cloud = next((arm for arm in records if arm.kind == "centralized"), None)
    beside = f", and {_reached(cloud, report.metric)} with a cloud that is trusted with all records" if cloud else ""
    return (
        f"Noise in shares reaches {_reached(shared, report.metric)} {report.metric} ({shared.name}), where each party's"
        f" own noise reaches {_reached(own, report.metric)} ({own.name}){beside}:"
        f" {_gain(shared, own, report.metric)} gained,"
        f" {_trust(shared.shares, shared.parties)}; it keeps ε\u00a0=\u00a0{cost(shared.claim.quoted)} in that worst"
        f" case{_realised(shared.shares)}."
    )


def _reached(arm: ArmResult, metric: str) -> str:
    return score(arm.metric.mean, metric)


def _gain(shared: ArmResult, own: ArmResult, metric: str) -> str:
    """Paired by nothing: of the two means."""
    difference = shared.metric.mean - own.metric.mean
    return f"{100 * difference:.1f} points" if is_percent(metric) else f"{difference:.3g}"


def _trust(trust: SharesTrust, parties: int) -> str:
    """Who is trusted, and with what."""
    others = f"{trust.colluders} of the parties collude" if trust.colluders != 1 else "one of the parties colludes"
    worst = (
        f"any {trust.honest} honest parties of {parties} do: {trust.min_survivors} are left in each sum and {others}"
    )
    if trust.secure_sum == "plain":
        return f"with a server that is trusted with every party's vector, and against outsiders, if {worst}"
    return f"with nobody who is trusted with records or vectors, under the secure sum, if {worst}"


def _realised(trust: SharesTrust) -> str:
    if trust.realised is None:
        return ""
    return (
        f", and realised ε\u00a0=\u00a0{cost(trust.realised)} by who survived, which holds only if who drops out does"
        " not depend on what was released"
    )
