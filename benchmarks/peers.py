"""Other frameworks on the jobs of bare.py: a process for each, which does a round whenever simulation.py says so.

Not to be started by hand: ``python benchmarks/simulation.py --peer-python PEERS/bin/python`` starts it with the
interpreter of an environment that has torch, safetensors and the peers (``pip install pfl "flwr[simulation]"``). This
project depends on none of the peers. One thread each; Flower gets one core, and so one actor.

    PEERS/bin/python benchmarks/peers.py pfl|flwr JOB FILE
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import bare


def pfl(job: str, path: str) -> None:
    """pfl's federated averaging with its simulated backend; it goes through each party's data in order."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = bare.JOBS[job].model()

        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.model.train()
            return F.cross_entropy(self.model(inputs), targets)

        def metrics(self, *_: torch.Tensor) -> dict[str, Any]:  # pfl wants one
            return {}

    parties, module, users = bare.read_parties(path), Module(), iter(range(10**9))
    resident = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    data = FederatedDataset(
        lambda number: Dataset(list(parties[number]), user_id=str(number)),
        lambda: next(users) % len(parties),
    )
    backend = SimulatedBackend(training_data=data, val_data=data)
    local = NNTrainHyperParams(local_learning_rate=bare.RATE, local_num_epochs=1, local_batch_size=bare.BATCH)
    parameters = NNAlgorithmParams(
        central_num_iterations=2, evaluation_frequency=10**6, train_cohort_size=len(parties), val_cohort_size=None
    )
    while True:
        algorithm: Any = FederatedAveraging()
        # Its round 0 always evaluates every party twice; round 1 is the one without.
        contexts, _, _ = algorithm.get_next_central_contexts(resident, 1, parameters, local, None)
        sums, metrics = backend.gather_results(resident, algorithm, central_context=contexts[0])
        algorithm.process_aggregated_statistics(contexts[0], metrics, resident, sums)
        bare.turn(version=importlib.metadata.version("pfl"))


def flwr(job: str, path: str) -> None:
    """Flower's simulation with an app of its message API, whose clients train by the steps of the bare loop."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        model = bare.JOBS[job].model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        inputs, targets = bare.read_parties(path)[int(context.node_config["partition-id"])]
        bare.epoch(model, list(model.parameters()), inputs, targets)
        made = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(targets)}),
        }
        return Message(content=RecordDict(made), reply_to=message)

    class Timed(FedAvg):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            answers = list(replies)
            if failed := [answer.error.reason for answer in answers if answer.has_error()]:
                raise RuntimeError(f"{len(failed)} of {len(answers)} clients failed: {failed[0]}")
            made = super().aggregate_train(server_round, answers)
            bare.turn(version=importlib.metadata.version("flwr"))
            return made

    count = len(bare.read_parties(path))

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        del context
        weights = ArrayRecord(bare.JOBS[job].model().state_dict())
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
        strategy.start(grid=grid, initial_arrays=weights, num_rounds=10**6)

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=count,
        backend_config={
            "init_args": {"num_cpus": 1, "log_to_driver": False},
            "client_resources": {"num_cpus": 1.0},
        },
    )


PEERS: dict[str, Callable[[str, str], None]] = {"pfl": pfl, "flwr": flwr}


def main(peer: str, job: str, path: str) -> None:
    try:
        importlib.metadata.version(peer)
    except importlib.metadata.PackageNotFoundError:
        bare.turn(absent=True)
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the actors that Ray starts
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    PEERS[peer](job, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
