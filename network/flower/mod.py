"""The ClientApp's end: hands the coordinator's requests to the site's process, and what was trained for them.

    app = ClientApp(mods=[secure_sum_mod])

It is imported anew for each message: the standard library, and what Flower has loaded anyway. It never raises, for
what an exception says would reach the coordinator; and it sends nothing in the clear: no arrays, no metrics, no counts.
So the coordinator learns the sum of what ClientApps send. It protects nobody from the author of the ClientApp, who
ships the call of the mod with it, and may leave it out; what no coordinator may choose stands in the site's process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from choral.network.door.client import FAILED, LOST, OK, relay
from choral.network.door.trained import Trained, handed, wanted

log = logging.getLogger("choral.network")

RECORD, BYTES = "choral", "bytes"
"""Where a request or a reply lies in a message: an ArrayRecord, and in it bytes as an Array, sent in pieces."""
MODEL = "choral-model"
"""A ConfigRecord, where a vector is asked for: how the ClientApp expects the model, and what the weights are called."""
SOCKET = "choral-socket"
"""In --node-config of the SuperNode: the socket of the site's process. In a simulation, in the run's configuration,
with {partition-id} in it.
"""
PARTITION = "partition-id"

CallNext = Callable[[Any, Any], Any]


class Model(NamedTuple):
    """arrays: the key of the ArrayRecord. weight: that of the number of examples in the metrics. shapes: by name."""

    arrays: str
    weight: str
    shapes: list[tuple[str, list[int]]]


def secure_sum_mod(message: Any, context: Any, call_next: CallNext) -> Any:
    """A Flower mod. Raises: nothing."""
    from flwr.app import Error, Message

    try:
        if RECORD not in message.content:
            refused = "this ClientApp takes part in secure sums alone: it answers nothing in the clear"
            return Message(Error(_PRECONDITION, refused), reply_to=message)
        answer = _answer(message, context, call_next)
    except Exception as error:
        log.error("a message from Flower failed: %s", type(error).__name__)
        log.debug("its traceback", exc_info=True)
        answer = bytes([FAILED])
    return Message(packed(answer), reply_to=message)


def packed(raw: bytes, more: Any = None) -> Any:
    """A RecordDict with these bytes. more: a dict of other records."""
    from flwr.app import Array, ArrayRecord, RecordDict

    held = Array(dtype="uint8", shape=(len(raw),), stype="choral", data=bytes(raw))
    return RecordDict({RECORD: ArrayRecord({BYTES: held}), **(more or {})})


def bytes_in(content: Any) -> bytes:
    """What `packed` put there. Raises: KeyError, TypeError, AttributeError for other content."""
    raw = content[RECORD][BYTES].data
    if not isinstance(raw, bytes):
        raise TypeError("expected bytes")
    return raw


_PRECONDITION = 6  # flwr.common.constant.ErrorCode.MOD_FAILED_PRECONDITION


def _answer(message: Any, context: Any, call_next: CallNext) -> bytes:
    request = bytes_in(message.content)
    if not request:  # who is it? asked where Flower has no names: in a simulation
        return bytes([OK]) + str(context.node_config.get(PARTITION, "")).encode()
    path = _socket(context)
    if not path:
        log.error("no %s in the node's configuration: the socket of `choral join --local`", SOCKET)
        return bytes([LOST])
    answer = relay(path, request)
    weights = wanted(answer)
    if weights is None:
        return answer
    return relay(path, handed(request, _trained(message, context, call_next, weights)))


def _socket(context: Any) -> str:
    own = context.node_config.get(SOCKET)
    if own:
        return str(own)
    part = context.node_config.get(PARTITION)
    return str(context.run_config.get(SOCKET, "")).replace("{" + PARTITION + "}", str(part)) if part is not None else ""


def _trained(message: Any, context: Any, call_next: CallNext, weights: bytes) -> Trained:
    """What the ClientApp makes of the weights that the site's process checked.

    Raises: ValueError for a reply of another form; what the ClientApp does.
    """
    from flwr.app import RecordDict

    model = read_model(message.content[MODEL])
    others = {key: record for key, record in message.content.items() if key not in (RECORD, MODEL)}
    message.content = RecordDict({model.arrays: _arrays(model, weights), **others})
    reply = call_next(message, context)
    if reply.has_error():
        raise ValueError("the ClientApp answered with an error")
    (arrays,), (metrics,) = reply.content.array_records.values(), reply.content.metric_records.values()
    if list(arrays) != [name for name, _ in model.shapes]:
        raise ValueError("the ClientApp answered with other arrays than it was given")
    examples = metrics[model.weight]
    if isinstance(examples, list) or examples != int(examples) or examples < 1:
        raise ValueError("the ClientApp answered with no number of examples")
    return Trained(int(examples), b"".join(_raw(arrays[name], shape) for name, shape in model.shapes))


def _arrays(model: Model, weights: bytes) -> Any:
    import numpy as np
    from flwr.app import Array, ArrayRecord

    flat, at, found = np.frombuffer(weights, "<f4"), 0, {}
    for name, shape in model.shapes:
        size = int(np.prod(shape, dtype=np.int64))
        found[name] = Array(flat[at : at + size].reshape(shape).astype(np.float32))
        at += size
    if at != len(flat):
        raise ValueError("the weights are not those of the model")
    return ArrayRecord(found)


def _raw(given: Any, shape: list[int]) -> bytes:
    if given.dtype != "float32" or list(given.shape) != shape:
        raise ValueError("the ClientApp answered with an array of another type or shape")
    return bytes(given.numpy().astype("<f4").tobytes())


def write_model(model: Model) -> dict[str, str]:
    """The values of a ConfigRecord."""
    return {"arrays": model.arrays, "weight": model.weight, "shapes": json.dumps(model.shapes)}


def read_model(record: Any) -> Model:
    shapes = [(str(name), [int(size) for size in shape]) for name, shape in json.loads(record["shapes"])]
    return Model(str(record["arrays"]), str(record["weight"]), shapes)
