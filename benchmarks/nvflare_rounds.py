"""A round of NVFlare with the secure sum, beside NVFlare's own: the same model down and up, in turns, in one job.

    python benchmarks/nvflare_rounds.py [--sizes 2410 1000000] [--rounds 10]

In an environment with NVFlare (`make test-engines` makes one), in its simulator: three sites, each a process at its
door, and NVFlare's processes between. Nobody trains. A bare round sends each site the weights as an array in NVFlare's
auxiliary messages and averages what comes back. One JSON line per size: medians and least of both in milliseconds,
`difference` the one minus the other, `ratio` the one over the other. The first round, which opens the session of the
sum, stands apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import numpy as np  # noqa: E402
from nvflare.apis.shareable import Shareable, make_reply  # noqa: E402
from nvflare.app_common.decomposers import numpy_decomposers  # noqa: E402
from nvflare.fuel.utils import fobs  # noqa: E402
from nvflare.recipe.spec import Recipe  # noqa: E402

from choral.jobs.engines.nvflare_job import ChoralServer, job_of  # noqa: E402
from choral.jobs.serving import serve_by_engine  # noqa: E402
from choral.jobs.settings import parse_job  # noqa: E402
from choral.network.nvflare.local_files import read_local  # noqa: E402
from choral.network.nvflare.messages import NVFlareMessages  # noqa: E402
from choral.network.nvflare.site import ChoralSite  # noqa: E402

CODE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import numpy as np
from choral.trainers import Task

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(SIZE))

    def forward(self, points):
        return points.sum(1) + self.weights.sum()

def task():
    def build(dataset):
        model = Model()
        return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=100)

    def fit(model, optimizer, loader, round):
        optimizer.step()  # of no gradient

    return Task(build=build, fit=fit, evaluate=lambda model: 0.0)

def site(data, training, seed):
    table = torch.from_numpy(np.load(data))
    return task(), TensorDataset(table[:, :6].contiguous(), table[:, 6].long())

def coordinator(training, seed):
    return task(), TensorDataset(torch.zeros(2, 6), torch.tensor([0, 1]))
"""


def _back(topic: str, request: Any, fl_ctx: Any) -> Any:
    """What was sent, as a site that did not train."""
    del topic, fl_ctx
    reply = make_reply("OK")
    reply["weights"] = request["weights"] + 0
    return reply


class BareSite(ChoralSite):
    """Beside Choral's requests, it sends an array back."""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == "_start_run":
            fobs.register(numpy_decomposers.NumpyArrayDecomposer)
            fl_ctx.get_engine().register_aux_message_handler("bare", _back)


class BareServer(ChoralServer):
    """After each round of the sum, one without: a line for each in `figures`."""

    def __init__(self, settings: str, job: str, size: int = 0, figures: str = "") -> None:
        super().__init__(settings, job)
        self.size, self.figures = size, figures

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        del abort_signal
        fobs.register(numpy_decomposers.NumpyArrayDecomposer)
        local = read_local(Path(fl_ctx.get_workspace().get_site_config_dir()))
        bare: list[float] = []

        def after(text: str) -> None:
            if text.startswith("round "):
                begun = time.perf_counter()
                self._bare(fl_ctx)
                bare.append(time.perf_counter() - begun)

        settings = parse_job(self.settings, self.job)
        messages, hub = NVFlareMessages(fl_ctx), Path(local["coordinator"])
        run = serve_by_engine(messages, settings, hub, out=Path(local["runs"]) / self.job, say=after)
        secure = [entry.seconds for entry in run.history[1:]]
        Path(self.figures).write_text(json.dumps({"secure": secure, "bare": bare}))

    def _bare(self, fl_ctx: Any) -> None:
        engine = fl_ctx.get_engine()

        def one(name: str) -> Any:
            request = Shareable()
            request["weights"] = np.zeros(self.size, np.float32)
            return engine.send_aux_request([name], "bare", request, 600.0, fl_ctx)[name]["weights"]

        names = [client.name for client in engine.get_clients()]
        with ThreadPoolExecutor(len(names)) as pool:
            mean = sum(pool.map(one, names)) / len(names)
        assert mean.shape == (self.size,)


def measure(size: int, rounds: int) -> dict[str, Any]:
    from nvflare.recipe.sim_env import SimEnv
    from nvflare_sites import DoorSites

    from choral.network.nvflare import write_local
    from choral.trainers.task.settings import Training

    with tempfile.TemporaryDirectory(prefix="nvflare-") as folder:
        path = Path(folder)
        sites = DoorSites(path / "sites")
        try:
            sites.federation.code = code = CODE.replace("SIZE", str(size))
            for name in sites.federation.names:
                sites.federation.configure(name)
            (sites.path / "linear.py").write_text(code)
            (sites.hub / "tasks" / "linear.py").write_text(code)
            settings = sites.settings(training=Training(rounds=rounds + 1, batch_size=100))
            settings = replace(settings, serve=replace(settings.serve, step=600.0))
            sites.job("bench", settings)
            local = path / "bench" / "local"
            local.mkdir(parents=True)
            write_local(local, door=sites.door(), coordinator=str(sites.hub), runs=str(path / "runs"))
            allowed = json.loads((local / "resources.json").read_text())
            allowed["class_allow_list"] += ["nvflare_rounds.BareServer", "nvflare_rounds.BareSite"]
            (local / "resources.json").write_text(json.dumps(allowed))
            recipe(sites.path / "bench.toml", size, path / "figures").execute(
                SimEnv(clients=list(sites.federation.names), workspace_root=str(path))
            )
            found = json.loads((path / "figures").read_text())
        finally:
            sites.close()
    secure, bare = ([1e3 * each for each in found[kind]] for kind in ("secure", "bare"))
    return line(size, secure, bare)


def recipe(job: Path, size: int, figures: Path) -> Any:
    import nvflare_rounds  # by its name, under which NVFlare's processes import it

    server = nvflare_rounds.BareServer(job.read_text(), job.stem, size, str(figures))
    return Recipe(job_of(server, nvflare_rounds.BareSite(), min_clients=3))


def line(size: int, secure: list[float], bare: list[float]) -> dict[str, Any]:
    first, secure, bare = secure[0], secure[1:], bare[1:]
    middle = [statistics.median(each) for each in (secure, bare)]
    return {
        "figure": "nvflare round, three sites", "size": size, "rounds": len(secure),
        "secure_ms": round(middle[0], 1), "bare_ms": round(middle[1], 1),
        "difference_ms": round(middle[0] - middle[1], 1), "ratio": round(middle[0] / middle[1], 2),
        "least_secure_ms": round(min(secure), 1), "least_bare_ms": round(min(bare), 1),
        "least_difference_ms": round(min(secure) - min(bare), 1), "first_secure_ms": round(first, 1),
        "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2410, 1_000_000])
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for size in given.sizes:
        print(json.dumps(measure(size, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
