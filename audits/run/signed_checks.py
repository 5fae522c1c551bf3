"""A run held against what its parties signed: receipts of each round, and the manifest that names all files.

Signatures, chains and views are checked by the code that others run (:mod:`choral.verify`), with a faster verification
of signatures; here comes what needs the run itself: files, ledgers, history, and the weights in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.audits.budgets.budgets import ledger_of
from choral.audits.findings.schema import Check, NotRun, Verdict
from choral.audits.findings.whole import CitedManifest
from choral.verify import UNREADABLE, Evidence

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

UNBOUND = NotRun(
    name="Manifest",
    would_show="whether model, history, settings and ledgers are those that the run ended with: without one nothing"
    " binds them to each other, or to what was audited",
)
SIGNED, FILES_SAME = "What the parties signed is whole, and of one view", "The files are those of the manifest"
SAME, THERE = "Receipts, ledgers, history and model tell the same", "The manifest is there"
CANNOT_COMPARE = "What is signed cannot be compared"


def cited_manifest(run: Run) -> CitedManifest | None:
    """The manifest of a run, to be cited; None if there is none, or none that can be read."""
    from choral.trainers.run_folder.evidence.manifest import Manifest
    from choral.trainers.run_folder.evidence.signed_lines import EvidenceError

    try:
        found = Manifest.read(run.folder) if run.folder is not None else None
    except EvidenceError:  # which the checks say
        return None
    return None if found is None else cited_in(found.sha256, found.said)


def signed_checks(run: Run) -> list[Check]:
    """The checks that apply to this run; none where nothing is signed."""
    try:
        return _checks(run)
    except UNREADABLE as error:  # a text in the place of a number, say: signed by some, and never written by Choral
        return [Check(name=SIGNED, verdict="violated", finding=f"{CANNOT_COMPARE}: {error!r:.80}.")]


def _checks(run: Run) -> list[Check]:
    from choral.trainers.run_folder.evidence.manifest import NAME, digests

    evidence = evidence_in(run.folder)
    if run.folder is None or not (evidence.heads or evidence.manifests or evidence.problems):
        return []
    checks = [check(SIGNED, evidence.problems, told(evidence))]
    manifest = next(iter(evidence.manifests.values()), None)
    if manifest is None:
        if run.finished and not (run.folder / NAME).exists():
            finding = "There are receipts, and no manifest: it was taken away, or the process ended before it was made."
            checks.append(Check(name=THERE, verdict="unverified", finding=finding))
        return checks
    checks.append(file_check(manifest["files"], digests(run.folder)))
    same = [*_of_manifest(run, manifest), *_of_receipts(run, evidence)]
    checks.append(check(SAME, same, "Every figure that stands in two of them is the same in both."))
    return checks


def file_check(named: Mapping[str, str], found: Mapping[str, str]) -> Check:
    """The digests of a manifest against those of the files that are there."""
    unlike = [f"{name} is another" for name in sorted(named.keys() & found.keys()) if named[name] != found[name]]
    unlike += [f"{name} is missing" for name in sorted(named.keys() - found.keys())]
    unlike += [f"{name} was added" for name in sorted(found.keys() - named.keys())]
    return check(FILES_SAME, unlike, f"{len(named)} files, each of the SHA-256 that was signed.")


def evidence_in(folder: Path | None) -> Evidence:
    """All that is signed in a run's folder, compared with each other."""
    from choral.protocols.crypto.keys import ed25519_verify
    from choral.trainers.run_folder.evidence.manifest import NAME
    from choral.trainers.run_folder.evidence.receipts import FOLDER

    evidence = Evidence(verify=ed25519_verify)
    if folder is not None:
        for path in (*sorted(folder.glob(f"{FOLDER}/*.jsonl")), *folder.glob(NAME)):
            evidence.take(path.name, path.read_bytes())
        evidence.compare(whole=False)
        evidence.problems = [each for each in evidence.problems if not each.startswith("no receipt and no manifest")]
    for manifest in evidence.manifests.values():
        for party, about in manifest["parties"].items():
            if manifest["rehearsal"] and about["receipts"] and (manifest["run"], party) not in evidence.heads:
                evidence.wrong(f"the receipts of {party}, which the manifest names, are missing")
    return evidence


def cited_in(sha256: str, said: dict[str, Any]) -> CitedManifest:
    signed = 1 + len(set(said["parties"]) - set(said["gone"]))
    return CitedManifest(
        sha256=sha256, run=said["run"], signed=signed, gone=tuple(said["gone"]), rehearsal=said["rehearsal"]
    )


def told(evidence: Evidence) -> str:
    cited = next((cited_in(*each) for each in evidence.manifests.items()), None)
    parties, receipts = len({party for _, party in evidence.heads}), len(evidence.rounds)
    said = f"{receipts} receipts of {parties} parties" if receipts else "No receipts"
    if cited is not None:
        gone = f", without {', '.join(cited.gone)}" if cited.gone else ""
        said += f"; a manifest that {cited.signed} signed{gone} (SHA-256 {cited.sha256[:16]}…)"
    rehearsed = cited.rehearsal if cited else any(each["rehearsal"] for each in evidence.rounds)
    return said + ("; a rehearsal, whose keys one operator made." if rehearsed else ".")


def _of_manifest(run: Run, manifest: dict[str, Any]) -> list[str]:
    found, history = [], run.history[-1]
    if manifest["completed"] != history.round or manifest["metrics"] != history.metrics:
        found.append("the manifest has another last round than the history")
    if run.info.sites:  # whose receipts, which are compared otherwise, are with them
        found += _of_sites(run, manifest)
    sealed = run.info.transcript
    if manifest["transcript"] != (None if sealed is None else [sealed.entries, sealed.head]):
        found.append("the manifest has another transcript than run.json")
    for name, cost in run.info.spent.items():
        about, ledger = manifest["ledgers"].get(name), ledger_of(run, name)
        if about is None or (about["epsilon"], about["delta"]) != (cost.epsilon, cost.delta):
            found.append(f"the manifest has another cost of {name} than run.json")
        elif ledger is None or _head(ledger, about["events"]) != about["head"]:
            found.append(f"the ledger of {name} is not the one whose head was signed: an older copy, cut, or another")
    return found


def _of_sites(run: Run, manifest: dict[str, Any]) -> list[str]:
    found, claims = [], manifest.get("claims") or {}
    if unnamed := [name for name in run.info.sites if name not in {*manifest["parties"], *manifest["gone"]}]:
        found.append(f"the manifest does not speak of {', '.join(unnamed)}")
    if claims and claims["promise"] != run.info.privacy:
        found.append("the promise of run.json is not the one that the sites signed")
    if claims and _model(run, claims["layout"]) != manifest["model"]:
        found.append("the model is not the one that the sites signed")
    return found


def _of_receipts(run: Run, evidence: Evidence) -> list[str]:
    found: list[str] = []
    ledgers = {name: ledger_of(run, name) for name in run.info.spent}
    rounds: dict[int, list[dict[str, Any]]] = {}
    for said in evidence.rounds:
        rounds.setdefault(said["round"], []).append(said)
        led, ledger = said["ledger"], ledgers.get(said["party"])
        away = said["party"] in run.info.sites  # with its ledger
        if led and not away and (ledger is None or _head(ledger, led["events"][1]) != led["after"]):
            found.append(f"the ledger of {said['party']} is not the one of its receipt of round {said['round']}")
    whole = int((run.info.algorithm or {}).get("steps_per_round", 1))
    for entry in run.history[1:]:
        here = rounds.get(entry.round, [])
        counts = [said for said in here if not entry.failed or len(said["sums"]) >= whole]  # else its last sum failed
        survived = sum(bool(said["sums"]) and said["sums"][-1]["in_sum"] for said in counts)
        known = here or (rounds and entry.survivors and not run.info.sites)  # which have their receipts themselves
        lost = (entry.selected or 0) - len(here)  # of a site that is killed between its answer and its receipt
        if known and lost > 0 and run.info.sites:
            named = {survivors for said in here for survivors in _survivors(said)}
            agree = named <= {entry.survivors} and survived <= entry.survivors <= survived + lost
        else:
            agree = (lost, survived) == (0, entry.survivors)
        if known and not agree:
            found.append(f"round {entry.round} has {entry.survivors} survivors in the history, {survived} by receipts")
    last = max(rounds, default=0)
    if last == run.history[-1].round and last:
        said = rounds[last][0]
        shapes = evidence.shapes.get(said["terms"])
        if shapes and said["came"] != _model(run, [name for name, _ in shapes]):
            found.append(f"the model is not the one that came of round {last} by receipts")
    return found


def _survivors(said: dict[str, Any]) -> list[int]:
    """How many a receipt names as survivors of its round's last sum; empty where it was told nothing of them."""
    return [
        len({*each["roster"]} - {*each["dropped"]})
        for each in said["sums"][-1:]
        if each["roster"] and each["dropped"] is not None
    ]


def _model(run: Run, names: list[str]) -> str:
    import torch

    from choral.trainers.run_folder.evidence.receipts import model_digest

    if missing := [name for name in names if name not in run.state]:
        return f"without {missing[0]}"
    return model_digest(torch.cat([run.state[name].reshape(-1).float() for name in names]))


def _head(ledger: Any, events: int) -> str:
    from choral.privacy import LedgerError

    try:
        return str(ledger.head_after(events))
    except LedgerError:  # it holds fewer
        return ""


def check(name: str, found: list[str], same: str) -> Check:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    verdict: Verdict = "violated" if found else "holds"
    return Check(name=name, verdict=verdict, finding=f"{'; '.join(found[:3])}{more}." if found else same)
