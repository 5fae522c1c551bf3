"""What privacy costs over the number of parties n and of honest survivors h, at one epsilon: predicted, and measured.

    python benchmarks/utility_curve.py [--epsilon 2] [--seeds 0 1 2 3] [--points 10,8 own,10] > curve.jsonl
    python benchmarks/utility_curve.py --draw curve.jsonl docs/utility-curve.svg

Digits, of which every configuration trains on the same 1,438 records, split evenly among n parties: batches of 128 of
all parties together, twenty passes, one learning rate that nobody tuned. The cloud's DP-SGD needs a noise
multiplier sigma at that epsilon. Noise in shares is sized for h honest parties and added by all n, so that a sum whose
parties all survive has the noise sigma sqrt(n / h); where each party adds all of its own, sigma sqrt(n). So the cloud's
own accuracy at those multipliers is the **prediction**; a party's FedAvg is no such sum, and its prediction is for the
step that it would be. Then the federations themselves are trained. Shares are through `Plain`, whose noise is the same.

JSON lines: the curve's, by multiplier, then each point's, with its prediction (the curve read between its multipliers,
on a log scale). Means over seeds with their standard errors, in per cent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from choral import Compute, Participation, Plain, Privacy, centralize, federate
from choral.audits.report import html
from choral.audits.report.charts.svg import Chart
from choral.privacy.accounting.record_noise import noise_multiplier
from choral.trainers import FedSGD, Run, Split, Task, Training
from choral.trainers.data import TASKS

DELTA, BATCH, PASSES, RATE = 1e-5, 128, 20, 0.5
SPREAD = (0.5, 1.0, 2**0.5, 2.0, 3.0, 4.5, 6.5)  # of the curve's multipliers over the cloud's own
POINTS = ("4,2", "10,8", "10,4", "20,18", "20,10", "own,4", "own,10", "own,20")


def loaded(parties: int, batch_size: int, seed: int) -> Task:
    training = Training(rounds=PASSES, batch_size=batch_size, learning_rate=RATE, hidden=32)
    task = TASKS["digits"](Split(parties=parties, alpha=1000.0), training, seed, None)
    return dataclasses.replace(task, min_classes=1)


def records_of(task: Task) -> int:
    return sum(len(dataset) for dataset in task.parties.values())


def multiplier(epsilon: float, records: int) -> float:
    """Of DP-SGD on the pooled records."""
    return noise_multiplier(epsilon, DELTA, BATCH / records, PASSES * math.ceil(records / BATCH))


def epsilon_of(wanted: float, records: int) -> float:
    """At which the pooled training's multiplier is the one wanted: by bisection, as it falls in epsilon."""
    low, high = 0.02, 200.0
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if multiplier(middle, records) > wanted else (low, middle)
    return high


def cloud(epsilon: float, seed: int) -> Run:
    compute = Compute(seed=seed, device="cpu")
    return centralize(loaded(10, BATCH, seed), rounds=PASSES, privacy=Privacy(epsilon, DELTA), compute=compute)


def federated(epsilon: float, parties: int, honest: int | None, seed: int) -> Run:
    """honest: whom the shares are sized for, one more colluding; None: each party adds all of its own noise."""
    common: dict[str, Any] = {"rounds": PASSES, "compute": Compute(seed=seed, device="cpu"), "secure_sum": Plain()}
    if honest is None:
        task = loaded(parties, max(round(BATCH / parties), 1), seed)
        return federate(task, privacy=Privacy(epsilon, DELTA), **common)
    task = loaded(parties, BATCH, seed)
    steps = math.ceil(records_of(task) / BATCH)
    return federate(
        task,
        algorithm=FedSGD(batch_size=BATCH, steps_per_round=steps, learning_rate=RATE),
        privacy=Privacy(epsilon, DELTA, noise="distributed", colluders=1),
        participation=Participation(least=honest + 1),
        **common,
    )


def scored(runs: Sequence[Run]) -> dict[str, float]:
    found = [100 * run.metrics["accuracy"] for run in runs]
    error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    return {"accuracy": round(mean(found), 2), "error": round(error, 2)}


def draw(lines: Path, file: Path) -> None:
    """The curve, and the points with two standard errors, as one SVG file."""
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    curve = [(math.log(line["cloud"]), line["accuracy"]) for line in found if "cloud" in line]
    chart = Chart(
        width=760, height=400, left=52, right=30, top=34, bottom=50, x=(curve[0][0], curve[-1][0]), y=(40, 100)
    )
    chart.grid(range(40, 101, 10), lambda value: f"{value:g} %", "accuracy, digits at one epsilon")
    chart.steps([x for x, _ in curve], lambda x: f"{math.exp(x):.2g}", "noise of a sum over the pooled training's own")
    chart.line(curve, 2)
    chart.text(chart.left + 8, chart.up(curve[0][1]) + 20, "the cloud: predicted", "name arm-2")
    points = sorted((each for each in found if "parties" in each), key=lambda each: float(each["over_cloud"]))
    for row, line in enumerate(points):
        x, place = chart.across(math.log(line["over_cloud"])), 4 if line["honest"] else 1
        low, high = (chart.up(line["accuracy"] + side * 2 * line["error"]) for side in (-1, 1))
        chart.rule(x, low, x, high, f"whisker arm-{place}")
        chart.dot(x, chart.up(line["accuracy"]), place)
        if line["honest"]:  # their dots are close together
            chart.text(
                x, chart.top + 8 + 14 * (row % 3), f"{line['parties']}, {line['honest']}", "name arm-4", "middle"
            )
        else:
            chart.text(x - 7, chart.up(line["accuracy"]) + 6, f"n = {line['parties']}, own noise", "name arm-1", "end")
    chart.text(chart.left + 8, chart.top + 22, "shares: n, h", "name arm-4")
    style = (Path(html.__file__).parent / "drawing.html").read_text("utf-8").split("#}", 1)[1]
    said = "; ".join(f"{n}: {y:g} %" for n, y in ((f"{math.exp(x):.2g} times", y) for x, y in curve))
    drawn = chart.render("utility", "Accuracy over the noise of a sum: the cloud's curve, and federations", said)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 440" width="800" height="440"><style>'
    page = f'<rect width="100%" height="100%" style="fill: var(--paper)"/><g transform="translate(20 20)">{drawn}</g>'
    file.write_text(f"{head}{style}svg {{ font-family: system-ui, sans-serif; }}</style>{page}</svg>\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--points", nargs="+", default=list(POINTS), help="n,h of shares, or own,n")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("LINES", "SVG"))
    given = parser.parse_args()
    if given.draw:
        draw(*given.draw)
        return
    torch.set_num_threads(1)
    records = records_of(loaded(10, BATCH, 0))
    own = multiplier(given.epsilon, records)
    curve: dict[float, float] = {}
    for factor in SPREAD:
        at = given.epsilon if factor == 1.0 else epsilon_of(factor * own, records)
        line = {"cloud": round(factor, 3), "multiplier": round(factor * own, 3), "epsilon": round(at, 3)}
        line |= scored([cloud(at, seed) for seed in given.seeds])
        curve[factor] = line["accuracy"]
        print(json.dumps(line), flush=True)
    for point in given.points:
        first, _, last = point.partition(",")
        n, h = (int(last), None) if first == "own" else (int(first), int(last))
        factor = (n / (h or 1)) ** 0.5
        predicted = float(np.interp(math.log(factor), [math.log(each) for each in curve], list(curve.values())))
        line = {"parties": n, "honest": h, "over_cloud": round(factor, 3), "predicted": round(predicted, 2)}
        runs = [federated(given.epsilon, n, h, seed) for seed in given.seeds]
        print(json.dumps(line | scored(runs)), flush=True)


if __name__ == "__main__":
    main()
