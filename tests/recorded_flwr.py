"""Flower 1.42 as far as the mod and the strategy touch it: shapes recorded from the package, not installed here.

`SIGNATURES` is compared with the package where it is installed, and what runs here follows its source.
"""

from __future__ import annotations

import io
import types
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SIGNATURES = {
    "app.Array": ("dtype", "shape", "stype", "data", "ndarray", "torch_tensor"),
    "app.ArrayRecord": ("numpy_ndarrays", "torch_state_dict", "array_dict", "keep_input"),
    "app.ConfigRecord": ("config_dict", "keep_input"),
    "app.MetricRecord": ("metric_dict", "keep_input"),
    "app.Error": ("code", "reason"),
    "app.Context": ("run_id", "node_id", "node_config", "state", "run_config", "series_id"),
    "app.Message": (
        "dst_node_id", "message_type", "content", "error", "ttl", "group_id", "dst_task_id", "reply_to", "metadata",
    ),
    "serverapp.strategy.Strategy.start": (
        "grid", "initial_arrays", "num_rounds", "timeout", "train_config", "evaluate_config", "evaluate_fn",
    ),
    "serverapp.strategy.FedAvg.configure_train": ("server_round", "arrays", "config", "grid"),
    "serverapp.strategy.FedAvg.aggregate_train": ("server_round", "replies"),
    "serverapp.strategy.FedAvg.configure_evaluate": ("server_round", "arrays", "config", "grid"),
    "serverapp.strategy.FedAvg.aggregate_evaluate": ("server_round", "replies"),
    "serverapp.Grid.get_nodes": (),
    "serverapp.Grid.push_messages": ("messages",),
    "serverapp.Grid.pull_messages": ("message_ids",),
}  # fmt: skip
CODES = {"NODE_UNAVAILABLE": 5, "MOD_FAILED_PRECONDITION": 6, "CLIENT_APP_CRASHED": 8}


class Array:
    def __init__(
        self, ndarray: Any = None, *, dtype: str = "", shape: Any = (), stype: str = "", data: bytes = b""
    ) -> None:
        if ndarray is not None:
            raw = io.BytesIO()
            np.save(raw, ndarray, allow_pickle=False)
            dtype, shape, stype, data = str(ndarray.dtype), ndarray.shape, "numpy.ndarray", raw.getvalue()
        assert isinstance(shape, tuple)  # it refuses a list
        assert isinstance(data, bytes)
        self.dtype, self.shape, self.stype, self.data = dtype, shape, stype, data

    def numpy(self) -> Any:
        assert self.stype == "numpy.ndarray"
        return np.load(io.BytesIO(self.data), allow_pickle=False)


class ArrayRecord(dict[str, Array]):
    def __init__(self, array_dict: Any = None) -> None:
        super().__init__(array_dict or {})
        assert all(isinstance(each, Array) for each in self.values())

    def to_numpy_ndarrays(self) -> list[Any]:
        return [each.numpy() for each in self.values()]


class ConfigRecord(dict[str, Any]):
    def __init__(self, config_dict: Any = None) -> None:
        super().__init__(config_dict or {})
        assert all(isinstance(each, str | int | float | bool | bytes | list) for each in self.values())


class MetricRecord(dict[str, Any]):
    def __init__(self, metric_dict: Any = None) -> None:
        super().__init__(metric_dict or {})
        assert all(isinstance(each, int | float | list) for each in self.values())


class RecordDict(dict[str, Any]):
    def __init__(self, records: Any = None) -> None:
        super().__init__(records or {})
        assert all(isinstance(each, ArrayRecord | ConfigRecord | MetricRecord) for each in self.values())

    @property
    def array_records(self) -> dict[str, ArrayRecord]:
        return {key: each for key, each in self.items() if isinstance(each, ArrayRecord)}

    @property
    def metric_records(self) -> dict[str, MetricRecord]:
        return {key: each for key, each in self.items() if isinstance(each, MetricRecord)}


@dataclass
class Error:
    code: int
    reason: str | None = None


@dataclass
class Metadata:
    message_type: str
    dst_node_id: int = 0
    src_node_id: int = 0
    reply_to_message_id: str = ""
    ttl: float = 0.0
    message_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Message:
    def __init__(
        self,
        said: Any,
        *,
        dst_node_id: int | None = None,
        message_type: str | None = None,
        ttl: float | None = None,
        reply_to: Message | None = None,
    ) -> None:
        if reply_to is None:
            assert isinstance(said, RecordDict)
            assert dst_node_id is not None
            assert message_type in ("train", "evaluate", "query")
            self.metadata = Metadata(message_type, dst_node_id, ttl=ttl or 43200.0)
        else:
            assert isinstance(said, RecordDict | Error)
            asked = reply_to.metadata
            self.metadata = Metadata(
                asked.message_type, src_node_id=asked.dst_node_id, reply_to_message_id=asked.message_id
            )
        self._content, self._error = (None, said) if isinstance(said, Error) else (said, None)

    @property
    def content(self) -> Any:
        assert self._content is not None
        return self._content

    @content.setter
    def content(self, value: Any) -> None:
        assert isinstance(value, RecordDict)
        self._content = value

    @property
    def error(self) -> Error:
        assert self._error is not None
        return self._error

    def has_error(self) -> bool:
        return self._error is not None


@dataclass
class Context:
    run_id: int
    node_id: int
    node_config: dict[str, Any]
    state: RecordDict
    run_config: dict[str, Any]


class Result:
    def __init__(self) -> None:
        self.arrays = ArrayRecord()
        self.train_metrics_clientapp: dict[int, Any] = {}
        self.evaluate_metrics_clientapp: dict[int, Any] = {}
        self.evaluate_metrics_serverapp: dict[int, Any] = {}


class Strategy:
    def start(
        self,
        grid: Any,
        initial_arrays: Any,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: Any = None,
        evaluate_config: Any = None,
        evaluate_fn: Any = None,
    ) -> Result:
        self.summary()
        result, arrays = Result(), initial_arrays
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        for number in range(1, num_rounds + 1):
            messages = self.configure_train(number, arrays, train_config, grid)
            replies = grid.send_and_receive(messages, timeout=timeout)
            found, metrics = self.aggregate_train(number, replies)
            if found is not None:
                result.arrays = arrays = found
            if metrics is not None:
                result.train_metrics_clientapp[number] = metrics
            messages = self.configure_evaluate(number, arrays, evaluate_config, grid)
            metrics = self.aggregate_evaluate(number, grid.send_and_receive(messages, timeout=timeout))
            if metrics is not None:
                result.evaluate_metrics_clientapp[number] = metrics
            if evaluate_fn is not None:
                result.evaluate_metrics_serverapp[number] = evaluate_fn(number, arrays)
        return result

    summary: Any
    configure_train: Any
    aggregate_train: Any
    configure_evaluate: Any
    aggregate_evaluate: Any


class FedAvg(Strategy):
    arrayrecord_key, configrecord_key, weighted_by_key = "arrays", "config", "num-examples"

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_available_nodes: int = 2,
    ) -> None:
        self.fraction_train, self.fraction_evaluate = fraction_train, fraction_evaluate
        self.min_train_nodes, self.min_available_nodes = min_train_nodes, min_available_nodes

    def summary(self) -> None:
        pass

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Message]:
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return [Message(record, dst_node_id=each, message_type="train") for each in grid.get_node_ids()]

    def aggregate_train(self, server_round: int, replies: Any) -> tuple[Any, Any]:
        contents = [reply.content for reply in replies]
        if not contents:
            return None, None
        weights = [next(iter(each.metric_records.values()))[self.weighted_by_key] for each in contents]
        arrays: dict[str, Any] = {}
        for each, weight in zip(contents, weights, strict=True):
            (record,) = each.array_records.values()
            for key, value in record.items():
                part = value.numpy() * (weight / sum(weights))
                arrays[key] = part if key not in arrays else arrays[key] + part
        return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()}), MetricRecord({})

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Message]:
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        nodes = grid.get_node_ids() if self.fraction_evaluate else ()
        return [Message(record, dst_node_id=each, message_type="evaluate") for each in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        found = [next(iter(reply.content.metric_records.values())) for reply in replies if not reply.has_error()]
        return MetricRecord({"accuracy": max(each["accuracy"] for each in found)}) if found else None


class FedAdam(FedAvg):
    eta, beta_1, beta_2, tau = 0.1, 0.9, 0.99, 1e-3

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Message]:
        self.current_arrays = {key: array.numpy() for key, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> tuple[Any, Any]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, metrics
        change = {key: array.numpy() - self.current_arrays[key] for key, array in arrays.items()}
        if not hasattr(self, "m_t"):
            self.m_t, self.v_t = ({key: np.zeros_like(each) for key, each in change.items()} for _ in range(2))
        self.m_t = {key: self.beta_1 * each + (1 - self.beta_1) * change[key] for key, each in self.m_t.items()}
        self.v_t = {key: self.beta_2 * each + (1 - self.beta_2) * change[key] ** 2 for key, each in self.v_t.items()}
        eta = (  # np.float64, and so are the arrays that come of it
            self.eta
            * np.sqrt(1 - np.power(self.beta_2, server_round + 1.0))
            / (1 - np.power(self.beta_1, server_round + 1.0))
        )
        new = {
            key: each + eta * self.m_t[key] / (np.sqrt(self.v_t[key]) + self.tau)
            for key, each in self.current_arrays.items()
        }
        return ArrayRecord({key: Array(np.asarray(each)) for key, each in new.items()}), metrics


class FedAvgM(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> tuple[Any, Any]:
        return super().aggregate_train(server_round, replies)


class FedMedian(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> tuple[Any, Any]:
        return super().aggregate_train(server_round, replies)


class FedProx(FedAvg):
    pass


class Krum(FedMedian):
    pass


def modules() -> dict[str, types.ModuleType]:
    """Flower's, under the names that are imported."""
    app = types.ModuleType("flwr.app")
    for kind in (Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict):
        setattr(app, kind.__name__, kind)
    strategy = types.ModuleType("flwr.serverapp.strategy")
    for kind in (FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, Krum, Strategy):
        setattr(strategy, kind.__name__, kind)
    strategy.FedAdagrad = strategy.FedYogi = FedAdam  # type: ignore[attr-defined]
    flwr, serverapp = types.ModuleType("flwr"), types.ModuleType("flwr.serverapp")
    flwr.app, flwr.serverapp, serverapp.strategy = app, serverapp, strategy  # type: ignore[attr-defined]
    return {"flwr": flwr, "flwr.app": app, "flwr.serverapp": serverapp, "flwr.serverapp.strategy": strategy}
