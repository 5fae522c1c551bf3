"""The command ``choral export``: the model of a run folder as one file for inference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from choral.cli.arguments import parse
from choral.errors import ConfigError
from choral.jobs.run_task import task_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write the model of a finished run as a torch.export program (.pt2) or as ONNX, checked for equal outputs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The run folder."""
    out: Path
    """The file: NAME.pt2 or NAME.onnx (needs the extra choral[onnx])."""
    task: Path | None = None
    """Python file with load(split, training, seed), if the run was of such a task: never taken from the run folder."""
    data_dir: Path | None = None
    """Folder of the data sets, for an embedded task that needs one."""
    json: bool = False
    """Print what was written and how it was checked as JSON, and nothing else."""
    quiet: bool = False
    """Print nothing but errors."""


def export(words: list[str]) -> int:
    wanted = parse("export", words, ExportFlags)
    from choral.trainers import Run
    from choral.trainers.run_folder.export import export as write
    from choral.trainers.task.task import checked_build

    run = Run.load(wanted.run)
    task = task_of(
        run, wanted.run, task=wanted.task, data_dir=wanted.data_dir,
        in_python="run.export(model, example_inputs, path)",
    )  # fmt: skip
    model, _, loader = checked_build(task.build, next(iter(task.parties.values())))
    done = write(model, run.state, _inputs_of(next(iter(loader))), wanted.out)
    if wanted.json:
        print(
            json.dumps(
                {
                    "file": str(done.path),
                    "round": run.history[-1].round,
                    "max_difference": done.max_difference,
                    "batches": done.batches,
                },
                indent=1,
            )
        )
    elif not wanted.quiet:
        sizes = ", ".join(map(str, done.batches))
        print(f"{done.path}: round {run.history[-1].round}; largest difference {done.max_difference:.2g}")
        print(f"checked against the model for batches of {sizes} records")
    return 0


def _inputs_of(batch: Any) -> tuple[torch.Tensor, ...]:
    """All but the last of a batch (inputs..., target). Raises: ConfigError for a batch of another kind."""
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return tuple(batch[:-1])
    raise ConfigError(
        f"the loader gives batches of type {type(batch).__name__}; expected (inputs..., target)",
        hint="in Python: run.export(model, example_inputs, path)",
    )
