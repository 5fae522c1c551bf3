"""Evidence that ``choral audit`` gathers itself: the private trainer probed, and an update inverted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.jobs.run_task import task_of
from choral.jobs.training import load_module

if TYPE_CHECKING:
    import torch

    from choral.audits.findings.evidence import InversionAudit, Probe
    from choral.privacy import ClientPrivacy, Privacy
    from choral.trainers import Run

_FEWEST, _MOST = 3, 10  # parties of the sum that is attacked


def probe_trainer(
    run: Run | None, *, epsilon: float | None, delta: float | None, confidence: float, wrap: Path | None
) -> Probe:
    """Probe the trainer under the run's own promise, or under epsilon and delta without a run.

    wrap: a Python file with ``wrap(privacy)``, which is probed in the place of this library's.
    Raises: ConfigError for a promise that is not of records and independent noise, or none; what the probe raises.
    """
    from choral.audits.attacks.probing import probe

    privacy = _promise(run, epsilon, delta)
    if wrap is None:
        return probe(privacy, confidence=confidence)
    module = load_module(wrap, "a Python file with wrap(privacy)")
    if not callable(own := getattr(module, "wrap", None)):
        raise ConfigError(
            f"{wrap} has no function wrap",
            hint="wrap(privacy) returns a function (model, optimizer, loader) -> the three, made private",
        )
    return probe(privacy, wrap=own, confidence=confidence)


def _promise(run: Run | None, epsilon: float | None, delta: float | None) -> Privacy:
    from choral.privacy import AdaptiveClip, Privacy
    from choral.privacy.accounting.events import NEIGHBOURS

    said: dict[str, Any] = dict(run.info.privacy or {}) if run else {}
    if said.get("unit", "record") != "record":
        raise ConfigError(
            f"--probe is for promises to each record, and this run's is to each {said['unit']}",
            hint="leave it out: client-level noise is checked in the ledger and, if recorded, in the transcript",
        )
    if "mechanism" in said:
        raise ConfigError("--probe is for independent noise, and this run's repeats by design", hint="leave it out")
    budget = said.get("epsilon") if epsilon is None else epsilon
    probability = said.get("delta") if delta is None else delta
    if budget is None or probability is None:
        whose = "the run promises no privacy" if run else "there is no run whose promise could be probed"
        raise ConfigError(f"--probe: {whose}", hint="give --epsilon and --delta of the promise to be probed")
    clip: Any = float(said.get("max_grad_norm", 1.0))
    if "quantile" in said:
        names = {"quantile": "quantile", "rate": "clip_rate", "share": "clip_share"}
        clip = AdaptiveClip(start=clip, **{name: said[key] for name, key in names.items() if key in said})
    neighbours = str(said.get("neighbours", NEIGHBOURS))
    return Privacy(epsilon=float(budget), delta=float(probability), max_grad_norm=clip, neighbours=neighbours)


def invert_update(run: Run, folder: Path, *, task: Path | None, data_dir: Path | None) -> InversionAudit:
    """Invert a record's update of the run's final model, as it is sent, masked, in the sum, and in the sum with noise.

    The noise is that of the run's promise to clients, for one round; epsilon 8, delta 1e-5 without one.
    Raises: ConfigError for a run whose task cannot be loaded or whose records are no pictures.
    """
    from choral.audits.attacks.inversion import inversion_audit

    job = task_of(run, folder, task=task, data_dir=data_dir, in_python="audit(run, inversion=inversion_audit(...))")
    model = job.build(next(iter(job.parties.values())))[0]
    try:
        model.load_state_dict(dict(run.state))
    except RuntimeError as error:
        raise ConfigError(f"the weights in {folder} do not fit the task's model: {error}") from None
    inputs, labels = _records(job.parties)
    return inversion_audit(
        model,
        inputs,
        labels,
        shape=_shape(inputs),
        parties=min(max(run.info.party_count, _FEWEST), _MOST),
        privacy=_client_promise(run),
    )


def _client_promise(run: Run) -> ClientPrivacy | None:
    from choral.privacy import ClientPrivacy

    said: dict[str, Any] = dict(run.info.privacy or {})
    if said.get("unit") != "client":
        return None
    return ClientPrivacy(epsilon=float(said["epsilon"]), delta=float(said["delta"]), clip=float(said["clip"]))


def _records(parties: Any, most: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """At most so many records of all parties: inputs, shape (n, ...), and labels, shape (n,)."""
    import torch

    inputs, labels = [], []
    for dataset in parties.values():
        for index in range(min(len(dataset), -(-most // len(parties)))):
            record = dataset[index]
            if not (isinstance(record, tuple | list) and len(record) == 2 and torch.is_tensor(record[0])):
                raise ConfigError("--inversion: the records of this task are not pairs (picture, label)")
            inputs.append(record[0])
            labels.append(torch.as_tensor(record[1]))
    return torch.stack(inputs), torch.stack(labels)


def _shape(inputs: torch.Tensor) -> tuple[int, int]:
    """(height, width) of a record that is one picture of grey values. Raises: ConfigError for other records."""
    shape = tuple(inputs.shape[1:])
    if len(shape) >= 2 and math.prod(shape) == shape[-1] * shape[-2]:
        return shape[-2], shape[-1]
    side = math.isqrt(math.prod(shape))
    in_range = inputs.is_floating_point() and bool(((inputs >= 0.0) & (inputs <= 1.0)).all())
    if len(shape) == 1 and side * side == shape[0] and side > 2 and in_range:
        return side, side
    raise ConfigError(
        f"--inversion: records of shape {shape} are no pictures of grey values in [0, 1]",
        hint="it shows whether a picture can be rebuilt; leave it out for tables and texts",
    )
