"""Engines, whole rounds and other frameworks against a bare loop that does the arithmetic and nothing else.

Everything is interleaved, round by round, with one thread per process; medians. Engines and the bare loop (bare.py) run
in this process, whole rounds of ``federate`` in a process of their own, or in two under torchrun, and each peer in one
of an interpreter that has it. A line of JSON for each, with the ratio to the bare loop (below 1 is faster): of
processor time, which others on the machine disturb less, summed over all processes that took part, and of wall-clock
time.
With several processes also the busiest one's processor time, and the wall-clock time, beside ``federate`` in one.

    python benchmarks/simulation.py [--only cnn|logistic] [--repeats 5] [--device cpu]
        [--processes 2] [--compile] [--peer-python PEERS/bin/python]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import bare
from driven import Driven, Spent, timed

from choral import Compute, Keep, Task, federate
from choral.trainers.algorithms.interface import Train
from choral.trainers.engines import Cohort, Direct
from choral.trainers.local_steps.epochs import Epochs
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.task.arithmetic import Arithmetic

PEERS = ("pfl", "flwr")


def task(job: str, path: Path, device: torch.device) -> dict[str, Any]:
    """Parties and build for ``federate``."""

    def build(dataset: TensorDataset) -> Any:
        model = bare.JOBS[job].model()
        optimizer = torch.optim.SGD(model.parameters(), lr=bare.RATE)
        return model, optimizer, DataLoader(dataset, batch_size=bare.BATCH, shuffle=True)

    parties = {
        f"party-{k}": TensorDataset(*(tensor.to(device) for tensor in pair))
        for k, pair in enumerate(bare.read_parties(path))
    }
    return {"parties": parties, "build": build}


def own_loop(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    Epochs()(model, optimizer, loader)


def engines(job: str, path: Path, device: torch.device, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """A cohort's training, without its sum. The user's own loop is also computed in bfloat16."""
    made = task(job, path, device)
    orders = [(party, Train()) for party in made["parties"]]

    def resident(fit: Any, arithmetic: Arithmetic | None = None) -> Resident:
        made_here = Resident(
            build=made["build"],
            fit=fit,
            datasets=made["parties"],
            privacy_engines={},
            seed=0,
            arithmetic=arithmetic or Arithmetic(device),
        )
        for party in made["parties"]:
            made_here.seat(party)
        return made_here

    usual, known = resident(own_loop), resident(Epochs())
    reduced = resident(own_loop, Arithmetic(device, "bf16"))
    weights = known.layout.read()

    def cohort(trainer: Any) -> Callable[[], None]:
        return lambda: drained(trainer.do(orders, weights, 1))

    own = "resident, the user's own loop"
    more = {f"{own}, compiled": resident(own_loop, Arithmetic(device, compile=True))} if compiled else {}
    return {
        "bare loop": bare.bare_loop(
            bare.JOBS[job].model().to(device), [dataset.tensors for dataset in made["parties"].values()]
        ),
        own: cohort(usual),
        f"{own}, bf16": cohort(reduced),
        **{name: cohort(trainer) for name, trainer in more.items()},
        "direct": cohort(Direct(known)),
        "cohort": cohort(Cohort(known)),
    }


def drained(results: Iterable[Any]) -> None:
    for _ in results:
        pass


def serve(job: str, path: Path, device: torch.device) -> None:
    """Rounds of ``federate`` as anybody calls it, each when it is asked for."""
    federate(
        Task(**task(job, path, device), fit=Epochs(), evaluate=lambda _model: 0.0, min_classes=1),
        rounds=10**6,
        compute=Compute(device=str(device)),
        keep=Keep(on_round=lambda _entry: bare.turn()),
    )


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> None:
    path, device = folder / f"{name}.safetensors", torch.device(arguments.device)
    bare.write_parties(bare.JOBS[name], arguments.scale, path)
    jobs: dict[str, Callable[[], Spent]] = {
        engine: lambda work=work: timed(lambda: finished(work, device))  # type: ignore[misc]
        for engine, work in engines(name, path, device, compiled=arguments.compile).items()
    }
    versions = {"bare loop": torch.__version__}
    here = [str(Path(__file__).resolve()), "--serve", name, "--data", str(path), "--device", arguments.device]
    commands = {"federate, plain sum": [sys.executable, *here]}
    if arguments.processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
        commands[f"federate, {arguments.processes} processes"] = [sys.executable, *torchrun, *here]
    for peer in PEERS if arguments.peer_python else ():
        commands[peer] = [
            arguments.peer_python,
            str(Path(__file__).with_name("peers.py")),
            *(peer, name, str(path)),
        ]
    with ExitStack() as stack:
        for engine, command in commands.items():
            process = stack.enter_context(Driven(command))
            said = process.first()
            if said.get("absent"):
                say(job=name, engine=engine, absent=f"not installed for {arguments.peer_python}")
                continue
            jobs[engine] = process.once
            versions |= {engine: said["version"]} if "version" in said else {}
        spent: dict[str, list[Spent]] = {engine: [] for engine in jobs}
        for repeat in range(arguments.repeats + 1):
            for engine, once in jobs.items():
                found = once()
                if repeat:  # the first is warm-up
                    spent[engine].append(found)
    report(name, spent, versions, arguments, parties=len(bare.read_parties(path)))


def report(
    name: str,
    spent: dict[str, list[Spent]],
    versions: Mapping[str, str],
    arguments: argparse.Namespace,
    *,
    parties: int,
) -> None:
    def middle(engine: str, number: Callable[[Spent], float]) -> float:
        return statistics.median(number(one) for one in spent[engine])

    def cpu(one: Spent) -> float:
        return sum(one.cpu)

    for engine in spent:
        mine, wall = middle(engine, cpu), middle(engine, lambda one: one.wall)
        line: dict[str, Any] = {"job": name, "engine": engine, "parties": parties, "repeats": arguments.repeats}
        line |= {"version": versions[engine]} if engine in versions else {}
        line |= {
            "ms_per_party": round(mine / parties * 1e3, 3),
            "ratio_to_bare": round(mine / middle("bare loop", cpu), 3),
            "wall_ratio_to_bare": round(wall / middle("bare loop", lambda one: one.wall), 3),
            "device": arguments.device,
        }
        if engine.endswith("processes"):
            one = "federate, plain sum"
            line["busiest_process_ratio_to_one"] = round(middle(engine, lambda o: max(o.cpu)) / middle(one, cpu), 3)
            line["wall_ratio_to_one"] = round(wall / middle(one, lambda o: o.wall), 3)
        say(**line)


def finished(work: Callable[[], Any], device: torch.device) -> None:
    work()
    if device.type == "cuda":  # processor time says little beside an accelerator: look at wall_ratio_to_bare
        torch.cuda.synchronize(device)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(bare.JOBS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of parties")
    parser.add_argument("--processes", type=int, default=1, help="also under torchrun, with so many processes")
    parser.add_argument("--compile", action="store_true", help="also the user's own loop with a compiled model")
    parser.add_argument("--peer-python", help="interpreter of an environment with pfl or flwr")
    parser.add_argument("--serve", choices=sorted(bare.JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        serve(arguments.serve, arguments.data, torch.device(arguments.device))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in [arguments.only] if arguments.only else bare.JOBS:
            measure(name, arguments, Path(folder))


if __name__ == "__main__":
    main()
