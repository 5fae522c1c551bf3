"""Flower's SecAgg+ in one process, for benchmarks/secure_sum.py: its own workflow and client modifier, nothing of ours.

Written against flwr 1.41; another version may have moved its parts, and then there is no comparison.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CLIPPING_RANGE = 8.0  # Flower's default; its values are floats, quantised to 22 bits


def flower_sum(
    vectors: Sequence[Callable[[], Any]], gone: set[int], *, neighbours: int, threshold: int, bound: int
) -> dict[str, Any] | None:
    """One round over ``vectors`` (made when asked for); None when flwr is not there."""
    try:
        from flwr.app import ConfigRecord, Context, Message, RecordDict
        from flwr.client.mod import secaggplus_mod
        from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
        from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Stage
        from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
        from flwr.compat.common import recorddict_compat as compat
        from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
        from flwr.server.compat.grid_client_proxy import GridClientProxy
        from flwr.server.strategy import FedAvg
        from flwr.server.workflow import SecAggPlusWorkflow
        from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError as error:
        print(f"no comparison with Flower: {error}", file=sys.stderr)
        return None
    logging.getLogger("flwr").setLevel(logging.ERROR)
    n, scale = len(vectors), CLIPPING_RANGE / bound
    traffic = {"up": 0, "down": 0, "carrying": 0.0}
    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, n + 1)}

    def train(message: Any, context: Any) -> Any:
        update = ndarrays_to_parameters([vectors[context.node_id - 1]() * scale])
        reply = FitRes(Status(Code.OK, ""), update, num_examples=1000, metrics={})
        return Message(compat.fitres_to_recorddict(reply, False), reply_to=message)

    def carry(way: str, content: Any) -> Any:
        """Over the wire and back: not timed, to Flower's advantage."""
        started = time.process_time()
        proto = recorddict_to_proto(content)
        traffic[way] += proto.ByteSize()
        carried = recorddict_from_proto(proto)
        traffic["carrying"] += time.process_time() - started
        return carried

    class Grid:
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
            del timeout
            replies = []
            for message in messages:
                node = message.metadata.dst_node_id
                received = Message(carry("down", message.content), metadata=message.metadata)
                stage = received.content.config_records[RECORD_KEY_CONFIGS]["stage"]
                if node - 1 in gone and stage in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK):
                    continue
                reply = secaggplus_mod(received, contexts[node], train)
                replies.append(Message(carry("up", reply.content), metadata=reply.metadata))
            return replies

    grid: Any = Grid()
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    manager = SimpleClientManager()
    for node in contexts:
        manager.register(GridClientProxy(node, grid, 1))
    strategy = FedAvg(fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=n, min_available_clients=n)
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), ServerConfig(1), strategy, manager)
    start = ndarrays_to_parameters([np.zeros(1)])
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, True)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    workflow = SecAggPlusWorkflow(neighbours + 1, min(threshold, neighbours), max_weight=1000.0)
    started, cpu = time.perf_counter(), time.process_time()
    workflow(grid, context)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    mean = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
    got = np.load(io.BytesIO(mean.tensors[0]))
    alive = [make() for place, make in enumerate(vectors) if place not in gone]
    largest = np.abs(got - sum(alive) * scale / len(alive)).max() if got.size > 1 else float("nan")
    return {
        "who": "flower",
        "parties": n,
        "survivors": len(alive),
        "neighbours": neighbours,
        "threshold": min(threshold, neighbours),
        "seconds": seconds - traffic["carrying"],
        "cpu": cpu - traffic["carrying"],
        "bytes_up_per_party": traffic["up"] / n,
        "bytes_down_per_party": traffic["down"] / n,
        "largest_error_of_the_mean": float(largest),
    }
