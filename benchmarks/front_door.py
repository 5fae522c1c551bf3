"""What the front door costs: importing, a budget, help. Each in a process of its own, processor time, medians in turns.

    python benchmarks/front_door.py [--turns 9]

A line of JSON for each command with its seconds; of `choral.Privacy` also what it takes beyond torch's own import, as a
share of that.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

CHORAL = str(Path(sys.executable).with_name("choral"))
BUDGET = (CHORAL, "budget", "--epsilon", "3", "--delta", "1e-5", "--sample-rate", "0.01", "--steps", "2000")
COMMANDS = {
    "import torch": (sys.executable, "-c", "import torch"),
    "import choral": (sys.executable, "-c", "import choral"),
    "choral.Privacy": (sys.executable, "-c", "import torch, choral; choral.Privacy"),
    "choral budget": BUDGET,
    "choral compare --help": (CHORAL, "compare", "--help"),
}


def seconds(command: tuple[str, ...]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    turns = parser.parse_args().turns
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(turns + 1):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if turn:  # the first one reads files from the disk
                times[name].append(taken)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    for name, found in middle.items():
        line = {"front door": name, "seconds": round(found, 4), "least": round(min(times[name]), 4)}
        if name == "choral.Privacy":
            line["beyond_torch"] = round(found / middle["import torch"] - 1.0, 3)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
