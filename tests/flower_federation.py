"""A federation whose parties train in Flower's ClientApps: sites with doors, the quickstart's app, a grid."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from site_doors import doors
from site_federation import Federation, approved, dataset_of, toml_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.network.flower import secure_sum_mod
from choral.trainers import Run, Task, federate

ENGINE = ('[tasks."linear.py"]\ndata = "points"', '[tasks.flower-app]\ndata = "points"\ntrained_by = "engine"')


FLOWER = importlib.util.find_spec("flwr") is not None
ACCURACY = 0.987654321
"""What every site says of its evaluation."""
VISITS = Path(__file__).resolve().parent.parent / "examples" / "flower" / "app"


def visits_task() -> Any:
    """The model and the training of the example, whose app runs in a Flower of its own elsewhere."""
    spec = importlib.util.spec_from_file_location("visits_task", VISITS / "visits" / "task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_model() -> nn.Module:
    model: nn.Module = visits_task().new_model()
    return model


def built(dataset: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """The order of the records is fixed, so that the training is the same wherever it runs."""
    model = new_model()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=8)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(points), labels.float()).backward()
        optimizer.step()


def trained(name: str, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """What a ClientApp does, without Flower: the weights after the training, and the number of records."""
    model, dataset = new_model(), dataset_of(name)
    model.load_state_dict(dict(state))
    points, labels = dataset.tensors
    visits_task().train(model, TensorDataset(points, labels.float()), 0.1)
    return dict(model.state_dict()), len(dataset)


def rehearsed(names: Iterable[str], rounds: int, secure_sum: Any, *, without: Mapping[int, str] | None = None) -> Run:
    """The same by `federate`. without: who is missing, by round."""
    sizes = {len(dataset_of(name)): name for name in names}

    def failing(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, round: int) -> None:
        if (without or {}).get(round) == sizes[len(loader.dataset)]:
            raise RuntimeError("away")
        fit(model, optimizer, loader)

    task = Task(
        build=built, fit=failing, evaluate=lambda _: 0.0, initial_weights=new_model().state_dict(), min_classes=1
    )
    return federate(task, {name: dataset_of(name) for name in names}, rounds=rounds, secure_sum=secure_sum)


@dataclasses.dataclass
class FlowerSites:
    """Folders of sites and of the coordinator; doors in this process."""

    path: Path
    place: Path
    names: tuple[str, ...] = ("north", "south", "east")

    def __post_init__(self) -> None:
        from choral.network import SiteFolder

        self.federation = Federation(self.path, names=self.names)
        for name in self.names:
            self.federation.configure(name, ENGINE)
        self.hub = SiteFolder.init(self.path / "coordinator", "hub")
        pinned = self.hub.pinned
        for name in self.names:
            folder = self.federation.site(name)
            own = folder.pinned.without("hub").with_(self.hub.identity.certificate, coordinator=True)
            own.write(folder.path / "directory.toml")
            pinned = pinned.with_(folder.identity.certificate)
        pinned.write(self.hub.path / "directory.toml")

    def job(self, **changed: Any) -> Path:
        """The coordinator's job file."""
        settings = self.federation.settings(**{"task": "flower-app", **changed})
        path = self.hub.path / "job.toml"
        path.touch(0o600)
        path.write_text(toml_of(settings))
        return path

    def approve(self, offer: Any) -> None:
        for name in self.names:
            folder = self.federation.site(name)
            folder.offers.keep(offer)
            approved(folder, offer)

    def doors(self) -> AbstractContextManager[dict[str, str]]:
        return doors(self.federation, self.place)


@dataclasses.dataclass
class Node:
    node_id: int
    name: str


class NodesHere:
    """Flower's grid, with every ClientApp in this process. app: `(message, context) -> message`, with its mods.

    lost: names whose messages get no reply. seen: every content that went either way. before: is told of each message.
    """

    def __init__(self, app: Callable[[Any, Any], Any], sockets: Mapping[str, str], *, named: bool = True) -> None:
        self.app, self.sockets, self.lost, self.seen = app, dict(sockets), set[str](), list[Any]()
        self.named, self.repeat = named, 1
        self.before: Callable[[str, Any], Any] = lambda name, message: None
        self._ids = dict(enumerate(sockets, 100))
        self._replies: dict[str, Any] = {}

    def get_nodes(self) -> list[Node]:
        return [Node(number, name if self.named else "") for number, name in self._ids.items() if name not in self.lost]

    def get_node_ids(self) -> list[int]:
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        found = []
        for number, message in enumerate(messages):
            name = self._ids[message.metadata.dst_node_id]
            key = f"{id(message)}-{number}-{len(self.seen)}"
            message.metadata.__dict__["_message_id" if hasattr(message.metadata, "_message_id") else "message_id"] = key
            self.seen.append(message.content)
            found.append(key)
            if name in self.lost or self.before(name, message) is False:
                continue
            for _ in range(self.repeat):
                reply = self.app(_copied(message), self.context(name))
            if not reply.has_error():
                self.seen.append(reply.content)
            self._replies[key] = reply
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        return [self._replies.pop(each) for each in list(message_ids) if each in self._replies]

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def context(self, name: str) -> Any:
        from flwr.app import Context, RecordDict

        number = list(self.sockets).index(name)
        own = {"choral-socket": self.sockets[name]} if self.named else {"partition-id": number, "num-partitions": 3}
        run = {"choral-socket": self.sockets[name].replace(f"{name}/", "{partition-id}/")}
        return Context(1, 1, own, RecordDict(), run)


def _copied(message: Any) -> Any:
    """As a process of its own has it."""
    import copy

    return copy.copy(message)


def client_app(name_of: Callable[[Any], str], calls: list[str] | None = None) -> Callable[[Any, Any], Any]:
    """In the shape of Flower's quickstart for PyTorch, with the mod around it."""
    train = bare_app(name_of, calls)
    return lambda message, context: secure_sum_mod(message, context, train)


def bare_app(name_of: Callable[[Any], str], calls: list[str] | None = None) -> Callable[[Any, Any], Any]:
    """The same without the mod: what a site trained, in the clear. An evaluation tells what nobody may know."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    def answer(message: Any, context: Any) -> Any:
        name = name_of(context)
        if calls is not None:
            calls.append(name)
        if message.metadata.message_type == "evaluate":
            metrics = MetricRecord({"accuracy": ACCURACY, "num-examples": len(dataset_of(name))})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        assert message.content["config"]["lr"] == 0.1
        state = {key: torch.from_numpy(each.numpy().copy()) for key, each in message.content["arrays"].items()}
        new, examples = trained(name, state)
        arrays = ArrayRecord({key: Array(tensor.numpy()) for key, tensor in new.items()})
        metrics = MetricRecord({"train_loss": 0.123456, "num-examples": examples})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return answer


def arrays_of(model: torch.nn.Module) -> Any:
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({key: Array(tensor.numpy()) for key, tensor in model.state_dict().items()})


def config() -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord({"lr": 0.1})


def started(
    sites: FlowerSites,
    grid: NodesHere,
    inner: Any = None,
    *,
    rounds: int = 3,
    approve: bool = True,
    evaluate_fn: Any = None,
    **job: Any,
) -> Any:
    from flwr.serverapp.strategy import FedAvg

    from choral.network.flower import Secure

    strategy = Secure(inner or FedAvg(), sites.job(**job))
    if approve:
        sites.approve(offer_of(strategy, grid, rounds))
    return strategy.start(
        grid, arrays_of(new_model()), num_rounds=rounds, train_config=config(), evaluate_fn=evaluate_fn
    )


def offer_of(strategy: Any, grid: NodesHere, rounds: int) -> Any:
    """The offer that the strategy will make."""
    from choral.jobs.engines.flower_strategy import shapes_of
    from choral.network.flower.grid import FlowerGrid

    coordinator = strategy._coordinator
    adapter = FlowerGrid(grid, coordinator.names)
    name = type(strategy._inner).__name__
    return coordinator.rounds(adapter, shapes_of(arrays_of(new_model())), rounds=rounds, strategy=name).offer


def socket_owner(sites: FlowerSites) -> Any:
    def name_of(context: Any) -> str:
        if (part := context.node_config.get("partition-id")) is not None:
            return sites.names[int(part)]
        return Path(context.node_config["choral-socket"]).parent.name

    return name_of


def same(result: Any, run: Any) -> bool:
    """Bit by bit."""
    found = {key: torch.from_numpy(each.numpy().copy()) for key, each in result.arrays.items()}
    return found.keys() == run.state.keys() and all(torch.equal(found[key], run.state[key]) for key in found)
