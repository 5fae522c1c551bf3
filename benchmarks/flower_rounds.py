"""A secure round of Flower beside a bare one of its own FedAvg, with three sites, in one run.

    python benchmarks/flower_rounds.py [--nodes] [--repeats 3] [--trips 2 4]       where Flower is installed

constraints-flower.txt has its version. --trips: secure runs of each, in turns; else as many as the default is.

By default in Flower's simulation (ray), with the sites in processes of their own; with --nodes, a SuperLink and three
SuperNodes with TLS and node keys. The model is that of examples/flower, whose training takes milliseconds, so what is
measured is the messages. Bare and secure runs take turns. ``ratio_to_bare`` is seconds of a later secure round over
those of a bare round, medians. One JSON line per figure. The folders of sites are made as the tests make them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "flower" / "app")]

TIMED = """
import time
def timed(number, arrays):
    with open(TIMES, "a") as file:
        file.write(f"{time.monotonic()}\\n")
"""


def seconds_of(path: Path) -> list[float]:
    """Of each round, from the times at which the model was evaluated."""
    at = [float(line) for line in path.read_text().split()]
    path.unlink()
    return [after - before for before, after in itertools.pairwise(at)]


def sites_of(path: Path, place: Path) -> Any:
    from flower_federation import FlowerSites
    from flower_nodes import Flower

    (path / "sites").mkdir()
    return Flower(FlowerSites(path / "sites", place), place)


def simulated(flower: Any, times: Path, rounds: int, job: Path | None) -> list[float]:
    """One run in Flower's simulation. job: of a secure one."""
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from visits import client_app, task

    from choral.network.flower import Secure, secure_sum_mod

    names, place, data = flower.sites.names, flower.place, flower.sites.path

    def placed(message: Any, context: Any, call_next: Any) -> Any:
        name = names[int(context.node_config["partition-id"])]
        context.node_config |= {"choral-socket": str(place / name / "door"), "data": str(data / name / "points.npy")}
        return call_next(message, context)

    app = ClientApp(mods=[placed, *([secure_sum_mod] if job else [])])
    app.train()(client_app.train)
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:  # noqa: ARG001
        def timed(number: int, arrays: Any) -> None:  # noqa: ARG001
            with times.open("a") as file:
                file.write(f"{time.monotonic()}\n")

        bare = FedAvg(fraction_evaluate=0.0)
        (Secure(bare, job) if job else bare).start(
            grid, ArrayRecord(task.new_model().state_dict()), rounds, train_config=ConfigRecord({"lr": 0.1}),
            evaluate_fn=timed,
        )  # fmt: skip

    run_simulation(server, app, len(names), backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return seconds_of(times)


def on_nodes(flower: Any, times: Path, rounds: int, job: Path | None) -> list[float]:
    """One run of `flwr run`."""
    app = flower.place / f"app-{'secure' if job else 'bare'}"
    shutil.copytree(ROOT / "examples" / "flower" / "app", app, dirs_exist_ok=True)
    server, client = app / "visits" / "server_app.py", app / "visits" / "client_app.py"
    said = server.read_text().replace("app = ServerApp()", f"TIMES = {str(times)!r}\n{TIMED}\napp = ServerApp()")
    said = said.replace("        grid=grid,\n", "        grid=grid, evaluate_fn=timed,\n")
    if job is None:
        said = said.replace('Secure(FedAvg(), context.run_config["job"])', "FedAvg(fraction_evaluate=0.0)")
        client.write_text(client.read_text().replace("ClientApp(mods=[secure_sum_mod])", "ClientApp()"))
    server.write_text(said)
    words = f'num-server-rounds={rounds} job="{job or ""}"'
    flower.start("run", "flwr", "run", str(app), "here", "--stream", "--run-config", words)
    flower.running.pop("run").wait(1200)
    return seconds_of(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trips", type=int, nargs="+", choices=(2, 3, 4))
    wanted = parser.parse_args(arguments)
    folder, place = Path(tempfile.mkdtemp(prefix="flower-bench-")), Path(tempfile.mkdtemp(prefix="fb-"))
    flower = sites_of(folder, place)
    run = on_nodes if wanted.nodes else simulated
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[float]] = {"bare": []}
    try:
        flower.begin(nodes=wanted.nodes)
        for number in range(wanted.repeats):
            found["bare"] += run(flower, place / "times", wanted.rounds, None)[1:]
            for trips in wanted.trips or [None]:
                name, of = f"bench-{number}-{trips}", f"secure, {trips} trips" if trips else "secure"
                job = flower.job(name, wanted.rounds, approve=flower.sites.names, trips=trips)
                first, *later = run(flower, place / "times", wanted.rounds, job)
                found.setdefault(f"{of}, first", []).append(first)
                found.setdefault(f"{of}, later", []).extend(later)
    finally:
        for name in list(flower.running):
            flower.kill(name)
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    where = "three SuperNodes, TLS" if wanted.nodes else "simulation"
    bare = statistics.median(found["bare"])
    for what, seconds in found.items():
        median = statistics.median(seconds)
        print(json.dumps({"where": where, "round": what, "seconds": round(median, 3), "least": round(min(seconds), 3),
                          "most": round(max(seconds), 3), "ratio_to_bare": round(median / bare, 2),
                          "load": round(os.getloadavg()[0], 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
