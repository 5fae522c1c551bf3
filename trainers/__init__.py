"""Who computes what: local steps, federated algorithms, the cloud baseline, engines."""

from __future__ import annotations

from choral.trainers.algorithms import (
    DANE,
    FSVRG,
    GD,
    Algorithm,
    CoCoA,
    FedAdam,
    FedAvg,
    FedNova,
    FedProx,
    FedYogi,
    Scaffold,
)
from choral.trainers.centralize import centralize
from choral.trainers.epochs import Epochs
from choral.trainers.federate import federate
from choral.trainers.lora import lora, merged
from choral.trainers.participation import ONCE_A_DAY, Availability, Clock, Device, Dropouts, Participation
from choral.trainers.partition import dirichlet_split
from choral.trainers.run import Round, Run, RunFolderError, RunInfo, value_bound_for
from choral.trainers.schedule import Schedule
from choral.trainers.settings import Split, Training
from choral.trainers.start import StartError
from choral.trainers.task import DivergedError, Task, TaskError
from choral.trainers.tune import Tuned, tune
from choral.trainers.virtual import VirtualParties

__all__ = [
    "DANE",
    "FSVRG",
    "GD",
    "ONCE_A_DAY",
    "Algorithm",
    "Availability",
    "Clock",
    "CoCoA",
    "Device",
    "DivergedError",
    "Dropouts",
    "Epochs",
    "FedAdam",
    "FedAvg",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Participation",
    "Round",
    "Run",
    "RunFolderError",
    "RunInfo",
    "Scaffold",
    "Schedule",
    "Split",
    "StartError",
    "Task",
    "TaskError",
    "Training",
    "Tuned",
    "VirtualParties",
    "centralize",
    "dirichlet_split",
    "federate",
    "lora",
    "merged",
    "tune",
    "value_bound_for",
]
