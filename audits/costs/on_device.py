"""What a device is asked for: the exported model at inference, one local epoch, and the full data, on one core.

Meant for a process of its own, so that the memory is that of this alone: :func:`capped` binds it to one core and one
thread, as a small device has it. Times are processor time, medians of the repeats, which a busy machine changes little.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from choral.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from choral.trainers.task.task import Task

BATCH, CALLS = 64, 20


class ExportedTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the model. size: in bytes. single: seconds of one example alone. batch: of each of 64 together."""

    kind: str
    size: int
    single: float
    batch: float


class OneCore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One core's figures. examples, data_bytes, epoch_seconds: of the median party, and of all parties together.

    epoch_seconds: of one call of the task's own fit. peak_mib: of the process at its end, 0 where the system does not
    say; imports_mib: what of it the imports had taken.
    """

    parameters: int
    exported: tuple[ExportedTimes, ...]
    examples: tuple[int, int]
    data_bytes: tuple[int, int]
    epoch_seconds: tuple[float, float]
    peak_mib: float
    imports_mib: float


def capped() -> None:
    """Bind this process to one of its cores, where the system can, and torch to one thread."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def measure(task: Task, kinds: Sequence[str] = (".pt2",), repeats: int = 3) -> OneCore:
    """The figures of a task. kinds: files to export, ``.pt2`` or ``.onnx``.

    Raises: ConfigError for batches that do not begin with the inputs' tensor; what training and export raise.
    """
    import torch

    from choral.trainers.task.task import raw_bytes

    imported = _peak_mib()
    ordered: Any = sorted(task.parties.values(), key=len)
    party = ordered[len(ordered) // 2]
    pooled: Any = torch.utils.data.ConcatDataset(ordered)
    epochs = []
    for dataset in (party, pooled):
        model, optimizer, loader = task.build(dataset)
        epochs.append(_seconds(partial(task.fit, model, optimizer, loader), repeats))
    model, _, loader = task.build(party)
    model.eval()
    batch = next(iter(loader))
    if not isinstance(batch, (tuple, list)) or not isinstance(batch[0], torch.Tensor):
        raise ConfigError(
            "report.on_device knows models of one tensor, which comes first in a batch",
            hint="leave report.on_device out, and use `choral export` with your own inputs",
        )
    return OneCore(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        exported=tuple(_exported(model, batch[0][:1], kind, repeats) for kind in kinds),
        examples=(len(party), len(pooled)),
        data_bytes=(raw_bytes(party), sum(map(raw_bytes, ordered))),
        epoch_seconds=(epochs[0], epochs[1]),
        peak_mib=_peak_mib(),
        imports_mib=imported,
    )


def _exported(model: torch.nn.Module, one: torch.Tensor, kind: str, repeats: int) -> ExportedTimes:
    import torch

    from choral.trainers.run_folder.export import export

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{kind}"
        export(model, model.state_dict(), (one,), file)
        infer = _by_onnxruntime(file) if kind == ".onnx" else torch.export.load(file).module()
        many = one.repeat(BATCH, *(1,) * (one.ndim - 1))
        alone, together = (_seconds(partial(_often, infer, given), repeats) / CALLS for given in (one, many))
        return ExportedTimes(kind=kind, size=file.stat().st_size, single=alone, batch=together / BATCH)


def _by_onnxruntime(file: Path) -> Callable[[torch.Tensor], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda given: session.run(None, {name: given.numpy()})


def _often(infer: Callable[[torch.Tensor], object], given: torch.Tensor) -> None:
    for _ in range(CALLS):
        infer(given)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call, after one that does not count."""
    call()
    goes = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        goes.append(time.process_time() - started)
    return statistics.median(goes)


def _peak_mib() -> float:
    """This program's own. What ru_maxrss says begins with that of the process that started it."""
    with contextlib.suppress(OSError):  # Linux alone
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    with contextlib.suppress(ImportError):  # no such module on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return 0.0
