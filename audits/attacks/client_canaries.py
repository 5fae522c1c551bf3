"""Audit a federation by canary clients: trained once with them, and the claim held against the final model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from choral.audits.attacks.canaries import VISIBLE, directions, with_canary_clients
from choral.audits.attacks.score_audit import audit_training

if TYPE_CHECKING:
    import torch

    from choral.audits.findings.evidence import ScoreAudit
    from choral.audits.lower_bounds.guessing import Guessing
    from choral.privacy import ClientPrivacy
    from choral.trainers.run_folder.run import Run
    from choral.trainers.task.arithmetic import Compute
    from choral.trainers.task.task import Task


def audit_clients(
    task: Task,
    parties: Mapping[str, Any],
    *,
    rounds: int,
    privacy: ClientPrivacy,
    canaries: int,
    compute: Compute | None = None,
    confidence: float = 0.95,
    guessing: Guessing | None = None,
    **federation: Any,
) -> tuple[Run, ScoreAudit]:
    """Run ``federate`` with canary clients beside the real ones, and hold its claim against the final model.

    The promise of ``privacy`` is for all clients together, canaries included: it is the run that is audited, and its
    model is a little worse for them. Half of the canaries' updates are not zero, each ten clipping norms long.
    Adversary: knows the initial and the final model. federation: further arguments of ``federate``.

    Raises: TooFewCanariesError before any training; what ``federate`` and ``audit_scores`` raise.
    """
    from choral.privacy import AdaptiveClip
    from choral.trainers import Compute, federate
    from choral.trainers.local_steps.resident_model import initial_model
    from choral.trainers.task.flat_vector import Layout

    compute = Compute() if compute is None else compute
    model = initial_model(task.build, next(iter(parties.values())), compute.seed)
    layout = Layout(model)
    before = layout.read()
    clip = privacy.clip.start if isinstance(privacy.clip, AdaptiveClip) else privacy.clip
    updates = directions(canaries, layout.length)
    runs: list[Run] = []

    def train(chosen: list[Any]) -> torch.Tensor:
        inside = np.isin(np.arange(canaries), chosen)
        job = with_canary_clients(task.build, task.fit, parties, VISIBLE * float(clip) * updates, inside)
        watched = replace(task, build=job["build"], fit=job["fit"])
        runs.append(federate(watched, job["parties"], rounds=rounds, privacy=privacy, compute=compute, **federation))
        model.load_state_dict(runs[0].state)
        return layout.read() - before

    def score(change: torch.Tensor, _: Sequence[Any]) -> npt.NDArray[np.float64]:
        return (updates.double() @ change.cpu().double()).numpy()

    found = audit_training(
        train, score, range(canaries), delta=privacy.delta, claimed=privacy.epsilon, confidence=confidence,
        unit="client", guessing=guessing, attack="canary clients in gradient space",
    )  # fmt: skip
    return runs[0], found
