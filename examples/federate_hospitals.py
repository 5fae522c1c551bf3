"""Several parties, one model: the three functions of an ordinary training, federated and compared with pooling.

Scikit-learn's breast-cancer records stand in for three hospitals of different sizes. Each keeps its records, trains
with differential privacy, and the server sees only masked sums.

    python examples/federate_hospitals.py
"""

import sys

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Keep, Masked, Privacy, Task, audit, centralize, compare, federate

table, diagnosis = load_breast_cancer(return_X_y=True)
# Rounded typical value and spread of each measurement: constants, written down here and so public. Means and deviations
# taken from the patients' records would be a release of their own.
TYPICAL = [14, 19, 92, 650, 0.1, 0.1, 0.1, 0.05, 0.2, 0.06]  # radius, texture, perimeter, area, smoothness, ...
TYPICAL += [0.4, 1.2, 3, 40, 0.007, 0.025, 0.03, 0.01, 0.02, 0.004]  # their errors
TYPICAL += [16, 26, 110, 900, 0.13, 0.25, 0.27, 0.1, 0.3, 0.08]  # their worst values
SPREAD = [4, 4, 24, 350, 0.015, 0.05, 0.08, 0.04, 0.03, 0.007]
SPREAD += [0.3, 0.5, 2, 45, 0.003, 0.02, 0.03, 0.006, 0.008, 0.003]
SPREAD += [5, 6, 34, 570, 0.02, 0.15, 0.2, 0.07, 0.06, 0.02]
records = ((torch.from_numpy(table) - torch.tensor(TYPICAL)) / torch.tensor(SPREAD)).float()
labels = torch.from_numpy(diagnosis).long()
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
test, north, south, east = order.split([119, 250, 120, 80])
SIZES = {"north": north, "south": south, "east": east}


def build(dataset):
    model = nn.Linear(30, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    return model, optimizer, DataLoader(dataset, batch_size=20, shuffle=True)


def fit(model, optimizer, loader):
    for batch, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()


def evaluate(model):
    return (model(records[test]).argmax(dim=1) == labels[test]).float().mean().item()


def main(out: str) -> None:
    job = {
        "task": Task(build=build, fit=fit, evaluate=evaluate),
        "rounds": 10,
        "parties": {name: TensorDataset(records[share], labels[share]) for name, share in SIZES.items()},
    }
    privacy = Privacy(epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    run = federate(**job, privacy=privacy, secure_sum=Masked(min_survivors=2), keep=Keep(out=f"{out}/federated"))
    print(f"accuracy {run.metrics['accuracy']:.3f}, worst hospital's {run.spent}")
    audit(run).save(f"{out}/audit.html")
    compare({"cloud": centralize(**job), "federated": run}).save(f"{out}/compare.html")
    print(f"reports: {out}/audit.html, {out}/compare.html")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/hospitals")
