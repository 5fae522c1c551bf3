"""Training code that each hospital installs in its folder tasks/, and that the coordinator has, too.

A linear model tells malignant from benign tumours by 30 measurements. A hospital's file has one visit a line: the
diagnosis, 0 or 1, then the measurements. The model is made from this file alone, so that all have the same.
"""

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Task

SIZES = {"north": 250, "south": 120, "east": 80}  # visits; the 119 others are published, and held out
# Rounded typical value and spread of each measurement, as the literature has them: what was taken from the patients'
# own records would be a release of its own.
TYPICAL = [14, 19, 92, 650, 0.1, 0.1, 0.1, 0.05, 0.2, 0.06]  # radius, texture, perimeter, area, smoothness, ...
TYPICAL += [0.4, 1.2, 3, 40, 0.007, 0.025, 0.03, 0.01, 0.02, 0.004]  # their errors
TYPICAL += [16, 26, 110, 900, 0.13, 0.25, 0.27, 0.1, 0.3, 0.08]  # their worst values
SPREAD = [4, 4, 24, 350, 0.015, 0.05, 0.08, 0.04, 0.03, 0.007]
SPREAD += [0.3, 0.5, 2, 45, 0.003, 0.02, 0.03, 0.006, 0.008, 0.003]
SPREAD += [5, 6, 34, 570, 0.02, 0.15, 0.2, 0.07, 0.06, 0.02]


def tables():
    """What stands in for reality: a table for each hospital, and the published one under the name "test"."""
    measured, diagnosis = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(1).permutation(len(diagnosis))
    whole = np.column_stack([diagnosis, measured])[order]
    parts = np.split(whole, np.cumsum(list(SIZES.values())))
    return dict(zip([*SIZES, "test"], parts, strict=True))


def dataset(table):
    table = torch.from_numpy(np.asarray(table, dtype=np.float64))
    measured = (table[:, 1:] - torch.tensor(TYPICAL)) / torch.tensor(SPREAD)
    return TensorDataset(measured.float(), table[:, 0].long())


def task(training):
    def build(records):
        model = nn.Linear(30, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate)
        return model, optimizer, DataLoader(records, batch_size=training.batch_size, shuffle=True)

    def fit(model, optimizer, loader):
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    def evaluate(model):  # by the coordinator, on what is published
        measured, labels = dataset(tables()["test"]).tensors
        return (model(measured).argmax(dim=1) == labels).float().mean().item()

    return Task(build=build, fit=fit, evaluate=evaluate)


def site(data, training, seed):
    """At a hospital: data is the path in its site.toml."""
    return task(training), dataset(np.loadtxt(data, delimiter=",", skiprows=1))


def coordinator(training, seed):
    """At the coordinator: an example of the same form, with no visit in it."""
    return task(training), TensorDataset(torch.zeros(2, 30), torch.tensor([0, 1]))
