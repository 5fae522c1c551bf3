"""What a device is asked for: the exported model at inference, one local epoch, and the full data, on one core.

    python benchmarks/on_device.py [--task digits] [--data-dir DIR] [--repeats 5]

One JSON line. The process is bound to one core and one thread, as a small device has it; times are processor time, the
median of the repeats. epoch: one call of the task's own fit on the median party's records; pooled: on all of them.
model_bytes: of the ONNX file and of the .pt2 file. single, batch: inference of one example alone, and per example of 64
together, by onnxruntime and by the .pt2 program. peak_mib: the process's peak at the end, and what of it the imports
had taken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from choral.jobs.settings import Settings
from choral.jobs.training import load_task
from choral.trainers.run_folder.export import export
from choral.trainers.task.task import raw_bytes


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    goes = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        goes.append(time.process_time() - started)
    return statistics.median(goes)


def by_onnxruntime(file: Path) -> Callable[[torch.Tensor], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda given: session.run(None, {name: given.numpy()})


def fifty(run: Callable[[torch.Tensor], object], given: torch.Tensor) -> None:
    for _ in range(50):
        run(given)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    imported = peak()
    task = load_task(Settings(task=chosen.task, data_dir=chosen.data_dir), 0)
    ordered = sorted(task.parties.values(), key=len)  # type: ignore[arg-type]
    party = ordered[len(ordered) // 2]
    pooled: torch.utils.data.Dataset[object] = torch.utils.data.ConcatDataset(list(task.parties.values()))  # type: ignore[arg-type]
    epoch = {}
    for name, dataset in (("party", party), ("pooled", pooled)):
        model, optimizer, loader = task.build(dataset)
        epoch[name] = seconds(lambda m=model, o=optimizer, d=loader: task.fit(m, o, d), chosen.repeats)  # type: ignore[misc]
    model, _, loader = task.build(party)
    model.eval()
    inputs = next(iter(loader))[0][:1]
    sizes, inference = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".onnx", ".pt2"):
            file = Path(folder) / f"model{suffix}"
            export(model, model.state_dict(), (inputs,), file)
            sizes[suffix[1:]] = file.stat().st_size
            many = inputs.repeat(64, *(1,) * (inputs.ndim - 1))
            run = by_onnxruntime(file) if suffix == ".onnx" else torch.export.load(file).module()
            alone, together = (seconds(partial(fifty, run, given), chosen.repeats) / 50 for given in (inputs, many))
            inference[suffix[1:]] = {"single_us": round(1e6 * alone, 1), "batch_us": round(1e6 * together / 64, 2)}
    sizes_of = [len(dataset) for dataset in (party, pooled)]  # type: ignore[arg-type]
    line = {
        "task": chosen.task,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_bytes": sizes,
        "inference": inference,
        "examples": dict(zip(("party", "pooled"), sizes_of, strict=True)),
        "data_bytes": {"party": raw_bytes(party), "pooled": sum(map(raw_bytes, task.parties.values()))},
        "epoch_seconds": {name: round(value, 4) for name, value in epoch.items()},
        "pooled_over_party": round(epoch["pooled"] / epoch["party"], 2),
        "peak_mib": {"imports": round(imported), "end": round(peak())},
        "load": os.getloadavg()[0],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
