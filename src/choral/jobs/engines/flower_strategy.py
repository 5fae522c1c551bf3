"""The ServerApp's end: a strategy of Flower's that is told the mean of a secure sum, and no site's own reply.

    strategy = Secure(FedAvg(...), "hub/job.toml")
    result = strategy.start(grid, initial_arrays, num_rounds=3, train_config=..., evaluate_fn=...)

In each round all sites are asked; what the strategy inside is given is one reply, the weighted mean over all who were
in the sum and what they count for together. So only strategies that average can be inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from choral.errors import ConfigError
from choral.jobs.engines.flower_job import Coordinator, log
from choral.network.coordinator.engine_rounds import EngineRounds, moved
from choral.network.flower.grid import FlowerGrid
from choral.network.flower.mod import MODEL, Model, write_model
from choral.protocols.errors import DisputedSharesError, TooFewSurvivorsError
from choral.trainers.algorithms.interface import ExchangeMean

AVERAGING = ("FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedAdagrad", "FedYogi")
"""Flower's strategies that use the weighted mean of all replies, and nothing of a single one."""


class Secure(Strategy):  # type: ignore[misc]  # Flower is not there where types are checked
    """See the module. inner: one of `AVERAGING`, or of a class that leaves their `aggregate_train` as it is.
    job: the coordinator's job file. folder: the coordinator's, by default that of the job file.

    Per-site evaluation is not asked for, since its metrics and counts would pass in the clear: give `evaluate_fn` to
    `start`. Raises: ConfigError for another strategy, or one that asks some nodes only; as reading the job file.
    """

    def __init__(self, inner: FedAvg, job: str | Path, *, folder: str | Path | None = None) -> None:
        check_averages(inner)
        self._inner = inner
        self._coordinator = Coordinator.read(Path(job), None if folder is None else Path(folder))
        self._rounds: EngineRounds | None = None
        self._grid: FlowerGrid | None = None
        self._failed, self._completed, self._now = 0, 0, torch.zeros(0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._mean: ExchangeMean | None = None
        self._after: torch.Tensor | None = None
        least = max(inner.min_train_nodes, inner.min_available_nodes)
        if least > (sites := len(self._coordinator.names)):
            raise ConfigError(f"the strategy waits for {least} nodes, and the directory has {sites} sites")

    def summary(self) -> None:
        self._inner.summary()
        log.info("secure sums over %s; per-site evaluation is not asked for", ", ".join(self._coordinator.keys))

    def start(
        self,
        grid: Any,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Any:
        """As the strategy's own. How long is waited for whom, [serve] of the job file says.

        Raises: ConfigError for arrays that are not float32; TooFewSurvivorsError where more rounds in a row come to
            nothing than participation.patience says, or too few sites come.
        """
        shapes = shapes_of(initial_arrays)
        self._grid = FlowerGrid(grid, self._coordinator.names)
        self._rounds = self._coordinator.rounds(
            self._grid, shapes, rounds=num_rounds, strategy=type(self._inner).__name__
        )
        self._failed, self._completed, self._now = 0, 0, flat_of(initial_arrays)
        log.info("offer %s: each site approves it, by `choral site review`", self._rounds.offer.digest[:16])
        try:
            return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        finally:
            self._rounds.end(self._completed, self._now)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> list[Message]:
        """The whole of a round: Flower is left nothing to send."""
        if self._rounds is None or self._grid is None:
            raise ConfigError("Secure was not started", hint="strategy.start(grid, arrays, ...)")
        del grid  # which `start` was given, too
        asked = _AllNodes(len(self._coordinator.names))
        shown = list(self._inner.configure_train(server_round, arrays, config, asked))
        others = {key: record for key, record in shown[0].content.items() if key != self._inner.arrayrecord_key}
        self._shapes = shapes_of(arrays)
        model = Model(
            self._inner.arrayrecord_key,
            self._inner.weighted_by_key,
            [(name, list(shape)) for name, shape in self._shapes.items()],
        )
        self._grid.more = {MODEL: ConfigRecord(write_model(model)), **others}
        weights, self._mean, self._after = flat_of(arrays), None, None
        self._rounds.gather()
        try:
            self._mean = self._rounds.mean(server_round, weights)
            self._after = moved(weights, self._mean)
        except DisputedSharesError:  # one side lies: the next round would not be another one
            raise
        except TooFewSurvivorsError as error:
            self._failed += 1
            log.warning("round %d came to nothing: %s", server_round, error)
            if self._failed > self._coordinator.patience:
                raise
            return []
        self._failed = 0
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy inside makes of the mean, as float32; nothing where the round came to nothing."""
        del replies  # there are none
        if self._mean is None or self._after is None:
            return None, None
        arrays, metrics = self._inner.aggregate_train(server_round, [self._one(self._mean, self._after)])
        if arrays is None:
            return None, metrics
        arrays = _float32(arrays)  # FedAdam computes in float64
        self._completed, self._now = server_round, flat_of(arrays)
        return arrays, metrics

    def configure_evaluate(
        self,
        server_round: int,  # noqa: ARG002
        arrays: ArrayRecord,  # noqa: ARG002
        config: ConfigRecord,  # noqa: ARG002
        grid: Any,  # noqa: ARG002
    ) -> list[Message]:
        """None: what sites say of a model would pass in the clear."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing was asked for."""

    def _one(self, mean: ExchangeMean, after: torch.Tensor) -> Message:
        """All sites as one: the mean of their weights, and what they count for together."""
        flat, at, arrays = after.numpy(), 0, {}
        for name, shape in self._shapes.items():
            size = int(np.prod(shape, dtype=np.int64))
            arrays[name] = Array(flat[at : at + size].reshape(shape))
            at += size
        content = RecordDict(
            {
                self._inner.arrayrecord_key: ArrayRecord(arrays),
                "metrics": MetricRecord({self._inner.weighted_by_key: float(mean.weight)}),
            }
        )
        return Message(content, dst_node_id=1, message_type="train")


class _AllNodes:
    """In the place of Flower's grid, for the strategy inside: it selects all sites, and sends nothing by itself."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get_node_ids(self) -> list[int]:
        return list(range(1, self._count + 1))


def check_averages(inner: Any) -> None:
    """Raises: ConfigError unless the strategy uses the mean of all sites alone."""
    from flwr.serverapp import strategy as flower

    hint = f"inside may be: {', '.join(AVERAGING)}"
    if not isinstance(inner, FedAvg):
        raise ConfigError(f"{_named(inner)} is no strategy that averages", hint=hint)
    own = type(inner).aggregate_train
    if own not in [getattr(flower, name).aggregate_train for name in AVERAGING]:
        raise ConfigError(
            f"{_named(inner)} looks at single replies, which nobody sees in a secure sum", hint=f"{hint}; {_ROBUST}"
        )
    if inner.fraction_train != 1.0:
        raise ConfigError(
            f"{_named(inner)} asks {inner.fraction_train:g} of the nodes: all sites are asked in every round",
            hint="leave out fraction_train; a round goes on without those who are away",
        )


_ROBUST = "what a robust strategy needs, single updates, is what the sum hides"


def _named(given: Any) -> str:
    return given.__name__ if isinstance(given, type) else type(given).__name__


def _float32(arrays: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({name: Array(each.numpy().astype(np.float32)) for name, each in arrays.items()})


def shapes_of(arrays: ArrayRecord) -> dict[str, tuple[int, ...]]:
    """Raises: ConfigError for an array that cannot be averaged."""
    for name, each in arrays.items():
        if each.dtype != "float32":
            raise ConfigError(
                f"the array {name!a:.80} is {each.dtype}, expected float32",
                hint="counters and running statistics (BatchNorm) cannot be averaged in a secure sum: use GroupNorm",
            )
    return {name: tuple(each.shape) for name, each in arrays.items()}


def flat_of(arrays: ArrayRecord) -> torch.Tensor:
    """float32, one array after the other."""
    parts = [np.asarray(each.numpy(), np.float32).reshape(-1) for each in arrays.values()]
    return torch.from_numpy(np.concatenate(parts))
