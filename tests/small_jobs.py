"""The smallest jobs of the tests, as text: a settings file, and a program that trains in a process of its own."""

from __future__ import annotations

SETTINGS = """
device = "cpu"
[split]
parties = 3
alpha = 2.0
[training]
rounds = 1
hidden = 0
"""

PROGRAM = """
import torch
from torch.utils.data import DataLoader, TensorDataset
import choral

data = TensorDataset(torch.randn(60, 4), torch.arange(60) % 2)

def build(records):
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(records, 20)

def fit(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

privacy = choral.Privacy(3.0, 1e-5)
fit(*privacy.wrap(*build(data)))
assert privacy.spent().steps == 3
task = choral.Task(build=build, fit=fit, evaluate=lambda model: 0.5)
job = {"task": task, "parties": dict.fromkeys("abc", data), "rounds": 1}
"""
"""It wraps a training, and defines a job for `choral.federate(**job)`."""
