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
from choral.trainers.centralized.centralize import centralize
from choral.trainers.centralized.tuning import Tuned, tune
from choral.trainers.data.partition import dirichlet_split
from choral.trainers.federated.federate import federate
from choral.trainers.federated.participation import ONCE_A_DAY, Availability, Clock, Device, Dropouts, Participation
from choral.trainers.federated.virtual_parties import VirtualParties
from choral.trainers.local_steps.epochs import Epochs
from choral.trainers.run_folder.run import Round, Run, RunFolderError, RunInfo, value_bound_for
from choral.trainers.task.initial_weights import StartError
from choral.trainers.task.learning_rate import Schedule
from choral.trainers.task.lora import lora, merged
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import DivergedError, Task, TaskError

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
