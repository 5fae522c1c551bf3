"""Attacks that a comparison makes on its own arms: one more training of each, with canary records."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from choral.audits.findings.door import ArmEvidence
from choral.audits.findings.evidence import Probe, ScoreAudit
from choral.errors import ConfigError
from choral.failures import failure_of
from choral.jobs.settings import Arm, Settings
from choral.jobs.standardising import as_trained
from choral.jobs.training import federation_of, load_task, privacy_of, trainer_of, tuned, unit_of, with_overrides

if TYPE_CHECKING:
    import torch

    from choral.privacy import Privacy
    from choral.trainers import RoundRecord, Task


class Attempt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of an attack: its result, or in words why there is none."""

    result: ScoreAudit | None = None
    failed: str = ""


def attacked(settings: Settings, arm: Arm) -> bool:
    """Whether the settings ask for canaries in this arm. They are records: a promise for each client is not tested."""
    return settings.audit.canaries > 0 and not (arm.private and unit_of(settings, arm) == "client")


def attempt_file(settings: Settings, name: str, out: Path) -> Path:
    return out / "evidence" / f"{quote(name, safe='')}-{settings.audit.canaries}-canaries.json"


def evidence_files(name: str, out: Path) -> list[Path]:
    """What came of all attacks on an arm, by any number of canaries."""
    own = re.compile(re.escape(quote(name, safe="")) + r"-[0-9]+-canaries\.json")
    return [file for file in (out / "evidence").glob("*.json") if own.fullmatch(file.name)]


def attempt(settings: Settings, name: str, out: Path, run: Path, on_round: Callable[[RoundRecord], None]) -> None:
    """Attack one arm and keep what came of it. A result that is there already, or a damaged file, is left as it is; an
    attack that failed is tried again. run: as for `one_run`.
    """
    from choral.trainers.run_folder.folder import replace_file

    file = attempt_file(settings, name, out)
    if file.is_file() and not (isinstance(before := _kept(file), Attempt) and before.failed):
        return
    try:
        made = Attempt(result=one_run(settings, name, on_round, run=run))
    except (Exception, SystemExit) as error:  # of the user's code, too; the arm's own runs do not depend on it
        made = Attempt(failed=f"{failure_of(error).reason}.")
    file.parent.mkdir(exist_ok=True)
    replace_file(file, msgspec.json.encode(made))


def read_attempt(settings: Settings, name: str, out: Path) -> Attempt:
    """What came of an attack. A file that is missing, or damaged (it may be an edit), counts as a failed attack."""
    file = attempt_file(settings, name, out)
    if not file.is_file():
        return Attempt(failed="It was not made.")
    found = _kept(file)
    if isinstance(found, Attempt):
        return found
    return Attempt(failed=f"{file.name} is damaged: {found}. Once it is deleted, --resume makes the attack again.")


def _kept(file: Path) -> Attempt | str:
    """What the file holds, or why it cannot be read."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Attempt)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        return str(error)
    if (found.result is None) == (not found.failed):
        return "expected either a result, or why there is none"
    return found


def one_run(
    settings: Settings, name: str, on_round: Callable[[RoundRecord], None] | None = None, *, run: Path
) -> ScoreAudit:
    """Train the arm once, at the first seed and the headline budget, with canaries among its parties' records.

    Each canary is in or out by a coin of its own, and belongs to one party, the next to the next; its score is minus
    its loss under the final model, which is all that this adversary sees. Steinke, Nasr, Jagielski 2023. The promise is
    that of the run with the canaries. Without privacy there is no claim: the bound shows what the attack can find.
    run: the folder of the arm's own run, whose tuning, if it has any, is taken; tuned again where there is none yet.

    Raises: ConfigError if the records are not (float tensor, class); what training raises.
    """
    from choral.audits.attacks.canaries import flip_coins, loss_scores, record_canaries
    from choral.audits.attacks.score_audit import audit_scores

    arm, seed, count = settings.arms[name], settings.seed, settings.audit.canaries
    settings = tuned(with_overrides(settings, arm), arm, seed, run, resume=True)[0]
    task = load_task(settings, seed)
    shape, classes = _kind_of_records(task)
    canaries = record_canaries(count, shape, classes)
    inside = flip_coins(count)
    hosts = list(task.parties)
    chosen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {host: [] for host in hosts}
    for number, canary in enumerate(canaries):
        if inside[number]:
            chosen[hosts[number % len(hosts)]].append(canary)
    parties = {host: _with_records(dataset, chosen[host]) for host, dataset in task.parties.items()}
    train = trainer_of(settings, arm, seed, settings.privacy.epsilon if arm.private else None)
    made = train(dataclasses.replace(task, parties=parties), on_round=on_round)
    model = as_trained(settings, task).build(task.parties[hosts[0]])[0]
    model.load_state_dict(made.state)
    return audit_scores(
        loss_scores(model, canaries),
        inside,
        design="coins",
        delta=made.spent.delta if made.spent else settings.privacy.delta,
        claimed=made.spent.epsilon if made.spent else None,
        attack="canary records against the final model",
    )


def probes_of(settings: Settings, names: Sequence[str]) -> tuple[dict[str, Probe], dict[str, str]]:
    """A probe of each arm's record-level promise, if asked for, and of which arms there is none and why.

    Arms with the same promise share one.
    """
    from choral.privacy import Privacy

    made: dict[Any, Probe | str] = {}
    found: dict[str, Probe] = {}
    failed: dict[str, str] = {}
    for name in names:
        arm = settings.arms[name]
        if not (settings.audit.probe and arm.private):
            continue
        promise = privacy_of(settings, arm, settings.privacy.epsilon)
        if not isinstance(promise, Privacy):
            continue  # the probe is of promises for each record
        whose = name if promise.noise == "distributed" else ""  # another sum, other survivors
        key = (promise.epsilon, promise.delta, promise.max_grad_norm, promise.epochs, whose)
        if key not in made:
            try:
                made[key] = _probe(settings, arm, promise)
            except Exception as error:  # the arm is unverified then, and the others are reported
                made[key] = f"Probe: {failure_of(error).reason}."
        if isinstance(one := made[key], str):
            failed[name] = one
        else:
            found[name] = one
    return found, failed


def _probe(settings: Settings, arm: Arm, promise: Privacy) -> Probe:
    """Of one trainer with all of its own noise; of noise in shares, of as many parties as a sum is opened over."""
    from choral.audits.attacks.probing import probe
    from choral.audits.attacks.probing_shares import probe_shares
    from choral.trainers.federated.record_shares.checks import fewest_survivors

    if promise.noise == "local":
        return probe(promise)
    own = with_overrides(settings, arm)
    job = federation_of(own, arm, load_task(own, settings.seed), promise)
    names = list(job["task"].parties)
    fewest = fewest_survivors(job["secure_sum"], job["participation"], names)
    return probe_shares(promise, parties=len(names), min_survivors=fewest)


def _kind_of_records(task: Task) -> tuple[tuple[int, ...], int]:
    """The shape of a record's features, and how many classes there are."""
    import torch

    from choral.trainers.task.task import labels_of

    record = next(iter(task.parties.values()))[0]
    labels = [labels_of(dataset) for dataset in task.parties.values()]
    features = record[0] if isinstance(record, tuple | list) and len(record) == 2 else None
    if (
        not isinstance(features, torch.Tensor)
        or not features.is_floating_point()
        or any(each is None for each in labels)
    ):
        raise ConfigError(
            "canaries are made of noise under a random class, and these records are not (float tensor, class)",
            hint="leave audit.canaries out, or audit the task by canaries of its own: choral audit --model",
        )
    return tuple(features.shape), max(int(each.max()) for each in labels if each is not None) + 1


def _with_records(dataset: Any, more: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    import torch
    from torch.utils.data import ConcatDataset, TensorDataset

    if not more:
        return dataset
    features, labels = torch.stack([x for x, _ in more]), torch.stack([y for _, y in more])
    if type(dataset) is TensorDataset:
        own = dataset.tensors
        return TensorDataset(torch.cat([own[0], features.to(own[0])]), torch.cat([own[1], labels.to(own[1])]))
    return ConcatDataset([dataset, TensorDataset(features, labels)])


def evidence_of(settings: Settings, names: Sequence[str], out: Path) -> ArmEvidence:
    """Attacks and probes for ``compare``, of the arms that it is given, and why some could not be made."""
    found = {name: read_attempt(settings, name, out) for name in names if attacked(settings, settings.arms[name])}
    probes, unprobed = probes_of(settings, names)
    failed = {name: each.failed for name, each in found.items() if each.failed}
    for name, reason in unprobed.items():
        failed[name] = f"{failed[name]} {reason}" if name in failed else reason
    attacks = {name: [each.result] for name, each in found.items() if each.result is not None}
    return ArmEvidence(attacks=attacks, probes=probes, failed=failed)
