"""Will a post get a comment? Federated optimization on posts by page: gap to the optimum and test error over 30 rounds.

The experiment of Konecny, McMahan, Ramage, Richtarik 2016 (arXiv 1610.02527, section 4) on public data: logistic
regression, a page (or author) is a party, every method at its best step of a declared grid.
docs/comments-experiment.md has the figures.

    python examples/comments_experiment.py --data-dir DATA --page-columns --out runs/comments   # Facebook posts by page
    python examples/comments_experiment.py --generator --parties 1000 --out runs/posts   # made-up posts

Writes results.jsonl (a line per method, with its curves), curves.svg and, as it goes, every run of the grids to stdout.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.utils.data import DataLoader

from choral import ClientPrivacy, Masked, federate
from choral.audits.svg import Chart
from choral.errors import ChoralError
from choral.trainers import DivergedError
from choral.trainers.algorithms import DANE, FSVRG, GD, CoCoA, FedAdam, FedAvg
from choral.trainers.algorithms.seam import Mean, Party, Server, Setup
from choral.trainers.closed_form import ClosedForm
from choral.trainers.data.comments import read_comments
from choral.trainers.data.generators import sparse_posts
from choral.trainers.data.sparse import SparseDataset
from choral.trainers.local import Resident
from choral.trainers.optimum import Objective
from choral.trainers.partition import key_split, reshuffled

torch.set_num_threads(1)


@dataclass
class Problem:
    """Parties, the same records dealt out again, all of them pooled, and the records to test on by party."""

    parties: dict
    shuffled: dict
    objective: Objective
    least: float
    rows: sparse.csr_array
    labels: np.ndarray
    levels: dict


def grids(ridge):
    """name -> [(setting, federate's arguments)]: declared here, best by the gap after the last round."""
    sgd = [(rate, batch) for batch in (1, 10) for rate in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]

    def local(rate, batch):
        return ClosedForm.of(rate=rate, batch_size=batch, decay=ridge)

    def by_step(make, steps):
        return [(f"{step:g}", {"algorithm": make(step)}) for step in steps]

    def fsvrg(step):
        return FSVRG(step=step, ridge=ridge)

    fsvrg_steps = (0.3, 1, 2, 3, 4, 5, 7, 10, 20, 30, 40, 50, 70, 100)
    return {
        "GD": by_step(lambda step: GD(rate=step, ridge=ridge), (0.3, 1, 2, 3, 4, 5, 10, 20, 50)),
        "CoCoA+": [("one pass", {"algorithm": CoCoA(ridge=ridge)})],
        "FedAvg": [(f"{rate:g}, batch {b}", {"algorithm": FedAvg(), "engine": local(rate, b)}) for rate, b in sgd],
        "FedAdam": [
            (f"{rate:g}, server {server:g}", {"algorithm": FedAdam(server_rate=server), "engine": local(rate, 1)})
            for rate in (0.003, 0.03, 0.3)
            for server in (0.01, 0.03, 0.1, 0.3)
        ],
        "DANE": [
            (f"{step:g}, mu {mu:g}", {"algorithm": DANE(solver="svrg", step=step, mu=mu, ridge=ridge)})
            for mu in (0.0, 0.1)
            for step in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
        ],
        "FSVRG": by_step(fsvrg, fsvrg_steps),
        "FSVRGR": by_step(fsvrg, fsvrg_steps),
    }


def logistic(model, batch):
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].float(), reduction="none")


def job_of(problem, parties):
    """The task as federate takes it: from w = 0, gap and test error."""
    width = problem.rows.shape[1]

    def build(dataset):
        model = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model, torch.optim.SGD(model.parameters(), lr=1.0), DataLoader(dataset)

    def evaluate(model):
        weights = model.weight.detach()[0].double().numpy()
        wrong = (problem.rows @ weights > 0) != problem.labels
        return {"gap": problem.objective.value(weights) - problem.least, "error": float(wrong.mean())}

    return {"build": build, "fit": never, "loss": logistic, "evaluate": evaluate, "parties": parties}


ENGINE = ClosedForm.of(rate=1.0, batch_size=1)


def tried(problem, parties, rounds, seed, *, algorithm, engine=ENGINE):
    """The gap after the last round, by the same algorithm and trainer, but plain float64 means instead of a sum of
    integers: for the search over steps. Infinite where it diverges.
    """
    job = job_of(problem, parties)
    examples = {name: len(data) for name, data in parties.items()}
    resident = Resident(
        build=job["build"], fit=never, loss=logistic, datasets=parties, guards={}, seed=seed, device=torch.device("cpu")
    )
    trainer, weights = engine(resident), resident.layout.read()
    setup = Setup(
        parties=len(parties), length=len(weights), examples=sum(examples.values()), largest=1 << 20, value_bound=1e9
    )
    channels, states, kept = algorithm.channels(setup), {name: {} for name in parties}, {}

    def view(name, number):
        return Party(name=name, examples=examples[name], setup=setup, number=number, state=states[name])

    for number in range(1, rounds + 1):
        steps = algorithm.round(Server(setup=setup, number=number, state=kept), weights)
        ask = next(steps)
        try:
            while True:
                weighing, total, mean = channels[ask.channel].weighing, 0.0, 0.0
                orders = [(name, algorithm.work(view(name, number), ask)) for name in parties]
                for name, done in trainer.do(orders, ask.weights, number):
                    weight = float(examples[name]) if weighing == "examples" else 1.0
                    mean = mean + weight * algorithm.answer(view(name, number), ask, done).double()
                    total += weight
                ask = steps.send(Mean(mean / total, total))
        except StopIteration as end:
            weights = end.value
        except DivergedError:
            return math.inf
    gap = problem.objective.value(weights.double().numpy()) - problem.least
    return gap if math.isfinite(gap) else math.inf


def run(problem, rounds, seed, *, parties, engine=ENGINE, **more):
    """Gap and test error after each round through federate, to be reported; None where it diverges."""
    try:
        job = job_of(problem, parties)
        history = federate(**job, rounds=rounds, seed=seed, engine=engine, min_classes=1, **more).history
    except ChoralError as error:
        if type(error).__name__ not in ("DivergedError", "EncodingError"):
            raise
        return None
    return {name: [entry.metrics[name] for entry in history] for name in ("gap", "error")}


def never(model, optimizer, loader):
    raise RuntimeError("the closed form computes what fit would")


def best_of(problem, name, grid, rounds, seed):
    parties = problem.shuffled if name == "FSVRGR" else problem.parties
    best = None
    for setting, more in grid:
        started = time.process_time()
        gap = tried(problem, parties, rounds, seed, **more)
        print(f"  {name} {setting}: gap {gap:.3g}, {time.process_time() - started:.1f} s", flush=True)
        if gap < math.inf and (best is None or gap < best[0]):
            best = (gap, setting, more)
    if best is None or (curves := run(problem, rounds, seed, parties=parties, **best[2])) is None:
        return None
    print(f"  {name} {best[1]} by federate: gap {curves['gap'][-1]:.3g}", flush=True)
    return {"method": name, "setting": best[1], **curves}


def protected(problem, setting, ridge, rounds, seed, epsilon):
    """FSVRG through the masked sum at its best step; and with client-level privacy, over its own grid."""
    count = len(problem.parties)
    masked = Masked(min_survivors=count // 2 + 1)
    made = []
    algorithm = FSVRG(step=float(setting), ridge=ridge)
    curves = run(problem, rounds, seed, parties=problem.parties, algorithm=algorithm, secure_sum=masked)
    made.append({"method": "FSVRG, masked sum", "setting": setting, **curves})
    best = None
    for step in (0.03, 0.1, 0.3):
        for clip in (0.1, 0.3, 1.0):
            # One step of all records' size: without counts, so one release less; gradients and updates clipped alike.
            algorithm = FSVRG(
                step=step, ridge=ridge, scaled=False, mean="parties", over_examples=True, gradient_scale=step
            )
            privacy = ClientPrivacy(epsilon=epsilon, delta=1e-5, clip=clip, noise="central")
            curves = run(problem, rounds, seed, parties=problem.parties, algorithm=algorithm, privacy=privacy)
            if curves:
                print(f"  FSVRG DP {step:g}, clip {clip:g}: gap {curves['gap'][-1]:.3g}", flush=True)
            if curves and (best is None or curves["gap"][-1] < best["gap"][-1]):
                best = {"method": f"FSVRG, epsilon {epsilon:g}", "setting": f"{step:g}, clip {clip:g}", **curves}
    return [*made, best] if best else made


def problem_of(train, tests, seed):
    """train, tests: name -> SparseDataset; tests may have other parties."""
    rows = sparse.csr_array(sparse.vstack([data.rows for data in train.values()]))
    targets = torch.cat([data.targets for data in train.values()])
    objective = Objective(rows, targets.double().numpy(), 1.0 / len(targets))
    ends = torch.tensor([0, *[len(data) for data in train.values()]]).cumsum(0)
    shares = [torch.arange(a, b) for a, b in pairwise(ends)]
    shuffled = {
        name: SparseDataset(rows[share.numpy()], targets[share])
        for name, share in zip(train, reshuffled(shares, seed=seed), strict=True)
    }
    started = time.process_time()
    optimum, least = objective.least()
    norm = np.linalg.norm(objective.slope(optimum))
    print(f"optimum {least:.9f}, gradient norm {norm:.1e}, {time.process_time() - started:.1f} s", flush=True)
    test_rows = sparse.csr_array(sparse.vstack([data.rows for data in tests.values()]))
    labels = torch.cat([data.targets for data in tests.values()]).numpy() > 0
    most = bool(targets.double().mean() > 0.5)
    own = [
        np.full(len(data), bool(train[name].targets.double().mean() > 0.5) if name in train else most)
        for name, data in tests.items()
    ]
    levels = {
        "optimum": float(((test_rows @ optimum > 0) != labels).mean()),
        "majority": float((labels != most).mean()),
        "per-party majority": float((labels != np.concatenate(own)).mean()),
    }
    return Problem(train, shuffled, objective, least, test_rows, labels, levels)


def posts_by_page(data_dir, page_columns, least):
    """Pages with at least so many posts to train on; all posts to test on."""
    made = []
    for table, records in zip(read_comments(data_dir, page_columns=page_columns), (least, 1), strict=True):
        features = torch.cat([table.features, torch.ones(len(table), 1)], dim=1).numpy()
        shares = key_split(table.keys, min_records=records)
        made.append({name: SparseDataset(features[at.numpy()], table.labels[at]) for name, at in shares.items()})
    return made


def picture(results, problem, path):
    """Two panels, one file, no reference to anything outside it: log10 of the gap, and the test error."""
    colours = ["#1b6ca8", "#c44536", "#2a7f62", "#8a5a00", "#6d4c9f", "#00838f", "#ad1457", "#455a64", "#9e9d24"]
    gaps = [max(gap, 1e-12) for result in results for gap in result["gap"]]
    low, high = math.floor(math.log10(min(gaps))), math.ceil(math.log10(max(gaps)))
    errors = [error for result in results for error in result["error"]] + list(problem.levels.values())
    last = len(results[0]["gap"]) - 1
    style = "".join(f".line.arm-{i}{{stroke:{c}}}.name.arm-{i}{{fill:{c}}}" for i, c in enumerate(colours))
    panels = []
    for metric, span in (("gap", (low, high)), ("error", (min(errors) - 0.01, max(errors) + 0.01))):
        chart = Chart(width=760, height=440, left=60, right=230, top=34, bottom=50, x=(0, last), y=span)
        if metric == "gap":
            chart.grid(range(low, high + 1), lambda value: f"1e{value:g}", "f - f* (log scale)")
        else:
            marks = np.linspace(*span, 6)
            chart.grid(list(marks), lambda value: f"{100 * value:.1f} %", "test error")
        chart.steps(list(range(0, last + 1, max(last // 6, 1))), lambda value: f"{value:g}", "round")
        labels = []
        for place, result in enumerate(results):
            points = [math.log10(max(v, 1e-12)) if metric == "gap" else v for v in result[metric]]
            chart.line(list(enumerate(points)), place)
            labels.append((result["method"], points[-1], place))
        if metric == "error":
            for name, level in problem.levels.items():
                chart.rule(chart.left, chart.up(level), chart.width - chart.right, chart.up(level), "level")
                labels.append((name, level, len(colours)))
        chart.end_labels(labels)
        panels.append(str(chart.render(metric, f"{metric} over rounds", "one line per method, each at its best step")))
    css = (
        f"<style>text{{font:13px sans-serif;fill:#333}}.line{{fill:none;stroke-width:2}}.grid{{stroke:#ddd}}"
        f".base{{stroke:#333}}.level{{stroke:#888;stroke-dasharray:2 4}}.leader{{stroke:#aaa;fill:none}}{style}</style>"
    )
    body = "".join(f'<g transform="translate({760 * i},0)">{panel}</g>' for i, panel in enumerate(panels))
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1520 440">{css}{body}</svg>\n', encoding="utf-8"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of the data sets; by default fetched and checked")
    parser.add_argument("--page-columns", action="store_true", help="use the page's likes, ... and category, too")
    parser.add_argument("--least", type=int, default=75, help="posts that a page must have, as in the paper")
    parser.add_argument("--generator", action="store_true", help="made-up posts with the statistics of the paper")
    parser.add_argument("--parties", type=int, default=10_000, help="of the generator")
    parser.add_argument("--features", type=int, default=20_002, help="of the generator")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", help="some of the methods only")
    parser.add_argument("--epsilon", type=float, default=8.0, help="of FSVRG with client-level privacy")
    parser.add_argument("--unprotected", action="store_true", help="leave out the secure sum and privacy")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    known = list(grids(1.0))
    if unknown := [name for name in asked.methods or () if name not in known]:
        parser.error(f"unknown method {unknown[0]!r}; one of: {', '.join(known)}")
    started = time.process_time()
    if asked.generator:
        posts = sparse_posts(parties=asked.parties, features=asked.features, seed=asked.seed)
        train, tests = posts.parties, posts.tests
    else:
        train, tests = posts_by_page(asked.data_dir, asked.page_columns, asked.least)
    problem = problem_of(train, tests, asked.seed)
    ridge = problem.objective.ridge
    results = []
    for name, grid in grids(ridge).items():
        if asked.methods and name not in asked.methods:
            continue
        if (best := best_of(problem, name, grid, asked.rounds, asked.seed)) is not None:
            results.append(best)
        if best and name == "FSVRG" and not asked.unprotected:
            results += protected(problem, best["setting"], ridge, asked.rounds, asked.seed, asked.epsilon)
    asked.out.mkdir(parents=True, exist_ok=True)
    about = {"parties": len(train), "records": len(problem.objective.labels), "features": problem.rows.shape[1]}
    lines = [{**about, "ridge": ridge, "least": problem.least, "test errors": problem.levels}, *results]
    (asked.out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    picture(results, problem, asked.out / "curves.svg")
    print(json.dumps(lines[0]))
    for result in results:
        print(
            f"{result['method']:22} {result['setting']:20} gap {result['gap'][-1]:.3g}, error {result['error'][-1]:.4f}"
        )
    print(f"{time.process_time() - started:.0f} s of processor time; {asked.out / 'curves.svg'}")


if __name__ == "__main__":
    main()
