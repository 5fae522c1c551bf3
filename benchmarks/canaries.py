"""Canary clients: secret directions (``choral.audits.attacks.canaries``) against samples crafted in the manner of
CANIFE.

    python benchmarks/canaries.py [--canaries 100] [--parties 20] [--round 5] [--noise 1.0] [--draws 200] [--seed 0]

A crafted canary is a client whose one record z was optimised so that the gradient of z is as long as the clipping norm
and orthogonal to the parties' updates (Maddock, Sablayrolles, Stock 2023), here known to the auditor as they are, which
favours it. Both kinds are clipped, added to the parties' clipped updates of one round of digits by a coin each, and
Gaussian noise of ``noise`` clipping norms is added to the sum; the statistic of both is the inner product of the sum
with the canary's own unit update. Crafted for the initial model: stale, since used in the later round.

One JSON line per kind: the share of the clipping norm that the statistic gains, what the parties and the other canaries
add to it (standard deviations, in clipping norms), the area under the curve and the one-run bound at delta 1e-5 (means
over draws of coins and noise, with standard errors). alone: a canary by itself, as CANIFE uses it: signal over noise.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.func import functional_call, grad, vmap

from choral.audits.attacks.canaries import directions, flip_coins
from choral.audits.lower_bounds import one_run
from choral.jobs.settings import Settings
from choral.trainers.data.sets.digits import load
from choral.trainers.task.settings import Split, Training

RATE, STEPS = 0.5, 300


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def shaped(model: nn.Module, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = zip(model.named_parameters(), torch.split(weights, sizes), strict=True)
    return {name: part.view_as(parameter) for (name, parameter), part in parts}


def updates_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The update of a client that makes one step on one record, for each record: shape (m, d)."""
    weights = flat(model)

    def loss(at: torch.Tensor, one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output = functional_call(model, shaped(model, at), (one[None],))
        return nn.functional.cross_entropy(output, label[None])

    return -RATE * vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)  # type: ignore[no-any-return]


def clipped(rows: torch.Tensor, clip: float) -> torch.Tensor:
    return rows * (clip / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)  # type: ignore[no-any-return]


def crafted(model: nn.Module, parties: torch.Tensor, y: torch.Tensor, clip: float) -> torch.Tensor:
    """Samples for these labels, shape (m, 64): sum of squared inner products, and of what is missing to the norm."""
    x = torch.rand(len(y), 64).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        own = updates_of(model, x, y)
        missing = (clip - own.norm(dim=1)).clamp(min=0.0)
        ((own @ parties.T / clip**2).square().sum(dim=1) + (missing / clip).square()).sum().backward()
        optimizer.step()
    return x.detach()


def measure(
    name: str, own: torch.Tensor, parties: torch.Tensor, clip: float, noise: float, draws: int
) -> dict[str, Any]:
    """Shapes: own (m, d), canaries' updates before clipping; parties (n, d), clipped."""
    unit, sent = own / own.norm(dim=1, keepdim=True), clipped(own, clip)
    m = len(own)
    gain = (sent * unit).sum(dim=1) / clip
    total = parties.sum(dim=0)
    disturbance = unit @ total / clip
    cross = (unit @ sent.T / clip).fill_diagonal_(0.0)
    others = (cross.square().sum(dim=1) / 4.0).sqrt()  # of fair coins
    areas, bounds = [], []
    for _ in range(draws):
        coins = flip_coins(m)
        held = torch.from_numpy(coins.astype(np.float32))
        seen = total + held @ sent + noise * clip * torch.randn(total.shape)
        scores = (unit @ seen).numpy()
        areas.append(roc_auc_score(coins, scores))
        order = np.argsort(scores)
        right = int((~coins[order[: m // 5]]).sum() + coins[order[-(m // 5) :]].sum())
        bounds.append(one_run.lower_bound(m, 2 * (m // 5), right, delta=1e-5, beta=0.05))
    spread = math.hypot(noise, float(disturbance.std()))
    return {
        "kind": name,
        "gain": float(gain.mean()),
        "parties": float(disturbance.std()),
        "other_canaries": float(others.mean()),
        "alone": float(gain.mean()) / spread,
        "auc": [float(np.mean(areas)), float(np.std(areas) / math.sqrt(draws))],
        "epsilon": [float(np.mean(bounds)), float(np.std(bounds) / math.sqrt(draws))],
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--canaries", type=int, default=100)
    parser.add_argument("--parties", type=int, default=20)
    parser.add_argument("--round", type=int, default=5)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and samples; coins are the system's")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    settings = Settings(split=Split(parties=chosen.parties, kind="iid"), training=Training(learning_rate=RATE))
    task = load(settings.split, settings.training, chosen.seed)
    model = task.build(next(iter(task.parties.values())))[0]

    def parties_at() -> torch.Tensor:
        before, rows = flat(model), []
        for data in task.parties.values():
            other, _, loader = task.build(data)
            other.load_state_dict(model.state_dict())
            task.fit(other, torch.optim.SGD(other.parameters(), lr=RATE), loader)
            rows.append(flat(other) - before)
        return torch.stack(rows)

    labels = torch.randint(0, 10, (chosen.canaries,))
    updates = parties_at()
    clip = float(updates.norm(dim=1).median())
    stale = crafted(model, clipped(updates, clip), labels, clip)
    for _ in range(chosen.round):
        moved = flat(model) + clipped(updates, clip).mean(dim=0)
        model.load_state_dict(shaped(model, moved))
        updates = parties_at()
    parties = clipped(updates, clip)
    fresh = crafted(model, parties, labels, clip)
    kinds = {
        "direction": 10.0 * clip * directions(chosen.canaries, parties.shape[1]),
        "crafted for this round": updates_of(model, fresh, labels).detach(),
        "crafted for the initial model": updates_of(model, stale, labels).detach(),
    }
    lines = [measure(name, own, parties, clip, chosen.noise, chosen.draws) for name, own in kinds.items()]
    for line in lines:
        print(json.dumps(line))
    return lines


if __name__ == "__main__":
    main()
