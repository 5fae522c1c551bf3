"""What a device is asked for: the exported model at inference, one local epoch, and the full data, on one core.

    python benchmarks/on_device.py [--task digits] [--data-dir DIR] [--repeats 5]

One JSON line: the fields of `choral.audits.costs.on_device.OneCore`, whose figures a comparison's report has with
`report.on_device`. The process is bound to one core and one thread, as a small device has it; times are processor time,
medians of the repeats; of pairs the first is the median party's, the second that of all parties together.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import msgspec

from choral.audits.costs.on_device import capped, measure
from choral.jobs.settings import Settings
from choral.jobs.training import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    capped()
    task = load_task(Settings(task=chosen.task, data_dir=chosen.data_dir), 0)
    found = measure(task, (".onnx", ".pt2"), chosen.repeats)
    print(json.dumps({"task": chosen.task, **msgspec.to_builtins(found), "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
