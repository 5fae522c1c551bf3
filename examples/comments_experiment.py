"""Will a post get a comment? The search over steps behind examples/comments.toml, and the same on made-up posts.

The experiment of Konecny, McMahan, Ramage, Richtarik 2016 (arXiv 1610.02527, section 4): logistic regression, a page
(or author) is a party, every method at its best step of a declared grid. docs/comments-experiment.md has the figures.

    python examples/comments_experiment.py --data-dir DATA --page-columns --seeds 3 --out runs/search   # posts by page
    python examples/comments_experiment.py --generator --parties 1000 --out runs/posts   # made-up posts

Writes results.jsonl (a line per method, with its curves), the comparison as report.json, report.html and curves.svg,
and, as it goes, every run of the grids to stdout.
"""

import argparse
import json
import math
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from choral import ClientPrivacy, Compute, Masked, compare, federate
from choral.errors import ChoralError
from choral.trainers import DivergedError, Training
from choral.trainers.algorithms import DANE, FSVRG, GD, CoCoA, FedAdam, FedAvg
from choral.trainers.algorithms.interface import ExchangeMean, FederationInfo, Party, Server
from choral.trainers.data.generators import sparse_posts
from choral.trainers.data.partition import key_split
from choral.trainers.data.sets.comments import read_comments
from choral.trainers.data.sets.convex import ERROR, GAP, Problem, convex_task, dealt_again
from choral.trainers.data.sparse_rows import SparseDataset
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.task.arithmetic import Arithmetic

CLIPS = (0.1, 0.3, 1.0)
PRIVATE_STEPS = (0.3, 1, 3, 10)


def grids(ridge):
    """name -> [(setting, algorithm, the parties' SGD)]: declared here, best by the gap after the last round."""
    sgd = [(rate, batch) for batch in (1, 10) for rate in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]

    def by_step(make, steps):
        return [(f"{step:g}", make(step), {}) for step in steps]

    def fsvrg(step):
        return FSVRG(step=step, ridge=ridge)

    fsvrg_steps = (0.3, 1, 2, 3, 4, 5, 7, 10, 20, 30, 40, 50, 70, 100)
    return {
        "GD": by_step(lambda step: GD(rate=step, ridge=ridge), (0.3, 1, 2, 3, 4, 5, 10, 20, 50)),
        "CoCoA+": [("one pass", CoCoA(ridge=ridge), {})],
        "FedAvg": [(f"{rate:g}, batch {b}", FedAvg(), {"learning_rate": rate, "batch_size": b}) for rate, b in sgd],
        "FedAdam": [
            (f"{rate:g}, server {server:g}", FedAdam(server_rate=server), {"learning_rate": rate, "batch_size": 1})
            for rate in (0.003, 0.03, 0.3)
            for server in (0.01, 0.03, 0.1, 0.3)
        ],
        "DANE": [
            (f"{step:g}, mu {mu:g}", DANE(solver="svrg", step=step, mu=mu, ridge=ridge), {})
            for mu in (0.0, 0.1)
            for step in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
        ],
        "FSVRG": by_step(fsvrg, fsvrg_steps),
        "FSVRGR": by_step(fsvrg, fsvrg_steps),
    }


def task_of(problem, parties, sgd):
    return convex_task(problem, parties, Training(hidden=0, weight_decay=problem.objective.ridge, **sgd))


def tried(problem, parties, rounds, seed, algorithm, sgd):
    """The gap after the last round, by the same algorithm and trainer, but plain float64 means instead of a sum of
    integers: for the search over steps. Infinite where it diverges.
    """
    task = task_of(problem, parties, sgd)
    examples = {name: len(data) for name, data in parties.items()}
    cpu = torch.device("cpu")
    job = {"build": task.build, "fit": task.fit, "loss": task.loss, "datasets": parties}
    resident = Resident(**job, privacy_engines={}, seed=seed, arithmetic=Arithmetic(cpu))
    trainer, weights = task.engine(resident), resident.layout.read()
    federation = FederationInfo(
        parties=len(parties),
        length=len(weights),
        examples=sum(examples.values()),
        largest=1 << 20,
        value_bound=1e9,
        weight=sum(examples.values()),
    )
    channels, states, kept = algorithm.channels(federation), {name: {} for name in parties}, {}

    def view(name, number):
        return Party(name=name, examples=examples[name], federation=federation, number=number, state=states[name])

    for number in range(1, rounds + 1):
        steps = algorithm.round(Server(federation=federation, number=number, state=kept), weights)
        ask = next(steps)
        try:
            while True:
                weighing, total, mean = channels[ask.channel].weighing, 0.0, 0.0
                orders = [(name, algorithm.work(view(name, number), ask)) for name in parties]
                for name, done in trainer.do(orders, ask.weights, number):
                    weight = float(examples[name]) if weighing == "examples" else 1.0
                    mean = mean + weight * algorithm.answer(view(name, number), ask, done).double()
                    total += weight
                ask = steps.send(ExchangeMean(mean / total, total))
        except StopIteration as end:
            weights = end.value
        except DivergedError:
            return math.inf
    gap = problem.measured(weights.double().numpy())[GAP]
    return gap if math.isfinite(gap) else math.inf


def run(problem, rounds, seed, parties, algorithm, sgd, **more):
    """A run of federate, to be reported; None where it diverges."""
    task = task_of(problem, parties, sgd)
    compute = Compute(seed=seed, engine=task.engine)
    try:
        return federate(replace(task, min_classes=1), rounds=rounds, algorithm=algorithm, compute=compute, **more)
    except ChoralError as error:
        if type(error).__name__ not in ("DivergedError", "EncodingError"):
            raise
        return None


def parties_of(problem, name, seed):
    return dealt_again(problem.train, seed) if name == "FSVRGR" else problem.train


def best_of(problem, name, grid, rounds, seeds):
    """(setting, algorithm, SGD) of the least gap, its mean over the seeds; None where each diverges for some seed."""
    if len(grid) == 1:
        return grid[0]
    best = (math.inf,)
    for setting, algorithm, sgd in grid:
        started = time.process_time()
        gaps = [tried(problem, parties_of(problem, name, seed), rounds, seed, algorithm, sgd) for seed in seeds]
        gap = math.fsum(gaps) / len(gaps)
        print(f"  {name} {setting}: gap {gap:.3g}, {time.process_time() - started:.1f} s", flush=True)
        best = min(best, (gap, setting, algorithm, sgd), key=lambda entry: entry[0])
    return best[1:] or None


def private_best(problem, rounds, seeds, epsilon):
    """(setting, run) of FSVRG with client-level privacy, by its own grid; noise differs from run to run."""
    best = None
    for step in PRIVATE_STEPS:
        for clip in CLIPS:
            # Without counts, so one release less; gradients are scaled, so that one clipping norm suits both releases.
            algorithm = FSVRG(
                step=step, ridge=problem.objective.ridge, scaled=False, mean="parties", gradient_scale=step
            )
            privacy = ClientPrivacy(epsilon=epsilon, delta=1e-5, clip=clip, noise="central")
            made = [run(problem, rounds, seed, problem.train, algorithm, {}, privacy=privacy) for seed in seeds]
            gap = math.inf if None in made else math.fsum(each.metrics[GAP] for each in made) / len(made)
            print(f"  FSVRG-private {step:g}, clip {clip:g}: gap {gap:.3g}", flush=True)
            if gap < math.inf and (best is None or gap < best[0]):
                best = (gap, f"{step:g}, clip {clip:g}", made[0])
    return best and best[1:]


def found(problem, asked):
    """name -> (setting, run with the first seed) of every method, at its best."""
    made, seeds = {}, range(asked.seed, asked.seed + asked.seeds)
    for name, grid in grids(problem.objective.ridge).items():
        if asked.methods and name not in asked.methods:
            continue
        if asked.settings:
            grid = [entry for entry in grid if entry[0] in asked.settings] or grid
        if (best := best_of(problem, name, grid, asked.rounds, seeds)) is None:
            continue
        how = (problem, asked.rounds, asked.seed, parties_of(problem, name, asked.seed), *best[1:])
        if (reported := run(*how)) is None:
            continue
        made[name] = (best[0], reported)
        if name == "FSVRG" and not asked.unprotected:
            masked = Masked(min_survivors=len(problem.train) // 2 + 1)
            made["FSVRG-masked"] = (best[0], run(*how, secure_sum=masked))
            if (private := private_best(problem, asked.rounds, seeds, asked.epsilon)) is not None:
                made["FSVRG-private"] = private
    return made


def posts_by_page(data_dir, page_columns, least):
    """Pages with at least so many posts to train on; all posts to test on."""
    made = []
    for table, records in zip(read_comments(data_dir, page_columns=page_columns), (least, 1), strict=True):
        features = torch.cat([table.features, torch.ones(len(table), 1)], dim=1).numpy()
        shares = key_split(table.keys, min_records=records)
        made.append({name: SparseDataset(features[at.numpy()], table.labels[at]) for name, at in shares.items()})
    return made


def write(made, problem, out):
    """results.jsonl, and the comparison as JSON, as a page and as a picture."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "parties": len(problem.train),
        "records": len(problem.objective.labels),
        "features": problem.objective.rows.shape[1],
        "ridge": problem.objective.ridge,
        "least": problem.optimum[1],
        "test errors": problem.references()[ERROR],
    }
    lines, curved = [about], (("gap", GAP), ("error", ERROR))
    for name, (setting, each) in made.items():
        curves = {key: [entry.metrics[metric] for entry in each.history] for key, metric in curved}
        lines.append({"method": name, "setting": setting, **curves})
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report = compare(
        {name: each for name, (_, each) in made.items()},
        metric=GAP,
        also=[ERROR],
        references=problem.references(),
        title="Will a post get a comment? Each method at its best step",
    )
    for name in ("report.json", "report.html", "curves.svg"):
        report.save(out / name)
    print(json.dumps(about))
    for line in lines[1:]:
        print(f"{line['method']:15} {line['setting']:20} gap {line['gap'][-1]:.3g}, error {line['error'][-1]:.4f}")


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
    parser.add_argument("--seeds", type=int, default=1, help="over how many seeds, from that one, a gap is averaged")
    parser.add_argument("--methods", nargs="*", help="some of the methods only")
    parser.add_argument("--settings", nargs="*", help='some entries of their grids only, such as 3 10 "0.1, batch 1"')
    parser.add_argument("--epsilon", type=float, default=8.0, help="of FSVRG with client-level privacy")
    parser.add_argument("--unprotected", action="store_true", help="leave out the secure sum and privacy")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    entries = grids(1.0)
    if unknown := [name for name in asked.methods or () if name not in entries]:
        parser.error(f"unknown method {unknown[0]!r}; one of: {', '.join(entries)}")
    every = {setting for grid in entries.values() for setting, _, _ in grid}
    if unknown := [name for name in asked.settings or () if name not in every]:
        parser.error(f"no grid has {unknown[0]!r}; they have: {'; '.join(sorted(every))}")
    torch.set_num_threads(1)
    started = time.process_time()
    if asked.generator:
        posts = sparse_posts(parties=asked.parties, features=asked.features, seed=asked.seed)
        train, tests = posts.parties, posts.tests
    else:
        train, tests = posts_by_page(asked.data_dir, asked.page_columns, asked.least)
    problem = Problem(train, tests, 1 / sum(map(len, train.values())))
    made = found(problem, asked)
    if not made:
        parser.error("every method diverged at each of its settings; try others")
    write(made, problem, asked.out)
    seconds, most = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{seconds:.0f} s of processor time, at most {most:.2f} GiB of memory; {asked.out / 'report.html'}")


if __name__ == "__main__":
    main()
