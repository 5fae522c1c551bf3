"""Everything that wants a GPU, in one go of at most eight minutes: tests that were skipped, speed, use of the device.

    make gpu                                             # on the machine with the GPU; docs/gpu.md says what to carry
    python benchmarks/gpu.py --device cpu --small        # the rehearsal: the same code, small sizes

Needs the repository and the packages that docs/gpu.md names, and no network. Prints JSON lines, each with its part. A
part runs in a process of its own under a limit of its own, so that one which fails or hangs costs the others nothing;
it ends with a line that says how it went. The exit status is 1 if a part failed. In the order of what one would not
want to miss:

machine: what is there; a large copy and a large matrix product, which nothing below can beat.
tests: the tests that a machine without a GPU skips.
masks: the key stream of secure sums made on the device, byte for byte that of the CPU; GB/s eager, compiled, and of the
    CPU; a masked sum over vectors that stay on the device.
federation: Fashion-MNIST, a CNN, ten parties, noise in shares under Masked: accuracy, seconds of each part, and how
    busy the device was; then FedAvg with each party's own noise, in float32 and bf16. Without the data (CHORAL_DATA
    names its folder) it fails and says so.
cohort, shadows, step: simulation.py, shadow.py and dp_step.py on the device.
split: encryption under a split key with its transform on the device, byte for byte that of the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from choral import Compute, Masked, Participation, Privacy, __version__, federate
from choral.protocols import SumSpec
from choral.protocols.crypto import mask_stream as stream
from choral.protocols.crypto.mask_stream_device import add_mask_tensor
from choral.protocols.homomorphic.split.parameters import choose
from choral.protocols.homomorphic.split.party_and_server import SplitRound, encrypt
from choral.trainers import FedAvg, FedSGD, Split, Training
from choral.trainers.data import TASKS

ROOT = Path(__file__).resolve().parent.parent
SEED = bytes(range(32))
TESTS = [  # files with tests that are skipped where there is no GPU
    "tests/protocols/crypto/test_device_stream.py",
    "tests/protocols/masking/test_masked.py",
    "tests/privacy/test_encoding.py",
    "tests/privacy/noise/test_rotation.py",
    "tests/trainers/task/test_arithmetic.py",
]
Line = dict[str, Any]


def machine(device: torch.device, small: bool) -> Iterator[Line]:
    yield {
        "choral": __version__, "commit": _commit(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
    }  # fmt: skip
    length, side = (1 << 22, 512) if small else (1 << 30, 8192)
    here = torch.randn(length, device=device)
    there = torch.empty_like(here)
    seconds = _median(device, lambda: there.copy_(here))
    yield {"what": "copy", "gigabytes_per_second": 8 * length / seconds / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = _median(device, lambda a=a, b=b: a @ b)  # type: ignore[misc]
        yield {"what": f"matrix product, {dtype}", "teraflops": 2 * side**3 / seconds / 1e12}


def tests(device: torch.device, small: bool) -> Iterator[Line]:
    """Those whose name says what they need; where the device is a GPU none may be skipped."""
    del small
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "gpu or cuda", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-2000:]]
    yield {"result": last[0], "failed": [row for row in done.stdout.splitlines() if row.startswith("FAILED")]}
    skipped = sum(row.startswith("SKIPPED") for row in done.stdout.splitlines())
    if done.returncode or (device.type == "cuda" and skipped):
        raise RuntimeError(f"{skipped} skipped: {done.stdout[-3000:]}{done.stderr[-1000:]}")


def masks(device: torch.device, small: bool) -> Iterator[Line]:
    length = 1 << 18 if small else 1 << 27
    for dtype, unsigned in ((torch.int32, np.uint32), (torch.int64, np.uint64)):
        target = torch.zeros(length, dtype=dtype, device=device)
        size = length * target.element_size()
        ready = torch.ones_like(target)
        limit = _median(device, lambda t=target, r=ready: t.add_(r))  # type: ignore[misc]
        mask = np.zeros(length, unsigned)
        begun = time.perf_counter()
        stream.add_mask(mask, SEED)
        facts = {"bits": 8 * target.element_size(), "values": length, "addition_of_a_ready_mask": size / limit / 1e9}
        yield {"what": "key stream, CPU", "gigabytes_per_second": size / (time.perf_counter() - begun) / 1e9, **facts}
        for compiled in (False, True) if device.type == "cuda" else (False,):
            target.zero_()
            add_mask_tensor(target, SEED, compiled=compiled)
            if not np.array_equal(target.cpu().numpy().view(unsigned), mask):
                raise RuntimeError(f"another key stream than the CPU's: {dtype}, compiled: {compiled}")
            seconds = _median(device, lambda t=target, c=compiled: add_mask_tensor(t, SEED, compiled=c))  # type: ignore[misc]
            name = "key stream, device" + (", compiled" if compiled else "")
            yield {"what": name, "equal": True, "gigabytes_per_second": size / seconds / 1e9, **facts}
    yield from _masked_sum(device, 10_000 if small else 10_000_000)


def _masked_sum(device: torch.device, length: int) -> Iterator[Line]:
    parties = tuple(f"p{number}" for number in range(5))
    vectors = {party: torch.randint(-1000, 1000, (length,), device=device) for party in parties}
    session = Masked().open(SumSpec(parties=parties, length=length, bound=1000))
    begun = time.perf_counter()
    summing = session.begin()
    for party, vector in vectors.items():
        summing.submit(party, vector)  # a tensor is masked where it lives
    total = summing.finish().total
    seconds = time.perf_counter() - begun
    if not np.array_equal(np.asarray(total), sum(vectors.values()).cpu().numpy()):  # type: ignore[union-attr]
        raise RuntimeError("the masked sum is not the sum")
    yield {"what": "masked sum, parties and server", "parties": 5, "values": length, "seconds": seconds, "equal": True}


def federation(device: torch.device, small: bool) -> Iterator[Line]:
    """Noise in shares is float32 alone: what reads gradients of records is. In bf16 each party adds its own noise."""
    passes, batch_size = (1, 200) if small else (10, 2048)
    task = TASKS["fashion"](Split(parties=10), Training(batch_size=batch_size // 10, hidden=128), 0, _data())
    if small:
        task = dataclasses.replace(task, parties={name: _first(part, 40) for name, part in task.parties.items()})
    records = sum(len(part) for part in task.parties.values())
    steps = -(-records // batch_size)
    shares = FedSGD(batch_size=batch_size, steps_per_round=steps, learning_rate=0.5, momentum=0.9)
    promise = Privacy(epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    for precision, algorithm, privacy in (
        ("float32", shares, dataclasses.replace(promise, noise="distributed", colluders=1)),
        ("float32", FedAvg(), promise),
        ("bf16", FedAvg(), promise),
    ):
        with Busy(device) as busy:
            begun = time.perf_counter()
            run = federate(
                task,
                rounds=passes,
                algorithm=algorithm,
                privacy=privacy,
                secure_sum=Masked(corrupt=1, dropouts=1),
                participation=Participation(least=9),
                compute=Compute(device=str(device), precision=precision),  # type: ignore[arg-type]
            )
            seconds = time.perf_counter() - begun
        parts: list[dict[str, float]] = [msgspec.to_builtins(entry.times) for entry in run.history if entry.times]
        facts = {
            "algorithm": type(algorithm).__name__,
            "noise": privacy.noise,
            "precision": precision,
            "passes": passes,
        }
        yield {
            "what": "Fashion-MNIST, CNN, ten parties", **facts, "metrics": run.metrics, "seconds": seconds,
            "records_per_second": passes * records / seconds, **busy.found(),
            "seconds_of": {name: sum(part[name] for part in parts) for name in parts[0]},
        }  # fmt: skip


class Busy:
    """How busy the device is, by nvidia-smi, five times a second while the block runs. On a CPU it says nothing."""

    def __init__(self, device: torch.device) -> None:
        self._wanted, self._readings, self._end = device.type == "cuda", [], threading.Event()  # type: ignore[var-annotated]

    def __enter__(self) -> Busy:
        self._thread = threading.Thread(target=self._read, daemon=True)
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._wanted:
            self._thread.join(5.0)

    def _read(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu,power.draw", "--format=csv,noheader,nounits"]
        while not self._end.wait(0.2):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            if not done.returncode:
                self._readings.append([float(part) for part in done.stdout.splitlines()[0].split(",")])

    def found(self) -> Line:
        if not self._readings:
            return {"utilisation": None}
        percent, watts = (statistics.mean(column) for column in zip(*self._readings, strict=True))
        peak = torch.cuda.max_memory_allocated() / 2**20
        return {"utilisation": percent / 100, "watts": watts, "readings": len(self._readings), "peak_mebibytes": peak}


def program(name: str, device: torch.device, *options: str) -> Iterator[Line]:
    """The lines of another benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--device", str(device), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for row in done.stdout.splitlines():
        if row.startswith("{"):
            yield json.loads(row)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def cohort(device: torch.device, small: bool) -> Iterator[Line]:
    return program("simulation.py", device, "--repeats", "1" if small else "3", "--scale", "0.1" if small else "0.5")


def shadows(device: torch.device, small: bool) -> Iterator[Line]:
    return program("shadow.py", device, *(["--models", "4", "--steps", "5"] if small else []), "--repeats", "1")


def step(device: torch.device, small: bool) -> Iterator[Line]:
    return program("dp_step.py", device, "--repeats", "1" if small else "8")


def split(device: torch.device, small: bool) -> Iterator[Line]:
    """One party's encryption, on the CPU and on the device, of the same randomness: the same bytes must come out."""
    length = 20_000 if small else 4_000_000
    spec = SumSpec(parties=tuple(f"p{number}" for number in range(100)), length=length, bound=1 << 15)
    terms = SplitRound(parameters=choose(spec), session=SEED, number=1)
    vector = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, length)
    found: dict[str, tuple[float, bytes]] = {}
    for name, taken in (("cpu", vector), ("device", torch.from_numpy(vector).to(device))):
        for _ in range(2):  # the first compiles
            begun = time.perf_counter()
            sent = b"".join(encrypt(taken, terms, randomness=lambda count: bytes(count)).messages)
            found[name] = (time.perf_counter() - begun, sent)
        yield {"what": f"split key, one party, {name}", "million_values_per_second": length / found[name][0] / 1e6}
    if found["cpu"][1] != found["device"][1]:
        raise RuntimeError("the device encrypts to other bytes than the CPU")
    yield {"what": "split key", "equal": True, "device_over_cpu": found["cpu"][0] / found["device"][0]}


PARTS: dict[str, tuple[Callable[[torch.device, bool], Iterator[Line]], int]] = {  # and its limit, in seconds
    "machine": (machine, 30), "tests": (tests, 110), "masks": (masks, 70), "federation": (federation, 120),
    "cohort": (cohort, 40), "shadows": (shadows, 25), "step": (step, 50), "split": (split, 30),
}  # fmt: skip


def _median(device: torch.device, work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of one call, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def _first(dataset: Any, size: int) -> Any:
    return torch.utils.data.Subset(dataset, range(min(size, len(dataset))))


def _data() -> Path:
    return Path(os.environ.get("CHORAL_DATA", ROOT / "shared" / "data"))


def _commit() -> str | None:
    git = shutil.which("git")
    command = [git or "", "rev-parse", "HEAD"]
    return (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() if git else None
    )


def in_turn(names: list[str], options: list[str]) -> int:
    """Each part in a process of its own; how many failed. A rehearsal, on whatever machine, has 20 times as long."""
    failed, patience = 0, 20 if "--small" in options else 1
    for name in names:
        begun, limit = time.perf_counter(), patience * PARTS[name][1]
        command = [sys.executable, __file__, "--only", name, "--here", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            out, error = process.communicate(timeout=limit)
            trouble = error[-3000:] if process.returncode else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, _ = process.communicate()
            trouble = f"stopped at its limit of {limit} s"
        sys.stdout.write(out)
        say(
            name, {"ended": "failed" if trouble else "well", "seconds": time.perf_counter() - begun, "trouble": trouble}
        )
        failed += trouble is not None
    return failed


def say(part: str, line: Line) -> None:
    print(json.dumps({"part": part, **line}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    device = torch.device(wanted.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device that torch can use; --device cpu --small rehearses")
    if not wanted.here:
        return 1 if in_turn(wanted.only, ["--device", wanted.device, *(["--small"] if wanted.small else [])]) else 0
    for name in wanted.only:
        for line in PARTS[name][0](device, wanted.small):
            say(name, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
