"""What a round costs with a thousand, a hundred thousand and a million virtual parties, and a cohort of the same size.

Each number in a process of its own, so that the peak of its resident memory is its own; seconds are processor time, the
median over the rounds after the first. Prints a line of JSON per number with the ratios to the least, which a cost that
grew with the number of parties would move far from 1. The last 1,024 parties stay in memory, so of a thousand each is
made once, and of more nearly every one that is drawn is made: that is the tenth by which the ratio is above 1.

    python benchmarks/parties.py [--parties 1000 100000 1000000] [--cohort 100] [--rounds 21] [--secure-sum masked]
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Keep, Masked, Participation, Plain, Task, federate
from choral.trainers import Epochs, VirtualParties

RECORDS, FEATURES, CLASSES = 50, 100, 10


def make(number: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(number)
    return TensorDataset(torch.randn(RECORDS, FEATURES, generator=generator), torch.arange(RECORDS) % CLASSES)


def build(dataset: TensorDataset) -> Any:
    model = nn.Linear(FEATURES, CLASSES)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=10, shuffle=True)


def measure(parties: int, cohort: int, rounds: int, secure_sum: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    started, ends = time.process_time(), []
    federate(
        Task(build=build, fit=Epochs(), evaluate=lambda model: float(next(model.parameters()).norm())),
        VirtualParties(parties, make, RECORDS),
        participation=Participation(cohort=cohort),
        rounds=rounds,
        secure_sum=Masked(corrupt=cohort // 10) if secure_sum == "masked" else Plain(),
        keep=Keep(on_round=lambda _: ends.append(time.process_time())),
    )
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "parties": parties,
        "cohort": cohort,
        "secure_sum": secure_sum,
        "rounds": rounds,
        "until_round_1_seconds": round(ends[0] - started, 3),
        "seconds_per_round": round(statistics.median(seconds), 4),
        "peak_rss_mib": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--secure-sum", choices=["plain", "masked"], default="plain")
    arguments = parser.parse_args()
    if len(arguments.parties) == 1:
        print(json.dumps(measure(arguments.parties[0], arguments.cohort, arguments.rounds, arguments.secure_sum)))
        return
    least: dict[str, Any] = {}
    for parties in arguments.parties:
        command = [sys.executable, __file__, "--parties", str(parties), "--cohort", str(arguments.cohort)]
        command += ["--rounds", str(arguments.rounds), "--secure-sum", arguments.secure_sum]
        line = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        least = least or line
        ratios = {f"ratio_{key}": round(line[key] / least[key], 3) for key in ("seconds_per_round", "peak_rss_mib")}
        print(json.dumps(line | ratios), flush=True)


if __name__ == "__main__":
    main()
