"""How much an overfitted model tells of who was in its training: LiRA and RMIA, against an independent implementation.

    python benchmarks/membership.py [--data adult|fashion] [--records 4000] [--shadows 64] [--epochs 300] [--seed 0]
    python benchmarks/membership.py --few [...]

One target and as many shadow models train on halves of the records, drawn by coins, until they know them by heart. All
attacks are on that one target. Ours: shadows and scores by ``choral.audits``. Independent: shadows on other coins,
trained and scored by plain numpy, which shares no code with ours: backpropagation by hand, and the formulas of the
papers record by record. One JSON line per attack: the area under the curve with DeLong's interval, true-positive rates
at 1 % and 0.1 % false positives with Clopper-Pearson's, the independent area, that of our scores on the independent
shadows, and the difference of the first two with a paired bootstrap interval over records (95 % each).

--few: BaVarIA beside LiRA and RMIA with the first 4, 8, 16 and so on of the shadows, whose coins come in pairs of
opposite ones, so that every record is in half of any of these.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from choral.audits.attacks import membership
from choral.audits.attacks.shadow_models import train_shadows
from choral.audits.lower_bounds.roc import roc

DATA = Path(__file__).parents[1] / "../shared/data"
WIDTH, BATCH, RATE, MOMENTUM = 128, 50, 0.1, 0.9
ATTACKS = ("loss", "LiRA", "LiRA, one variance", "LiRA, offline", "RMIA", "RMIA, offline")


def records(data: str, count: int, data_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` training records and half as many more, for RMIA's population."""
    from choral.trainers.data.sets import adult, fashion

    train, _ = adult.read_adult(data_dir) if data == "adult" else fashion.read_fashion(data_dir)
    x, y = train.features[: count + count // 2], train.labels[: count + count // 2]
    return (nn.functional.avg_pool2d(x, 2) if data == "fashion" else x).flatten(1), y


def shadow_logits(x: torch.Tensor, y: torch.Tensor, members: Any, epochs: int, seed: int) -> Any:
    """Every model's logits on all records, float64, shape (models, records and population, classes)."""
    count, classes = members.shape[1], int(y.max()) + 1
    shadows = train_shadows(
        lambda: nn.Sequential(nn.Linear(x.shape[1], WIDTH), nn.Tanh(), nn.Linear(WIDTH, classes)),
        x[:count],
        y[:count],
        members,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=RATE, momentum=MOMENTUM),
        steps=epochs * count // 2 // BATCH,
        batch_size=BATCH,
        seed=seed,
        device="cpu",
    )
    return shadows.outputs(x).double().numpy()


def ours(logits: Any, y: Any, known: Any) -> dict[str, Any]:
    """Scores by every attack on the last model's records."""
    count = known.shape[1]
    own, rest = logits[:, :count], logits[:, count:]
    phi = membership.logit_gap(own, y[:count])
    p, q = membership.confidences(own, y[:count]), membership.confidences(rest, y[count:])
    return {
        "loss": membership.loss_threshold(own[-1], y[:count]),
        "LiRA": membership.lira_online(phi[-1], phi[:-1], known),
        "LiRA, one variance": membership.lira_online(phi[-1], phi[:-1], known, fixed_variance=True),
        "LiRA, offline": membership.lira_offline(phi[-1], phi[:-1], known),
        "RMIA": membership.rmia(p[-1], p[:-1], known, q[-1], q[:-1]),
        "RMIA, offline": membership.rmia(p[-1], p[:-1], known, q[-1], q[:-1], offline=0.3),
    }


# -- the independent implementation: numpy and the standard library, nothing of choral, torch or scipy -----------------


def by_hand(logits: Any, y: Any, members: Any) -> dict[str, Any]:
    """The same scores from such logits, one record at a time."""
    count = members.shape[1]
    phi, p = np.empty(logits.shape[:2]), np.empty(logits.shape[:2])
    for model, rows in enumerate(logits):
        for i, (row, label) in enumerate(zip(rows, y, strict=True)):
            others = [value for j, value in enumerate(row) if j != label]
            top = max(others)
            phi[model, i] = row[label] - top - math.log(sum(math.exp(value - top) for value in others))
            p[model, i] = 1.0 / (1.0 + math.exp(-phi[model, i])) if phi[model, i] > -700 else 0.0
    inside = [phi[:-1, i][members[:, i]] for i in range(count)]
    outside = [phi[:-1, i][~members[:, i]] for i in range(count)]
    spread_in = np.concatenate([side - side.mean() for side in inside]).std()
    spread_out = np.concatenate([side - side.mean() for side in outside]).std()
    population = p[:, count:]
    usual = population[:-1].mean(axis=0)
    ratios = np.sort(population[-1] / usual)
    offline_ratios = np.sort(population[-1] / ((1.3 * usual + 0.7) / 2))
    found: dict[str, list[float]] = {name: [] for name in ATTACKS}
    for i in range(count):
        a, b, t = inside[i], outside[i], phi[-1, i]
        found["loss"].append(math.log(p[-1, i] + 1e-300))
        found["LiRA"].append(_normal(t, a.mean(), a.std()) - _normal(t, b.mean(), b.std()))
        found["LiRA, one variance"].append(_normal(t, a.mean(), spread_in) - _normal(t, b.mean(), spread_out))
        found["LiRA, offline"].append((t - b.mean()) / b.std())
        p_in, p_out = p[:-1, i][members[:, i]].mean(), p[:-1, i][~members[:, i]].mean()
        found["RMIA"].append(np.searchsorted(ratios, p[-1, i] / ((p_in + p_out) / 2)))
        found["RMIA, offline"].append(np.searchsorted(offline_ratios, p[-1, i] / ((1.3 * p_out + 0.7) / 2)))
    return {name: np.array(scores) for name, scores in found.items()}


def _normal(value: float, mean: float, deviation: float) -> float:
    return -(((value - mean) / deviation) ** 2) / 2 - math.log(deviation)


def trained_by_hand(x: Any, y: Any, row: Any, epochs: int, rng: np.random.Generator, shown: Any) -> Any:
    """Logits on ``shown`` of a network of one tanh layer, by stochastic gradient descent with momentum."""
    own = np.flatnonzero(row)
    bounds = (x.shape[1] ** -0.5, WIDTH**-0.5)
    sizes = ((x.shape[1], WIDTH), (WIDTH,), (WIDTH, int(y.max()) + 1), (int(y.max()) + 1,))
    weights = [rng.uniform(-bound, bound, size).astype(np.float32)
               for bound, size in zip((bounds[0], bounds[0], bounds[1], bounds[1]), sizes, strict=True)]  # fmt: skip
    speed = [np.zeros_like(weight) for weight in weights]
    needed = epochs * len(x) // 2 // BATCH * BATCH
    order = np.concatenate([rng.permutation(own) for _ in range(-(-needed // len(own)))])[:needed]
    for batch in order.reshape(-1, BATCH):
        inputs, hidden = x[batch], np.tanh(x[batch] @ weights[0] + weights[1])
        scores = hidden @ weights[2] + weights[3]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = scores / scores.sum(axis=1, keepdims=True)
        error[np.arange(BATCH), y[batch]] -= 1.0
        error /= BATCH
        back = (error @ weights[2].T) * (1.0 - hidden**2)
        gradients = (inputs.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0))
        for weight, velocity, gradient in zip(weights, speed, gradients, strict=True):
            velocity *= MOMENTUM
            velocity += gradient
            weight -= RATE * velocity
    return (np.tanh(shown @ weights[0] + weights[1]) @ weights[2] + weights[3]).astype(np.float64)


def area(scores: Any, truth: Any) -> float:
    """Mann-Whitney's statistic: the share of pairs in order, ties counted half."""
    members, others = scores[truth], np.sort(scores[~truth])
    below, upto = np.searchsorted(others, members), np.searchsorted(others, members, side="right")
    return float((below + upto).sum() / (2 * len(members) * len(others)))


def difference(one: Any, other: Any, truth: Any, rng: np.random.Generator, draws: int = 400) -> tuple[float, float]:
    """95 % paired bootstrap interval, over records, of the difference of two areas."""
    found = []
    for _ in range(draws):
        drawn = rng.integers(0, len(truth), len(truth))
        found.append(area(one[drawn], truth[drawn]) - area(other[drawn], truth[drawn]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def with_few(x: torch.Tensor, y: torch.Tensor, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per number of shadows and attack, all on one target."""
    rng = np.random.default_rng(chosen.seed)
    half = rng.random((chosen.shadows // 2, chosen.records)) < 0.5
    known = np.stack([half, ~half], axis=1).reshape(-1, chosen.records)
    truth = rng.random(chosen.records) < 0.5
    started = time.process_time()
    logits = shadow_logits(x, y, np.concatenate([known, truth[None]]), chosen.epochs, chosen.seed)
    lines: list[dict[str, Any]] = [{"data": chosen.data, "cpu_seconds": time.process_time() - started}]
    for few in (count for count in (4, 8, 16, 32, 64) if count <= len(known)):
        some = np.concatenate([logits[:few], logits[-1:]])
        phi = membership.logit_gap(some[:, : chosen.records], y[: chosen.records])
        scores = ours(some, y, known[:few]) | {
            "BaVarIA": membership.bavaria(phi[-1], phi[:-1], known[:few]),
            "BaVarIA, offline": membership.bavaria(phi[-1], phi[:-1], known[:few], offline=True),
        }
        for name, values in scores.items():
            found = roc(values, truth)
            line: dict[str, Any] = {"shadows": few, "attack": name}
            line["auc"] = [found.auc.value, found.auc.low, found.auc.high]
            for at in found.at:
                line[f"tpr_at_{100 * at.wanted:g}_percent_fpr"] = at.true_positive_rate.value
            lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", choices=("adult", "fashion"), default="adult")
    parser.add_argument("--data-dir", type=Path, default=DATA)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--shadows", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of coins, weights and order; nothing here is private")
    parser.add_argument("--few", action="store_true", help="BaVarIA, LiRA and RMIA by the number of shadows")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    x, y = records(chosen.data, chosen.records, chosen.data_dir)
    if chosen.few:
        few = with_few(x, y, chosen)
        for found in few:
            print(json.dumps(found))
        return few
    rng = np.random.default_rng(chosen.seed)
    coins = rng.random((2 * chosen.shadows + 1, chosen.records)) < 0.5
    truth = coins[chosen.shadows]
    started = time.process_time()
    logits = shadow_logits(x, y, coins[: chosen.shadows + 1], chosen.epochs, chosen.seed)
    mine = ours(logits, y, coins[: chosen.shadows])
    trained = time.process_time()
    features, labels = x.numpy(), y.numpy()
    alone = [trained_by_hand(features[: chosen.records], labels[: chosen.records], row, chosen.epochs, rng, features)
             for row in coins[chosen.shadows + 1 :]]  # fmt: skip
    others = np.stack([*alone, logits[-1]])
    theirs = by_hand(others, labels, coins[chosen.shadows + 1 :])
    crossed = ours(others, y, coins[chosen.shadows + 1 :])
    seconds = (trained - started, time.process_time() - trained)
    right = logits[-1, : chosen.records].argmax(axis=1) == labels[: chosen.records]
    lines: list[dict[str, Any]] = [
        {"data": chosen.data, "records": chosen.records, "shadows": chosen.shadows, "epochs": chosen.epochs,
         "accuracy_members": float(right[truth].mean()), "accuracy_others": float(right[~truth].mean()),
         "cpu_seconds_ours": seconds[0], "cpu_seconds_independent": seconds[1]}
    ]  # fmt: skip
    for name in ATTACKS:
        curve = roc(mine[name], truth)
        line: dict[str, Any] = {"attack": name, "auc": [curve.auc.value, curve.auc.low, curve.auc.high]}
        for at in curve.at:
            rate = at.true_positive_rate
            line[f"tpr_at_{100 * at.wanted:g}_percent_fpr"] = [rate.value, rate.low, rate.high]
        line["auc_independent"] = area(theirs[name], truth)
        line["auc_of_our_scores_on_its_shadows"] = area(crossed[name], truth)
        line["difference"] = [line["auc"][0] - line["auc_independent"],
                              *difference(mine[name], theirs[name], truth, rng)]  # fmt: skip
        lines.append(line)
    for line in lines:
        print(json.dumps(line))
    return lines


if __name__ == "__main__":
    main()
