"""plain_loop.py with differential privacy and without sampling: fixed batches, correlated noise; three lines more."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.privacy import CorrelatedPrivacy  # (+)

EPOCHS = 20


def main() -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()
    order = torch.randperm(len(labels))
    train, test = order[:1437], order[1437:]

    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)
    privacy = CorrelatedPrivacy(epsilon=3.0, delta=1e-5, max_grad_norm=1.0, epochs=EPOCHS)  # (+)
    model, optimizer, loader = privacy.wrap(model, optimizer, loader)  # (+)

    for epoch in range(EPOCHS):
        model.train()
        for batch, target in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
        if (epoch + 1) % 5 == 0:
            model.eval()
            with torch.no_grad():
                accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean()
            print(f"epoch {epoch + 1:2d}: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
