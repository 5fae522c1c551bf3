"""Nothing of one batch reaches the loss of another: memory banks, moving averages, second methods, kept graphs."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from choral.privacy import UnsupportedModelError
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.noise.gaussian import os_stream
from choral.privacy.per_sample.model import with_per_sample_gradients

ROWS, WIDTH, CLASSES = 12, 6, 3


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def mean_loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def train(model: nn.Module, steps: int = 6, loss: Loss = mean_loss, *, retain: bool = False) -> Any:
    private = with_per_sample_gradients(model)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        private,
        noise_multiplier=1e-6,
        max_grad_norm=1.0,
        expected_batch_size=ROWS,
        source=os_stream,
    )
    for step in range(steps):
        x, y = batch(step)
        optimizer.expect(len(x))
        optimizer.zero_grad()
        loss(private, x, y).backward(retain_graph=retain)
        optimizer.step()
    return private


class Net(nn.Module):
    """A body, a head, and whatever `kept` is."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.kept, self.calls = kept, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.use(torch.tanh(self.body(x))))

    def use(self, h: torch.Tensor) -> torch.Tensor:
        return h


class Bank(Net):
    def use(self, h: torch.Tensor) -> torch.Tensor:
        out = h if self.kept is None else h + torch.softmax(h @ self.kept.T, -1) @ self.kept
        self.kept = h.detach()
        return out


class Queue(Net):
    """Used from the third batch on only."""

    def use(self, h: torch.Tensor) -> torch.Tensor:
        out = h + torch.cat(list(self.kept)).mean(0) if len(self.kept) > 2 else h
        self.kept.append(h.detach())
        return out


class Centres(Net):
    """A moving average of the batches' means, in place."""

    def use(self, h: torch.Tensor) -> torch.Tensor:
        self.kept.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.kept


class Holder:
    def __init__(self) -> None:
        self.rows = torch.zeros(4, WIDTH)


class InAnObject(Net):
    def use(self, h: torch.Tensor) -> torch.Tensor:
        self.kept.rows = h.detach()[:4]
        return h


class Scale(Net):
    """A number: the size of the batches so far."""

    def use(self, h: torch.Tensor) -> torch.Tensor:
        self.kept = 0.5 * self.kept + 0.5 * float(h.detach().abs().mean())
        return h / self.kept


class Later(Net):
    """Nothing is kept in the first three batches."""

    def use(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 3:
            self.kept["rows"] = h.detach()
        return h


KEEPING: dict[str, Callable[[], nn.Module]] = {
    "memory bank": Bank,
    "queue in a list": lambda: Queue([]),
    "queue in a deque": lambda: Queue(collections.deque(maxlen=8)),
    "class centres": lambda: Centres(torch.zeros(WIDTH)),
    "in an object of its own": lambda: InAnObject(Holder()),
    "a number that follows the batches": lambda: Scale(1.0),
    "from the fourth batch on": lambda: Later({}),
}


@pytest.mark.parametrize("name", KEEPING)
def test_models_that_keep_something_of_the_records_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"holds something of the records|something else the second time"):
        train(KEEPING[name]())


class Counting(Net):
    """Counts its calls, and keeps a table of positions that does not depend on the data."""

    def use(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.kept is None or self.calls == 4:
            self.kept = torch.linspace(0, 1, h.shape[1])
        return h * (1 + self.kept) * (1 + 0.1 * min(self.calls, 3))


def test_counters_and_tables_may_be_kept() -> None:
    model = Counting()
    train(model)
    assert model.calls == 6  # the checks' passes are not counted
    assert model.kept.shape == (WIDTH,)


class TwoMethods(Net):
    def aside(self, x: torch.Tensor) -> torch.Tensor:
        """Mixes: pairs every record with all others."""
        h = self.body(x)
        return (h @ h.T).softmax(-1).diagonal()

    def projected(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def with_a_second_method(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return mean_loss(m, x, y) + m.aside(x).mean()


def with_a_layer_by_itself(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return mean_loss(m, x, y) + (m.body(x) - m.body(x).mean(0)).square().mean()


def with_a_layer_record_by_record(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return mean_loss(m, x, y) + m.body(x).square().mean()


@pytest.mark.parametrize("loss", [with_a_second_method, with_a_layer_by_itself])
@pytest.mark.parametrize("clean", [0, 3])
def test_records_joined_beside_the_models_call_are_refused(loss: Loss, clean: int) -> None:
    """From the first batch on, or after some clean ones."""
    model = TwoMethods()
    if clean:
        train(model, clean)
    with pytest.raises(UnsupportedModelError, match="one record changes the gradients of others"):
        train(model, 1, loss)


@pytest.mark.parametrize("loss", [with_a_layer_record_by_record])
@pytest.mark.parametrize("clean", [0, 3])
def test_layers_used_beside_the_models_call_are_refused(loss: Loss, clean: int) -> None:
    """From the first batch on, or after some clean ones."""
    model = TwoMethods()
    if clean:
        train(model, clean)
    with pytest.raises(UnsupportedModelError, match=r"uses layer body outside model\(\.\.\.\)") as caught:
        train(model, 1, loss)
    assert "check_step" in caught.value.hint


def test_what_is_looked_at_with_the_whole_step_may_use_layers_by_themselves() -> None:
    def honest(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: Loss = lambda m, x, y: mean_loss(m, x, y) + m.projected(x).square().mean()  # noqa: E731
        m.check_step(lambda b: loss(m, *b), (x, y))
        return loss(m, x, y)

    def mixing(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        m.check_step(lambda b: with_a_second_method(m, *b), (x, y))
        return with_a_second_method(m, x, y)

    train(TwoMethods(), 3, honest)
    with pytest.raises(UnsupportedModelError, match="not the mean over its records"):
        train(TwoMethods(), 1, mixing)


def test_a_graph_of_an_earlier_batch_is_refused() -> None:
    kept: list[torch.Tensor] = []

    def loss(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = m(x)
        kept.append(out)
        return F.cross_entropy(out, y) + sum(o.square().mean() for o in kept[:-1])

    with pytest.raises(UnsupportedModelError, match="made of an earlier batch"):
        train(nn.Linear(WIDTH, CLASSES), 2, loss, retain=True)
    kept.clear()
    with pytest.raises(UnsupportedModelError, match="made of an earlier batch"):
        train(nn.Sequential(nn.PReLU(WIDTH), nn.Linear(WIDTH, CLASSES)), 2, loss, retain=True)
