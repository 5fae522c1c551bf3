"""What a site signs when a run is over: the run's manifest, held against what this site's own records say.

A site signs one result of a run and no other: the line of its log that says so is written before the signature leaves.
Who else signed may change, for the others are asked again when one of them is gone.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from choral.network.errors import SiteError
from choral.network.host.messages import JobOver, RunSigned, SignRun
from choral.network.site.files.log import AGREED, SiteLine
from choral.trainers.federated.terms.task_code import version_here
from choral.trainers.run_folder.evidence.manifest import FORMAT, VERSION, Owned, claims_of, countersign, rounds_of
from choral.trainers.run_folder.evidence.receipts import read, receipts_path
from choral.trainers.run_folder.evidence.sealing import STATISTICS
from choral.trainers.run_folder.evidence.signed_lines import body_of, content_of

if TYPE_CHECKING:
    from choral.network.site.folder import SiteFolder

SIGNED = "signed"
_OTHERS = ("gone", "parties")


def stated(folder: SiteFolder, job: str) -> JobOver:
    """What the coordinator is to write of this site's receipts. Raises: EvidenceError, SiteError."""
    owned, _, _ = _owned(folder, job)
    return JobOver(owned.receipts, owned.head, owned.keys)


def signed(folder: SiteFolder, asked: SignRun) -> RunSigned:
    """The site's signature on the manifest.

    Raises: SiteError, EvidenceError for a manifest that says something else than this site knows, of a job that it did
    not agree to with this coordinator, or another than the one that it has signed of that run.
    """
    lines = folder.log.read().entries
    if not any(_of(line, AGREED, asked.job) and line.facts["coordinator"] == folder.coordinator for line in lines):
        raise SiteError(f"a manifest of {asked.job[:16]}, which was not agreed to with {folder.coordinator!a}")
    said = content_of(asked.manifest)
    owned, last, terms = _owned(folder, asked.job)
    if wrong := _unlike(folder, asked.job, said, last, terms):
        raise SiteError(f"the manifest of {asked.job[:16]} is not signed: {wrong}")
    result = sha256(body_of({key: value for key, value in said.items() if key not in _OTHERS})).hexdigest()
    if others := [line for line in lines if _of(line, SIGNED, asked.job) and line.facts["result"] != result]:
        raise SiteError(f"another result of {asked.job[:16]} was signed at {others[0].at}")
    signature = countersign(asked.manifest, folder.settings.name, owned, folder.signing)
    folder.note(SIGNED, digest=asked.job, result=result, manifest=sha256(asked.manifest).hexdigest())
    return RunSigned(signature)


def _of(line: SiteLine, event: str, job: str) -> bool:
    return line.event == event and line.facts.get("digest") == job


def _owned(folder: SiteFolder, job: str) -> tuple[Owned, dict[str, Any], str]:
    """What the receipts come to, the content of the last, and the text of its terms; every signature is checked."""
    path = receipts_path(folder.path, job)
    lines = list(read(path)) if path.is_file() else []
    if not lines:
        raise SiteError(f"there are no receipts of {job[:16]}")
    keys = tuple(dict.fromkeys(str(content["key"]) for content, _ in lines))
    text = next(str(content["text"]) for content, _ in reversed(lines) if content["kind"] == "terms")
    return Owned(keys=keys, receipts=len(lines), head=lines[-1][1]), lines[-1][0], text


def _unlike(folder: SiteFolder, job: str, said: dict[str, Any], last: dict[str, Any], terms: str) -> str:
    """What the manifest says otherwise than this site's receipts; "" if nothing. terms: their text."""
    name, hub = folder.settings.name, folder.hub_directory
    number, completed, claims, agreed = last.get("round", 0), said.get("completed"), claims_of(terms), rounds_of(terms)
    forms = {"parties": dict, "ledgers": dict, "code": dict, "gone": list}
    if strange := [key for key, form in forms.items() if not isinstance(said.get(key), form)]:
        return f"its {strange[0]} cannot be read"
    known = {
        "format": FORMAT,
        "version": VERSION,
        "rehearsal": folder.settings.rehearsal,
        "run": job,
        "kind": STATISTICS if claims["algorithm"] == STATISTICS else "federated",
        "terms": last["terms"],
        "claims": claims,
        "coordinator": hub[folder.coordinator].public_key.hex(),
    }
    if last.get("came") and number == completed:
        known["model"] = last["came"]
    for key, value in known.items():
        if said.get(key) != value or type(said.get(key)) is not type(value):
            return f"its {key} is {said.get(key)!a:.80}, expected {value!a:.80}"
    if type(completed) is not int or completed < number:
        return f"it is of {completed!a:.20} rounds, and there is a receipt of round {number}"
    if completed > agreed:  # of a round beyond the last no site would know the model
        return f"it is of {completed} rounds, and {agreed} were agreed on"
    if f"choral {said['code'].get('version')}" != version_here():
        return "it is of another version of Choral"
    parties = {name for offer in folder.offers.all() if offer.digest == job for name in offer.parties}
    if parties and parties ^ {*said["parties"], *map(str, said["gone"])}:
        return f"it is of other sites than the job, which is of {', '.join(sorted(parties))}"
    if name in said["gone"] or name in said["ledgers"]:
        return f"it calls {name} gone, or speaks of its ledger"
    return ""
