"""The user's evaluation of a model between rounds."""

from __future__ import annotations

import torch
from torch import nn

from choral.trainers.task.seeding import seeded
from choral.trainers.task.task import Evaluate, TaskError, metrics_of


def evaluated(evaluate: Evaluate, model: nn.Module, seed: int) -> dict[str, float]:
    """What `metrics_of` returns, of an evaluation that draws the same random numbers after each round.

    Raises: as that does; TaskError if the evaluation changed the model, which is what would be recorded.
    """
    frozen = {name: (p, p._version) for name, p in model.named_parameters() if not p.requires_grad}
    others = {name: t.detach().clone() for name, t in model.state_dict().items() if name not in frozen}
    with seeded(seed, 0, "evaluation"):
        metrics = metrics_of(evaluate, model)
    now = model.state_dict()
    changed = [name for name, kept in others.items() if name not in now or not torch.equal(now[name], kept)]
    changed += [name for name, (parameter, version) in frozen.items() if parameter._version != version]
    if changed:
        raise TaskError(
            f"evaluate changed {changed[0]!r} of the model that is being trained", hint="evaluate a copy of it instead"
        )
    return metrics
