"""Audit the statistics that sites answered: are they those that the sites signed, under the promise that was made?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.audits.findings.claims import caveats
from choral.audits.findings.schema import Check, NotRun
from choral.audits.findings.verdict import verdict_sentence, worst
from choral.audits.run.run_audit import Audit, now
from choral.audits.run.signed_checks import (
    CANNOT_COMPARE,
    SIGNED,
    THERE,
    check,
    cited_in,
    evidence_in,
    file_check,
    told,
)
from choral.verify import UNREADABLE

if TYPE_CHECKING:
    from choral.trainers import FederatedStatistics
    from choral.verify import Evidence

FILES = ("statistics.json", "statistics.html")
_SAME = "The statistics are of the sites and the promise that were signed"
_EXACT, _PROMISED = "Exact, without noise: no differential privacy", "epsilon {epsilon:g} at delta {delta:g}."
_WITH_SITES = NotRun(
    name="Ledgers",
    would_show="what the statistics cost each data owner: sites keep their ledgers, and their receipts hold the heads",
)
_UNSIGNED = (
    "Nothing is signed here: statistics of one process have no manifest, and of those with sites it was taken away, or"
    " the coordinator was stopped before the sites had signed it."
)


def audit_statistics(folder: Path) -> Audit:
    """Hold a folder of ``choral stats --out`` against what sites signed; without that it is unverified.

    Raises: ConfigError for a folder without statistics.
    """
    from choral.trainers import FederatedStatistics
    from choral.trainers.run_folder.info import versions

    found = FederatedStatistics.load(folder / FILES[0])
    try:
        evidence = evidence_in(folder)
        checks = _checks(folder, found, evidence)
        cited = next((cited_in(*each) for each in evidence.manifests.items()), None)
    except UNREADABLE as error:
        checks = [Check(name=SIGNED, verdict="violated", finding=f"{CANNOT_COMPARE}: {error!r:.80}.")]
        cited = None
    verdict, promised = worst(checks), not found.claim.startswith(_EXACT)
    return Audit(
        title=f"Statistics of {found.parties} parties",
        made=now(),
        verdict=verdict,
        sentence=verdict_sentence(verdict, checks, ()),
        claim=found.claim,
        promised=promised,
        checks=tuple(checks),
        manifest=cited,
        not_run=(_WITH_SITES,),
        caveats=caveats({"record"} if promised else set(), compared=False),
        versions=versions(),
    )


def _checks(folder: Path, found: FederatedStatistics, evidence: Evidence) -> list[Check]:
    from choral.trainers.run_folder.evidence.manifest import digest_of

    manifest = next(iter(evidence.manifests.values()), None)
    if manifest is None and not evidence.problems:
        return [Check(name=THERE, verdict="unverified", finding=_UNSIGNED)]
    checks = [check(SIGNED, evidence.problems, told(evidence))]
    if manifest is not None:
        there = {name: digest_of(folder / name) for name in FILES if (folder / name).is_file()}
        checks.append(file_check(manifest["files"], there))
        checks.append(check(_SAME, _unlike(found, manifest), "Promise, sites and kind are the same in both."))
    return checks


def _unlike(found: FederatedStatistics, manifest: dict[str, Any]) -> list[str]:
    """What statistics.json says otherwise than the words that the sites signed."""
    promise, sites = manifest["claims"]["promise"], {*manifest["parties"], *manifest["gone"]}
    wrong = [] if manifest["kind"] == "statistics" else [f"the manifest is of a run of kind {manifest['kind']}"]
    words = _PROMISED.format(**promise) if promise else _EXACT
    if words not in found.claim or (promise and found.claim.startswith(_EXACT)):
        wrong.append(f"the claim is not that of the sites: {words}")
    if found.parties != len(sites) or not sites.issuperset(found.survivors):
        wrong.append("the statistics are of other sites than those of the manifest")
    return wrong
