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
# Least and greatest value that each measurement can have, known without any record: what a record has beyond counts as
# these. Where measurements lie between them, the job finds out by means and deviations with noise.
BOUNDS = [(0, 30), (0, 50), (0, 200), (0, 2500), (0, 0.2)]  # radius, texture, perimeter, area, smoothness,
BOUNDS += [(0, 0.4), (0, 0.5), (0, 0.25), (0, 0.4), (0, 0.15)]  # compactness, concavity, concave points, symmetry, ...
BOUNDS += [(0, 3), (0, 5), (0, 20), (0, 300), (0, 0.03), (0, 0.15), (0, 0.3), (0, 0.06), (0, 0.08), (0, 0.03)]  # errors
BOUNDS += [(0, 40), (0, 60), (0, 250), (0, 4000), (0, 0.3)]  # the worst values
BOUNDS += [(0, 1.2), (0, 1.5), (0, 0.4), (0, 0.8), (0, 0.25)]


def tables():
    """What stands in for reality: a table for each hospital, and the published one under the name "test"."""
    measured, diagnosis = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(1).permutation(len(diagnosis))
    whole = np.column_stack([diagnosis, measured])[order]
    parts = np.split(whole, np.cumsum(list(SIZES.values())))
    return dict(zip([*SIZES, "test"], parts, strict=True))


def dataset(table):
    table = torch.from_numpy(np.asarray(table, dtype=np.float64))
    return TensorDataset(table[:, 1:].float(), table[:, 0].long())


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

    return Task(build=build, fit=fit, evaluate=evaluate, bounds=BOUNDS)


def site(data, training, seed):
    """At a hospital: data is the path in its site.toml."""
    return task(training), dataset(np.loadtxt(data, delimiter=",", skiprows=1))


def coordinator(training, seed):
    """At the coordinator: an example of the same form, with no visit in it."""
    return task(training), TensorDataset(torch.zeros(2, 30), torch.tensor([0, 1]))
