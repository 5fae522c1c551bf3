"""From evidence to checks, and from checks to the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from choral.audits.findings.schema import NOT_RUN, Check, NotRun, Verdict
from choral.audits.findings.text import at_least

if TYPE_CHECKING:
    from choral.audits.findings.evidence import InversionAudit, Probe, ScoreAudit
    from choral.audits.transcripts.transcript_audit import TranscriptAudit

_PARTLY = NotRun(
    name="Transcript audit against the parties' own vectors",
    would_show="whether any message correlates with a single party's update (a rehearsal with masked sums has them)",
)
FAILED = "The attack that was asked for"  # the check of one that could not be carried out
_INVERTED = "A masked message gives no input away"


def evidence_checks(
    attacks: Sequence[ScoreAudit], probe: Probe | None, inversion: InversionAudit | None
) -> tuple[Check, ...]:
    """One check per attack, per test of a probe, and for the inversion of a masked message."""
    checks = [_of_scores(attack) for attack in attacks]
    if probe is not None:
        checks += [
            Check(name=f"Probe: {test.name}", verdict="violated" if test.violated else "holds", finding=test.finding)
            for test in probe.checks
        ]
        checks.append(_of_scores(probe.canaries))
    if inversion is not None:
        checks += [
            Check(
                name=_INVERTED,
                verdict="violated" if view.recovered else "holds",
                finding=f"{view.psnr:.1f} dB against the true image, {view.unrelated_psnr:.1f} dB against unrelated"
                f" ones (p = {view.p_value:.2g}, {inversion.trials} trials).",
            )
            for view in inversion.views
            if view.name == "masked message"
        ]
    return tuple(checks)


def _of_scores(attack: ScoreAudit) -> Check:
    name = f"The claim against an attack: {attack.attack}"
    if attack.null is not None and not attack.null.holds:
        finding = (
            f"On coins that the model never saw the test was positive in {attack.null.positives} of"
            f" {attack.null.draws} draws: it is broken, and says nothing."
        )
        return Check(name=name, verdict="unverified", finding=finding)
    finding = attack.sentence
    above = [b for b in attack.bounds if attack.claimed is not None and b.epsilon > attack.claimed]
    if attack.finding == "not violated" and above:
        said = ", ".join(f"{bound.method}: {at_least(bound.epsilon)}" for bound in above)
        finding += f" Bounds that rest on further assumptions are above the claim ({said}): look closer."
    verdict: Verdict = "violated" if attack.finding == "violated" else "holds"
    return Check(name=name, verdict=verdict, finding=finding, refutable=could_refute(attack))


def could_refute(attack: ScoreAudit) -> bool:
    """Whether some outcome of this attack would have contradicted the claim: the decisive bound can be above it."""
    reach = max((bound.ceiling for bound in attack.bounds if bound.method == attack.decisive), default=0.0)
    return attack.claimed is not None and reach > attack.claimed


def said(check: Check) -> str:
    """The finding, and whether it could have been otherwise."""
    return check.finding if check.refutable else f"{check.finding} Could not have failed here."


def worst(checks: Sequence[Check]) -> Verdict:
    found = {check.verdict for check in checks}
    return "violated" if "violated" in found else "unverified" if "unverified" in found else "holds"


def verdict_sentence(verdict: Verdict, checks: Sequence[Check], attacks: Sequence[ScoreAudit]) -> str:
    """The verdict, and the largest epsilon that it could have been otherwise for."""
    if verdict != "holds":
        faulty = [check.name for check in checks if check.verdict == verdict]
        what = "Violated" if verdict == "violated" else "Not verified"
        level = max((b.confidence for a in attacks if a.finding == "violated" for b in a.bounds), default=None)
        at = f" at {100 * level:g}\u00a0% confidence" if level is not None and verdict == "violated" else ""
        return f"{what}{at}: {'; '.join(faulty[:3])}{f'; and {len(faulty) - 3} more' if len(faulty) > 3 else ''}."
    decisive = [
        (bound.ceiling, attack.claimed)
        for attack in attacks
        for bound in attack.bounds
        if bound.method == attack.decisive
    ]
    if decisive:
        most = f"ε\u00a0=\u00a0{max(ceiling for ceiling, _ in decisive):.2f}"
        said = f"No violation found; the strongest test here could have detected up to {most}."
        claims = [claimed for _, claimed in decisive if claimed is not None]
        if claims and all(claimed is None or ceiling <= claimed for ceiling, claimed in decisive):
            said += (
                f" The claim, ε\u00a0=\u00a0{max(claims):.3g}, is not below that: no attack here could have refuted it."
            )
        return said
    if attacks:
        return "No violation found; the attacks were of a kind that bounds no ε."
    tried = any(check.name == _INVERTED for check in checks)
    found, kind = (", and no picture in a masked message", " that bounds ε") if tried else ("", "")
    return (
        f"No violation found in the books{found}. No attack{kind} was run, so a leak that the books do not show could"
        " not have been detected."
    )


def not_run(
    attacks: Sequence[ScoreAudit],
    probe: Probe | None,
    inversion: InversionAudit | None,
    transcript: TranscriptAudit | None,
) -> tuple[NotRun, ...]:
    """What is left of the list once the evidence is taken off it."""
    tried = " ".join(attack.attack.lower() for attack in attacks)
    done = {
        "Membership inference by loss threshold": "loss" in tried,
        "LiRA (likelihood-ratio attack)": "lira" in tried,
        "RMIA (robust membership inference)": "rmia" in tried,
        "One-run audit with canaries": probe is not None or any(attack.design == "coins" for attack in attacks),
        "Gradient inversion": inversion is not None,
        "Transcript audit": transcript is not None,
    }
    left = [entry for entry in NOT_RUN if not done[entry.name]]
    if transcript is not None and transcript.detectable is None and not transcript.plain:
        left.append(_PARTLY)
    return tuple(left)
