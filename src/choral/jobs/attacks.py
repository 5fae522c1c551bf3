"""Attacks that a comparison makes on its own arms: one more training of each, with canaries."""

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
from choral.jobs.training import (
    federation_of,
    load_task,
    privacy_of,
    task_of,
    trainer_of,
    tuned,
    unit_of,
    with_overrides,
)

if TYPE_CHECKING:
    import torch

    from choral.privacy import Privacy
    from choral.trainers import RoundRecord, Task


class Attempt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of an attack: its result, or in words why there is none."""

    result: ScoreAudit | None = None
    failed: str = ""


def attacked(settings: Settings, arm: Arm) -> bool:
    """Whether the settings ask for one more training of this arm, with canaries: records, or clients where each of them
    has the promise. Where every released step is attacked, the final model alone tells less, and is not."""
    return _canaries(settings, arm) > 0


def _canaries(settings: Settings, arm: Arm) -> int:
    if _of_clients(settings, arm):
        return settings.audit.clients
    return 0 if seen_in_every_step(settings, arm) else settings.audit.canaries


def _of_clients(settings: Settings, arm: Arm) -> bool:
    return arm.private and unit_of(settings, arm) == "client"


def attempt_file(settings: Settings, name: str, out: Path) -> Path:
    return out / "evidence" / f"{quote(name, safe='')}-{_canaries(settings, settings.arms[name])}-canaries.json"


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

    if _of_clients(settings, settings.arms[name]):
        return client_attack(settings, name, on_round)
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
    attacks: dict[str, list[ScoreAudit]] = {}
    for name in names:
        if seen_in_every_step(settings, settings.arms[name]):
            try:
                attacks[name] = [white_box(settings, name)]
            except Exception as error:  # of the user's code, too; the arm is unverified then
                failed[name] = f"{failed.get(name, '')} Canary gradients: {failure_of(error).reason}.".strip()
    for name, each in found.items():
        if each.result is not None:
            attacks.setdefault(name, []).append(each.result)
    return ArmEvidence(attacks=attacks, probes=probes, failed=failed)


def seen_in_every_step(settings: Settings, arm: Arm) -> bool:
    """Whether the settings ask for canary gradients in this arm: noise for each record, all of it the data owner's own.

    Of noise in shares, sums are attacked by the probe.
    """
    if not (settings.audit.white_box and arm.private and unit_of(settings, arm) == "record"):
        return False
    promise: Any = privacy_of(settings, arm, settings.privacy.epsilon)
    return bool(promise.noise == "local")


def white_box(settings: Settings, name: str) -> ScoreAudit:
    """Train one data owner's part of the arm once, with canary gradients beside its records, and look at every step.

    The pooled data, or the largest party alone: a canary's gradient depends on no weight, so what others add to the
    model between its steps changes nothing that is looked at. Sample rate, clipping norm, passes and budget are the
    arm's own, the records of its own data; the batch is larger in proportion to the canaries.

    Raises: ConfigError if the records are not (float tensor, class), or the loader has no batch size; what training
        raises.
    """
    from torch.utils.data import DataLoader

    from choral.audits.attacks.gradient_canaries import GradientCanaries
    from choral.privacy.ledgers.memory_notice import no_notice
    from choral.trainers.task.task import call, checked_build

    arm = settings.arms[name]
    own = with_overrides(settings, arm)
    task, training = task_of(own, load_task(own, own.seed)), own.training
    holder, data = _largest(task, pooled=arm.centralized)
    inputs, labels = _tensors(data)
    built, plain, loader = checked_build(task.build, data)
    if not isinstance(size := getattr(loader, "batch_size", None), int):
        raise ConfigError("the loader has no batch size", hint="leave audit.white_box out")
    beside = GradientCanaries(built, inputs, labels, canaries=own.audit.white_box)
    own_optimizer: Any = type(plain)
    optimizer = own_optimizer(beside.model.parameters(), **plain.defaults)
    beside.watch(optimizer)
    batch = min(max(round(size * len(beside.dataset) / len(inputs)), 1), len(beside.dataset))
    promise: Any = privacy_of(own, arm, own.privacy.epsilon)
    private = dataclasses.replace(promise, epochs=training.rounds * training.local_epochs)
    with no_notice():
        parts = private.wrap(beside.model, optimizer, DataLoader(beside.dataset, batch, shuffle=True))
        for number in range(1, training.rounds + 1):
            call(task.fit, parts[0], parts[1], parts[2], number)
    found = beside.audit(private.spent(), batch_size=batch, clip=float(own.privacy.max_grad_norm))
    return msgspec.structs.replace(found, attack=f"{found.attack} of {holder}")


def client_attack(settings: Settings, name: str, on_round: Callable[[RoundRecord], None] | None) -> ScoreAudit:
    """Train the arm once with canary clients beside its own, at the first seed and the headline budget.

    Sums are plain: the integers that are added up, noise included, are those of every other sum.
    """
    from choral.audits.attacks.client_canaries import attack_clients

    arm = dataclasses.replace(settings.arms[name], secure_sum="plain")
    own = with_overrides(settings, arm)
    promise: Any = privacy_of(own, arm, own.privacy.epsilon)
    train = trainer_of(own, arm, own.seed, own.privacy.epsilon)
    task = load_task(own, own.seed)
    return attack_clients(task, promise, own.audit.clients, own.seed, lambda made: train(made, on_round=on_round))


def _largest(task: Task, *, pooled: bool) -> tuple[str, Any]:
    from torch.utils.data import ConcatDataset

    if pooled:
        return "the pooled data", ConcatDataset(list(task.parties.values()))
    name = max(task.parties, key=lambda each: len(task.parties[each]))
    return name, task.parties[name]


def _tensors(data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All records, as float inputs and classes. Raises: ConfigError for others."""
    import torch

    records = [data[index] for index in range(len(data))]
    pair = records[0] if isinstance(records[0], tuple | list) and len(records[0]) == 2 else (None, None)
    if not (isinstance(pair[0], torch.Tensor) and pair[0].is_floating_point()):
        raise ConfigError(
            "canary gradients stand beside records that are (float tensor, class), and these are not",
            hint="leave audit.white_box out",
        )
    labels = torch.stack([torch.as_tensor(label) for _, label in records])
    if labels.is_floating_point() or labels.ndim != 1:
        raise ConfigError("canary gradients need classes, and these labels are none", hint="leave audit.white_box out")
    return torch.stack([features for features, _ in records]), labels
