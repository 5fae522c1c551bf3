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
    CHORAL_DATA=DIR python benchmarks/tune_digits.py --wide --epsilons 1 2 4 8    # a wider grid; twenty minutes each

`--wide` also tries 512 records a batch, 40 passes, a rate that falls by a cosine, and other clipping norms; rates are
then those of a clipping norm of 1, and are divided by the norm. It leaves out h = 6, which is the TOML file's.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from itertools import product

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
WIDE_BATCHES, WIDE_PASSES, CLIPS, WIDE_RATES = (64, 128, 256, 512), (20, 40), (0.3, 1.0, 3.0), (0.25, 0.5, 1, 2, 4, 8)
Weights = list[torch.Tensor]  # each of shape (runs, ...)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs that are trained side by side: of each its learning rate, its clipping norm, and whether the rate falls."""

    rates: torch.Tensor
    clips: torch.Tensor
    cosine: torch.Tensor

    @classmethod
    def of(cls, rates: torch.Tensor) -> Runs:
        """At clipping norm 1, at a constant rate."""
        return cls(rates=rates, clips=torch.ones_like(rates), cosine=torch.zeros(len(rates), dtype=torch.bool))

    def each(self, times: int) -> Runs:
        """The same with every run `times` times, one after another."""
        return Runs(
            rates=self.rates.repeat_interleave(times),
            clips=self.clips.repeat_interleave(times),
            cosine=self.cosine.repeat_interleave(times),
        )

    def pace(self, done: int, passes: int) -> torch.Tensor:
        """The rate of each run after so many passes, as `Schedule(kind="cosine")` has it where it falls."""
        return self.rates * torch.where(self.cosine, (1.0 + math.cos(math.pi * done / passes)) / 2.0, 1.0)


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


def clipped_sum(
    weights: Weights, x: torch.Tensor, y: torch.Tensor, counted: torch.Tensor, clips: torch.Tensor
) -> Weights:
    """The sum over the records that count of their gradients, each clipped. x: (runs, K, 64); y: (runs, K)."""
    w1, b1, w2, b2 = weights
    hidden = torch.tanh(x @ w1 + b1[:, None])
    out = torch.softmax(hidden @ w2 + b2[:, None], dim=2)
    out.scatter_add_(2, y[..., None], torch.full_like(y[..., None], -1, dtype=out.dtype))
    back = out @ w2.transpose(1, 2) * (1 - hidden**2)
    norms = (out**2).sum(2) * ((hidden**2).sum(2) + 1) + (back**2).sum(2) * ((x**2).sum(2) + 1)
    clips = clips[:, None]
    factor = (counted * (clips / torch.maximum(norms.sqrt(), clips)))[..., None]
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


def pooled(batch: int, passes: int, runs: Runs, epsilon: float, honest: int | None) -> torch.Tensor:
    """DP-SGD on pooled records; `honest` of ten parties' shares are sized for the noise, or all is one's own (None)."""
    train, test = tables()
    count, records = len(runs.rates), len(train)
    each = math.ceil(records / batch)
    noise = noise_multiplier(epsilon, DELTA, batch / records, passes * each) * (PARTIES / (honest or PARTIES)) ** 0.5
    weights = initial(count)
    for step in range(passes * each):
        at, counted = drawn(torch.full((count,), records), torch.full((count,), batch / records))
        total = clipped_sum(weights, train.features[at], train.labels[at], counted, runs.clips)
        pace = runs.pace(step // each, passes) / batch
        for weight, gradient in zip(weights, total, strict=True):
            noisy = gradient + along(runs.clips, gradient) * noise * torch.randn_like(gradient)
            weight -= along(pace, weight) * noisy
    return accuracy(weights, test.features, test.labels)


def averaged(batch: int, passes: int, runs: Runs, epsilon: float, unit: str, seed: int) -> torch.Tensor:
    """FedAvg of ten parties: each adds its own noise to its steps ("record"), or updates are clipped and noisy."""
    train, test = tables()
    parts = list(shares_of(train, Split(parties=PARTIES, alpha=0.5), seed).values())
    count, sizes = len(runs.rates), torch.tensor([len(part) for part in parts])
    places = torch.stack([torch.nn.functional.pad(part, (0, int(sizes.max()) - len(part))) for part in parts])
    steps = torch.ceil(sizes / round(batch / PARTIES)).long()
    noise = torch.zeros(PARTIES)
    if unit == "record":
        own = [noise_multiplier(epsilon, DELTA, 1 / many, passes * many) for many in steps.tolist()]
        noise = torch.tensor(own)
    share = sizes / sizes.sum() if unit == "record" else torch.full((PARTIES,), 1 / PARTIES)
    each = {name: value.repeat(count) for name, value in (("sizes", sizes), ("steps", steps), ("noise", noise))}
    at_parties, there = places.repeat(count, 1), runs.each(PARTIES)
    clips = there.clips if unit == "record" else torch.full_like(there.clips, 1e9)
    client_noise = 0.0 if unit == "record" else noise_multiplier(epsilon, DELTA, 1.0, passes)
    weights = initial(count)
    for done in range(passes):
        local = [weight.repeat_interleave(PARTIES, 0) for weight in weights]
        for step in range(int(steps.max())):
            at, counted = drawn(each["sizes"], 1 / each["steps"])
            rows = at_parties.gather(1, at)
            total = clipped_sum(local, train.features[rows], train.labels[rows], counted, clips)
            pace = there.pace(done, passes) * (step < each["steps"]) * each["steps"] / each["sizes"]
            for weight, gradient in zip(local, total, strict=True):
                scale = each["noise"] * (clips if unit == "record" else 0.0)
                weight -= along(pace, weight) * (gradient + along(scale, gradient) * torch.randn_like(gradient))
        updates = [(new.unflatten(0, (count, PARTIES)) - old[:, None]) for new, old in zip(local, weights, strict=True)]  # type: ignore[no-untyped-call]
        if unit == "client":
            norms = sum((update.flatten(2) ** 2).sum(2) for update in updates) ** 0.5
            updates = [
                update * (1 / norms.clamp(min=1.0)).reshape(count, PARTIES, *[1] * (update.ndim - 2))
                for update in updates
            ]
        for weight, update in zip(weights, updates, strict=True):
            weight += (update * share.reshape(1, -1, *[1] * (update.ndim - 2))).sum(1)
            weight += client_noise * (PARTIES / HONEST[0]) ** 0.5 / PARTIES * torch.randn_like(weight)
    return accuracy(weights, test.features, test.labels)


def mean_scores(arm: str, batch: int, passes: int, runs: Runs, epsilon: float) -> torch.Tensor:
    """Mean accuracy of each of the runs, over SEEDS of them."""
    if arm in ("federated-dp", "federated-client"):
        unit = "record" if arm == "federated-dp" else "client"
        return torch.stack([averaged(batch, passes, runs, epsilon, unit, seed) for seed in range(SEEDS)]).mean(0)
    honest = None if arm == "cloud-dp" else int(arm.split("h = ")[1])
    return pooled(batch, passes, runs.each(SEEDS), epsilon, honest).unflatten(0, (-1, SEEDS)).mean(1)  # type: ignore[no-any-return, no-untyped-call]


def narrow(unit: str) -> None:
    """Batch sizes and rates, for the TOML file: the best at each budget and over all."""
    shares = [f"federated-dp-shares, h = {honest}" for honest in HONEST]
    for arm in ("cloud-dp", *shares, "federated-dp") if unit == "record" else ("federated-client",):
        budgets, runs = BUDGETS if unit == "record" else (8.0,), Runs.of(torch.tensor(RATES))
        found = {
            epsilon: torch.stack([mean_scores(arm, batch, PASSES, runs, epsilon) for batch in BATCHES])
            for epsilon in budgets
        }
        for epsilon, table in (*found.items(), ("all", torch.stack(list(found.values())).mean(0))):
            best = int(table.argmax())
            chosen = {"batch_size": BATCHES[best // len(RATES)], "learning_rate": RATES[best % len(RATES)]}
            line = {"arm": arm, "epsilon": epsilon, **chosen, "accuracy": round(float(table.max()), 2)}
            print(json.dumps(line | {"table": [[round(x, 1) for x in row] for row in table.tolist()]}), flush=True)


def wide(epsilon: float) -> None:
    """At one budget: of each configuration the best, and the next three."""
    settings = list(product(CLIPS, (False, True), WIDE_RATES))
    clips, cosine, rates = (torch.tensor(column) for column in zip(*settings, strict=True))
    runs = Runs(rates=rates / clips, clips=clips, cosine=cosine)
    for arm in ("cloud-dp", "federated-dp-shares, h = 8", "federated-dp"):
        found = []
        for batch, passes in product(WIDE_BATCHES, WIDE_PASSES):
            for (clip, falls, rate), score in zip(
                settings, mean_scores(arm, batch, passes, runs, epsilon).tolist(), strict=True
            ):
                found.append((round(score, 2), (batch, round(rate / clip, 3), passes, falls, clip)))
        first, *others = sorted(found, reverse=True)[:4]
        names = ("batch_size", "learning_rate", "passes", "cosine", "max_grad_norm")
        line = {"arm": arm, "epsilon": epsilon, "accuracy": first[0], **dict(zip(names, first[1], strict=True))}
        print(json.dumps(line | {"next": others}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--unit", choices=["record", "client"], default="record", help="of the promises")
    parser.add_argument("--wide", action="store_true", help="the wide grid, of records")
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(BUDGETS), help="budgets of the wide grid")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not given.wide:
        narrow(given.unit)
        return
    for epsilon in given.epsilons:
        torch.manual_seed(0)  # each budget by itself: the same whichever others are asked for
        wide(epsilon)


if __name__ == "__main__":
    main()
