"""Settings for the private configurations of examples/digits.toml, all chosen alike, and on other, public data.

Data: Fashion-MNIST in the digits' size (benchmarks/small_clothes.py), split among ten parties as the digits are. No
record of the digits is read, so no budget has to pay for the choice, and none of their test records is looked at.

Every configuration is trained at each combination of BATCHES and RATES, for SEEDS seeds and each budget, and scored on
5,000 test pictures. The best mean over seeds at each budget is printed, and the best over all budgets, which the TOML
file has, as it names one value for all. All make twenty passes. A batch size B is of all parties together: in a
federation whose parties train for themselves each takes B / 10, and federated SGD makes a pass of steps of B.

Trained by a simulation, many runs at a time: the network of `Training(hidden=32)`, Poisson batches, clipping by record,
the noise multipliers of Choral's accountants, Gaussian noise with the law of the sum (of shares: all ten parties', each
sized for h). What it picks is then trained by Choral itself, on the digits, for docs/noise-in-shares.md.

    CHORAL_DATA=DIR python benchmarks/tune_digits.py                  # JSON lines; three minutes of one core
    CHORAL_DATA=DIR python benchmarks/tune_digits.py --unit client    # of whole parties, at the headline budget alone
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from small_clothes import tables
from torch import nn

from choral.privacy.accounting.record_noise import noise_multiplier
from choral.trainers import Split
from choral.trainers.data.tables import shares_of

BATCHES, RATES = (64, 128, 256), (0.25, 0.5, 1.0, 2.0, 4.0)  # the grid
BUDGETS, DELTA, PASSES, PARTIES, HIDDEN = (1.0, 2.0, 4.0, 8.0), 1e-5, 20, 10, 32
SEEDS, HONEST = 5, (6, 8)  # honest survivors: the usual masked sum's, and with one dropout allowed
WIDTHS = ((64, HIDDEN), (HIDDEN,), (HIDDEN, 10), (10,))
Weights = list[torch.Tensor]  # each of shape (runs, ...)


def initial(runs: int) -> Weights:
    """Of torch's own distribution, another draw for each run."""
    models = [nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)) for _ in range(runs)]
    flat = [[model[0].weight.T, model[0].bias, model[2].weight.T, model[2].bias] for model in models]
    return [torch.stack(same).detach() for same in zip(*flat, strict=True)]


def drawn(sizes: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Poisson draw for each run: places below its size, shape (runs, K), and which of them count."""
    counts = torch.binomial(sizes.double(), rate.double()).long()
    most = max(int(counts.max()), 1)
    keys = torch.rand(len(sizes), int(sizes.max()))
    keys[torch.arange(keys.shape[1]) >= sizes[:, None]] = 2.0
    return keys.argsort(dim=1)[:, :most], torch.arange(most) < counts[:, None]


def clipped_sum(weights: Weights, x: torch.Tensor, y: torch.Tensor, counted: torch.Tensor, clip: float) -> Weights:
    """The sum over the records that count of their gradients of norm `clip` at most. x: (runs, K, 64); y: (runs, K)."""
    w1, b1, w2, b2 = weights
    hidden = torch.tanh(x @ w1 + b1[:, None])
    out = torch.softmax(hidden @ w2 + b2[:, None], dim=2)
    out.scatter_add_(2, y[..., None], torch.full_like(y[..., None], -1, dtype=out.dtype))
    back = out @ w2.transpose(1, 2) * (1 - hidden**2)
    norms = (out**2).sum(2) * ((hidden**2).sum(2) + 1) + (back**2).sum(2) * ((x**2).sum(2) + 1)
    factor = (counted * (clip / norms.sqrt().clamp(min=clip)))[..., None]
    out, back = out * factor, back * factor
    return [x.transpose(1, 2) @ back, back.sum(1), hidden.transpose(1, 2) @ out, out.sum(1)]


def accuracy(weights: Weights, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each run, in per cent."""
    found = []
    for w1, b1, w2, b2 in zip(*weights, strict=True):
        found.append(100.0 * (torch.tanh(x @ w1 + b1) @ w2 + b2).argmax(1).eq(y).float().mean())
    return torch.stack(found)


def along(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value for each run, so that it multiplies its tensor."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def pooled(batch: int, rates: torch.Tensor, epsilon: float, honest: int | None) -> torch.Tensor:
    """DP-SGD on pooled records; `honest` of ten parties' shares are sized for the noise, or all is one's own (None)."""
    train, test = tables()
    runs, records = len(rates), len(train)
    steps = PASSES * math.ceil(records / batch)
    noise = noise_multiplier(epsilon, DELTA, batch / records, steps) * (PARTIES / honest if honest else 1.0) ** 0.5
    weights = initial(runs)
    for _ in range(steps):
        at, counted = drawn(torch.full((runs,), records), torch.full((runs,), batch / records))
        total = clipped_sum(weights, train.features[at], train.labels[at], counted, 1.0)
        for weight, gradient in zip(weights, total, strict=True):
            weight -= along(rates, weight) * (gradient + noise * torch.randn_like(gradient)) / batch
    return accuracy(weights, test.features, test.labels)


def averaged(batch: int, rates: torch.Tensor, epsilon: float, unit: str, seed: int) -> torch.Tensor:
    """FedAvg of ten parties: each adds its own noise to its steps ("record"), or updates are clipped and noisy."""
    train, test = tables()
    parts = list(shares_of(train, Split(parties=PARTIES, alpha=0.5), seed).values())
    runs, sizes = len(rates), torch.tensor([len(part) for part in parts])
    places = torch.stack([torch.nn.functional.pad(part, (0, int(sizes.max()) - len(part))) for part in parts])
    steps = torch.ceil(sizes / round(batch / PARTIES)).long()
    noise = torch.zeros(PARTIES)
    if unit == "record":
        own = [noise_multiplier(epsilon, DELTA, 1 / count, PASSES * count) for count in steps.tolist()]
        noise = torch.tensor(own)
    share = sizes / sizes.sum() if unit == "record" else torch.full((PARTIES,), 1 / PARTIES)
    each = {name: value.repeat(runs) for name, value in (("sizes", sizes), ("steps", steps), ("noise", noise))}
    at_parties, rates_there = places.repeat(runs, 1), rates.repeat_interleave(PARTIES)
    clip, client_noise = (1.0, 0.0) if unit == "record" else (1e9, noise_multiplier(epsilon, DELTA, 1.0, PASSES))
    weights = initial(runs)
    for _ in range(PASSES):
        local = [weight.repeat_interleave(PARTIES, 0) for weight in weights]
        for step in range(int(steps.max())):
            at, counted = drawn(each["sizes"], 1 / each["steps"])
            rows = at_parties.gather(1, at)
            total = clipped_sum(local, train.features[rows], train.labels[rows], counted, clip)
            pace = rates_there * (step < each["steps"]) * each["steps"] / each["sizes"]
            for weight, gradient in zip(local, total, strict=True):
                noisy = gradient + along(each["noise"], gradient) * torch.randn_like(gradient)
                weight -= along(pace, weight) * noisy
        updates = [(new.unflatten(0, (runs, PARTIES)) - old[:, None]) for new, old in zip(local, weights, strict=True)]
        if unit == "client":
            norms = sum((update.flatten(2) ** 2).sum(2) for update in updates) ** 0.5
            updates = [
                update * (1 / norms.clamp(min=1.0)).reshape(runs, PARTIES, *[1] * (update.ndim - 2))
                for update in updates
            ]
        for weight, update in zip(weights, updates, strict=True):
            weight += (update * share.reshape(1, -1, *[1] * (update.ndim - 2))).sum(1)
            weight += client_noise * (PARTIES / HONEST[0]) ** 0.5 / PARTIES * torch.randn_like(weight)
    return accuracy(weights, test.features, test.labels)


def scores(arm: str, batch: int, epsilon: float) -> torch.Tensor:
    """Mean accuracy at each rate, and so over SEEDS runs of it."""
    rates = torch.tensor(RATES).repeat(SEEDS)
    if arm in ("federated-dp", "federated-client"):
        unit = "record" if arm == "federated-dp" else "client"
        found = [averaged(batch, torch.tensor(RATES), epsilon, unit, seed) for seed in range(SEEDS)]
        return torch.stack(found).mean(0)
    honest = None if arm == "cloud-dp" else int(arm.split("h = ")[1])
    return pooled(batch, rates, epsilon, honest).unflatten(0, (SEEDS, len(RATES))).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--unit", choices=["record", "client"], default="record", help="of the promises")
    unit = parser.parse_args().unit
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shares = [f"federated-dp-shares, h = {honest}" for honest in HONEST]
    for arm in ("cloud-dp", *shares, "federated-dp") if unit == "record" else ("federated-client",):
        budgets = BUDGETS if unit == "record" else (8.0,)
        found = {epsilon: torch.stack([scores(arm, batch, epsilon) for batch in BATCHES]) for epsilon in budgets}
        for epsilon, table in (*found.items(), ("all", torch.stack(list(found.values())).mean(0))):
            best = int(table.argmax())
            chosen = {"batch_size": BATCHES[best // len(RATES)], "learning_rate": RATES[best % len(RATES)]}
            line = {"arm": arm, "epsilon": epsilon, **chosen, "accuracy": round(float(table.max()), 2)}
            print(json.dumps(line | {"table": [[round(x, 1) for x in row] for row in table.tolist()]}), flush=True)


if __name__ == "__main__":
    main()
