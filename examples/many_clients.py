"""Two hundred clients that trust nobody with their update: where the noise is added decides what is left of accuracy.

Each client holds some thirty records. Its whole contribution is protected (client-level differential privacy), by noise
that is added in one of three places, at the same epsilon:

- distributed: each client adds a two-hundredth, inside the masked secure sum; the server sees the noisy sum alone;
- central: the server adds all of it, and here sees each client's update without any;
- local: each client adds all of it, since nothing hides its message.

    python examples/many_clients.py
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import AdaptiveClip, ClientPrivacy, Keep, Masked, Participation, Plain, Task, audit, federate
from choral.trainers import Dropouts

torch.set_num_threads(1)  # of models as small as these, threads only wait for each other
CLIENTS, RECORDS, FEATURES, CLASSES = 200, 30, 20, 5
generator = torch.Generator().manual_seed(5)
centres = 0.4 * torch.randn(CLASSES, FEATURES, generator=generator)


def draw(count):
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, FEATURES, generator=generator), labels)


parties = {f"client-{number:03d}": draw(RECORDS) for number in range(CLIENTS)}
test = draw(2000)


def build(dataset):
    model = nn.Linear(FEATURES, CLASSES)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model, torch.optim.SGD(model.parameters(), lr=0.3), DataLoader(dataset, batch_size=10, shuffle=True)


def fit(model, optimizer, loader):
    for batch, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()


def evaluate(model):
    points, labels = test.tensors
    return (model(points).argmax(dim=1) == labels).float().mean().item()


def main(out: str) -> None:
    task = Task(build=build, fit=fit, evaluate=evaluate, min_classes=1)
    lossy = Participation(dropouts=Dropouts(vector=0.02))
    promise = {"epsilon": 4.0, "delta": 1e-5, "clip": AdaptiveClip(start=0.5), "bits": 18}
    # Noise for 170 survivors, of whom 5 may tell the server theirs.
    masked = Masked(min_survivors=170, corrupt=5, dropouts=20, server="semi-honest")
    for noise, secure_sum in (("distributed", masked), ("central", Plain()), ("local", Plain())):
        privacy = ClientPrivacy(**promise, noise=noise, min_survivors=170, colluders=5)
        run = federate(
            task,
            parties,
            rounds=3,
            privacy=privacy,
            secure_sum=secure_sum,
            participation=lossy,
            keep=Keep(out=f"{out}/{noise}"),
        )
        last = run.history[-1]
        print(
            f"{noise:12} accuracy {run.metrics['accuracy']:.3f}, epsilon {run.spent.epsilon:.2f} for each client,"
            f" {last.survivors} of {CLIENTS} survived, {last.bytes_up:,} bytes up"
        )
    report = audit(f"{out}/distributed")
    report.save(f"{out}/audit.html")
    print(f"audit: {report.verdict}; {out}/audit.html")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/many-clients")
