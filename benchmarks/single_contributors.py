"""What a sum gives away where one party alone has a feature, and what leaving such coordinates out costs.

    python benchmarks/single_contributors.py [--cohorts 20 50 100] [--rounds 10] [--contributors 5]

Made-up posts of 1,000 authors with 20,002 words (`sparse_posts`), federated averaging of a linear model without weight
decay through masked sums. For each cohort: how many of the coordinates that anybody moved were moved by one party
alone, or by fewer than t; how exactly such a party's update is read from the published sum; test error and bytes with
and without the threshold. Every figure is of the sums as they were opened.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from choral import Masked, Participation, federate
from choral.protocols.interface import SumResult, SumSpec
from choral.trainers import FedAvg, Training
from choral.trainers.data.generators import sparse_posts
from choral.trainers.data.sets.convex import ERROR, Problem, convex_task


@dataclasses.dataclass
class Seen:
    """What was published, by round: shares of the moved coordinates, in per cent; the largest error of an update that
    is read from the sum, in steps of the encoding.
    """

    alone: list[float] = dataclasses.field(default_factory=list)
    few: list[float] = dataclasses.field(default_factory=list)
    error: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A secure sum that counts, of what it publishes, what comes from fewer than `least` parties."""

    sums: Masked
    least: int
    seen: Seen

    @property
    def name(self) -> str:
        return self.sums.name

    @property
    def contributors(self) -> int | None:
        return self.sums.contributors

    def open(self, spec: SumSpec, *, policy: Any = None) -> Any:
        return _Session(self.sums.open(spec, policy=policy), self)


class _Session:
    def __init__(self, inner: Any, watched: Watched) -> None:
        self.inner, self.watched = inner, watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def begin(self, *given: Any) -> Any:
        return _Round(self.inner.begin(*given), self.watched)


class _Round:
    def __init__(self, inner: Any, watched: Watched) -> None:
        self.inner, self.watched = inner, watched
        self.vectors: list[Any] = []

    def needs(self, party: str) -> Any:
        return self.inner.needs(party)

    def submit(self, party: str, vector: Any) -> None:
        self.vectors.append(np.asarray(vector)[:-1].copy())  # without the weight
        self.inner.submit(party, vector)

    def finish(self) -> SumResult:
        result: SumResult = self.inner.finish()
        table = np.stack(self.vectors)
        counts, published = (table != 0).sum(axis=0), result.total[:-1] != 0
        seen, moved = self.watched.seen, max(int((counts > 0).sum()), 1)
        alone = published & (counts == 1)
        seen.alone.append(100.0 * int(alone.sum()) / moved)
        seen.few.append(100.0 * int((published & (counts < self.watched.least)).sum()) / moved)
        own = np.where(alone, table.sum(axis=0), 0)  # the one party's own value
        seen.error.append(int(np.abs(np.where(alone, result.total[:-1], 0) - own).max()))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--authors", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--contributors", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    made = sparse_posts(parties=asked.authors, seed=asked.seed)
    problem = Problem(made.parties, made.tests, 1e-6)
    training = Training(learning_rate=asked.rate, batch_size=20, local_epochs=1, weight_decay=0.0)
    task = dataclasses.replace(
        convex_task(problem, made.parties, training),
        evaluate=lambda model: {ERROR: _error(problem, model)},
        references=None,
        min_classes=1,
    )
    print(f"majority {problem.references()[ERROR]['majority']:.4f}" if asked.rounds > 50 else "", end="")
    for cohort in asked.cohorts:
        for least in (None, asked.contributors):
            seen = Seen()
            sums = Masked(corrupt=asked.contributors - 2, contributors=least)
            watched: Any = Watched(sums, asked.contributors, seen)
            clock = time.process_time()
            run = federate(
                task,
                rounds=asked.rounds,
                algorithm=FedAvg(),
                secure_sum=watched,
                participation=Participation(cohort=cohort),
            )
            _show(cohort, least, run, seen, time.process_time() - clock)


def _error(problem: Problem, model: Any) -> float:
    weights = next(model.parameters()).detach()[0].double().numpy()
    return float(((problem._rows @ weights > 0) != problem._labels).mean())


def _show(cohort: int, least: int | None, run: Any, seen: Seen, seconds: float) -> None:
    history = run.history[1:]
    told: Mapping[str, str] = {
        "test error": f"{100 * run.metrics[ERROR]:.2f} %",
        "moved by one party alone and published": f"{np.mean(seen.alone):.1f} %",
        "by few": f"{np.mean(seen.few):.1f} %",
        "read with an error of": f"{max(seen.error)} steps",
        "kB up a round": f"{np.mean([entry.bytes_up for entry in history]) / 1000:.1f}",
        "kB down": f"{np.mean([entry.bytes_down for entry in history]) / 1000:.1f}",
        "processor s": f"{seconds:.1f}",
    }
    print(f"cohort {cohort}, contributors {least}: " + ", ".join(f"{name} {value}" for name, value in told.items()))


if __name__ == "__main__":
    main()
