"""Who computes what: local steps, federated algorithms, the cloud baseline, engines."""

from __future__ import annotations

from choral.trainers.centralize import centralize
from choral.trainers.federate import federate
from choral.trainers.partition import dirichlet_split
from choral.trainers.run import Round, Run, RunFolderError, RunInfo
from choral.trainers.settings import Split, Training
from choral.trainers.task import DivergedError, Task, TaskError

__all__ = [
    "DivergedError",
    "Round",
    "Run",
    "RunFolderError",
    "RunInfo",
    "Split",
    "Task",
    "TaskError",
    "Training",
    "centralize",
    "dirichlet_split",
    "federate",
]
