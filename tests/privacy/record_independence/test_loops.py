"""Loops as users write them: one record moves what is released by at most the clipping norm, or the loop is refused.

Measured by brute force, every record in every batch and the noise left out: the gradient that is released with all
records, less the one without one of them, in clipping norms. The weights are set to the same numbers after each step,
so that later steps can be compared, too. What is more than 1 and not refused stands in docs/privacy.md, "Sharp edges".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.errors import ChoralError
from choral.privacy import Privacy
from choral.privacy.dpsgd import private_optimizer
from choral.privacy.errors import UnsupportedModelError
from choral.privacy.noise import gaussian

N, DIM, CLASSES = 12, 6, 3
Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
ce = F.cross_entropy


def records() -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve records, the first of which is large and the only one of its class."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, DIM, generator=generator), torch.randint(0, 2, (N,), generator=generator)
    x[0], y[0] = 8 * torch.randn(DIM, generator=generator), 2
    return x, y


def network(out: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, 5), nn.Tanh(), nn.Linear(5, out))


def released(
    make: Callable[[], nn.Module], loss: Loss, x: torch.Tensor, y: torch.Tensor, backward: Callable[..., Any]
) -> list[torch.Tensor]:
    """Return the sums of clipped gradients that two steps release."""
    torch.manual_seed(0)
    plain = make()
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    privacy = Privacy(epsilon=50.0, delta=1e-5, epochs=2)
    model, optimizer, private = privacy.wrap(plain, torch.optim.SGD(plain.parameters(), lr=0.1), loader)
    found = []
    for turn in range(2):
        for a, b in private:
            optimizer.zero_grad()
            backward(loss(model, a, b))
            optimizer.step()
            gradients = [p.grad for p in plain.parameters()]
            found.append(torch.cat([g.flatten().double() for g in gradients if g is not None]) * len(x))
            generator = torch.Generator().manual_seed(turn)
            with torch.no_grad():
                for p in plain.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return found


def moved(
    monkeypatch: pytest.MonkeyPatch,
    loss: Loss,
    *,
    make: Callable[[], nn.Module] = network,
    backward: Callable[..., Any] = torch.Tensor.backward,
) -> float:
    """Return by how many clipping norms one of two records, a rare and a common one, moves what is released."""
    real = gaussian.grid_gaussian
    monkeypatch.setattr(private_optimizer, "grid_gaussian", lambda *args, **kwargs: real(*args, **kwargs) * 0)
    x, y = records()
    everybody = released(make, loss, x, y, backward)
    most = 0.0
    for one in (0, 3):
        others = torch.arange(N) != one
        without = released(make, loss, x[others], y[others], backward)
        most = max(most, *(float((a - b).norm()) for a, b in zip(everybody, without, strict=True)))
    return most


def each(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ce(m(x), y, reduction="none")


def token_means(m: Any, x: torch.Tensor) -> torch.Tensor:
    kept = (x > -0.5).float()
    return ((m(x) - x).pow(2) * kept).sum(1) / kept.sum(1).clamp(min=1)


def dice(m: Any, x: torch.Tensor) -> torch.Tensor:
    p, t = torch.sigmoid(m(x)), (x > 0).float()
    return 1 - 2 * (p * t).sum(1) / (p.sum(1) + t.sum(1) + 1)


def focal(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    b = F.binary_cross_entropy_with_logits(m(x)[:, 0], (y == 2).float(), reduction="none")
    return (1 - torch.exp(-b)) ** 2 * b


def variational(m: Any, x: torch.Tensor) -> torch.Tensor:
    out = m(x)
    return F.mse_loss(out, x, reduction="sum") / len(x) - 0.5 * torch.sum(1 + out - out.exp()) / len(x)


def several(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = m(x)
    return (ce(out[:, :CLASSES], y) + 0.5 * F.mse_loss(out[:, CLASSES:], x)) / 2


HONEST: dict[str, tuple[Loss, int]] = {
    "cross entropy": (lambda m, x, y: ce(m(x), y), CLASSES),
    "smoothed labels": (lambda m, x, y: ce(m(x), y, label_smoothing=0.1), CLASSES),
    "probabilities for labels": (lambda m, x, y: ce(m(x), 0.8 * F.one_hot(y, CLASSES) + 0.2 / CLASSES), CLASSES),
    "public class weights": (lambda m, x, y: (each(m, x, y) * torch.tensor([1.0, 1.0, 20.0])[y]).mean(), CLASSES),
    "a sum over the length": (lambda m, x, y: each(m, x, y).sum() / len(x), CLASSES),
    "a product with one over the length": (lambda m, x, y: each(m, x, y) @ torch.full((len(x),), 1 / len(x)), CLASSES),
    "losses one by one": (lambda m, x, y: torch.stack(list(each(m, x, y))).mean(), CLASSES),
    "focal": (lambda m, x, y: focal(m, x, y).mean(), 1),
    "tokens within a record": (lambda m, x, y: token_means(m, x).mean(), DIM),
    "dice of each record": (lambda m, x, y: dice(m, x).mean(), DIM),
    "divergence, batchmean": (
        lambda m, x, y: F.kl_div(m(x).log_softmax(1), F.one_hot(y, CLASSES).float(), reduction="batchmean"),
        CLASSES,
    ),
    "variational": (lambda m, x, y: variational(m, x), DIM),
    "a hinge": (lambda m, x, y: F.relu(1 - m(x)[:, 0] * (2.0 * (y == 2) - 1)).mean(), 1),
    "sorted records": (lambda m, x, y: F.relu(1 + token_means(m, x)[x[:, 0].argsort()]).mean(), DIM),
    "steps within a record": (lambda m, x, y: m(x).diff(dim=1).abs().mean() + F.l1_loss(m(x), x), DIM),
    "pairs of a record's own": (lambda m, x, y: F.relu(1 - (m(x) - m(-x)).abs().sum(1)).mean(), 4),
    "two heads": (several, CLASSES + DIM),
    "triplets of a record's own": (lambda m, x, y: F.triplet_margin_loss(m(x), m(x + 0.1), m(-x)), 4),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_loop_trains_and_a_record_moves_no_more_than_the_norm(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, out = HONEST[name]
    assert 0.1 < moved(monkeypatch, loss, make=lambda: network(out)) <= 1 + 1e-3


def centred(t: torch.Tensor) -> torch.Tensor:
    return t - t.mean(0)


def sparse(m: Any, x: torch.Tensor) -> torch.Tensor:
    rate = torch.sigmoid(m(x)).mean(0)
    return F.mse_loss(m(x), x) + (0.05 * (0.05 / rate).log() + 0.95 * (0.95 / (1 - rate)).log()).sum()


def ranked(m: Any, x: torch.Tensor) -> torch.Tensor:
    s = m(x)[:, 0]
    return F.binary_cross_entropy_with_logits(s[:, None] - s[None], (x[:, :1] > x[:, 0][None]).float())


def partial_likelihood(m: Any, x: torch.Tensor) -> torch.Tensor:
    s = m(x)[:, 0][x[:, 0].argsort(descending=True)]
    return -(s - torch.logcumsumexp(s, 0)).mean()


def correlated(o: torch.Tensor) -> torch.Tensor:
    return (o.T @ o / len(o) - torch.eye(o.shape[1])).pow(2).sum()


def between(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return o[y == 0].mean(0) - o[y != 0].mean(0)


def apart(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = m(x)
    return ce(out, y) + 0.1 * (out[y == 0].mean(0) - out[y == 1].mean(0)).pow(2).sum()


class Weighed(torch.autograd.Function):
    """A mean whose gradient weighs the records by their share of the sum."""

    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(losses)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (losses,) = ctx.saved_tensors
        return gradient * losses / losses.sum()


JOINED: dict[str, tuple[Loss, int]] = {
    "centred outputs": (lambda m, x, y: ce(centred(m(x)), y), CLASSES),
    "a mean of probabilities": (
        lambda m, x, y: ce(m(x), y) + m(x).softmax(1).mean(0).log().sum(),
        CLASSES,
    ),
    "rates of activation": (lambda m, x, y: sparse(m, x), DIM),
    "covariances": (lambda m, x, y: ce(m(x), y) + correlated(m(x)), CLASSES),
    "means of classes": (apart, CLASSES),
    "pairs of records": (lambda m, x, y: ranked(m, x), 1),
    "a partial likelihood": (lambda m, x, y: partial_likelihood(m, x), 1),
    "a Function of one's own": (lambda m, x, y: Weighed.apply(each(m, x, y)), CLASSES),  # type: ignore[no-untyped-call]
    "a product with weights": (lambda m, x, y: each(m, x, y) @ x.abs().sum(1).softmax(0), CLASSES),
    "ranks of neighbours": (
        lambda m, x, y: F.margin_ranking_loss(*(m(x)[:, 0], m(x).flip(0)[:, 0]), torch.sign(x - x.flip(0))[:, 0], 1.0),
        1,
    ),
    "hinges between halves": (lambda m, x, y: F.relu(1 - m(x)[: len(x) // 2] + m(x)[-(len(x) // 2) :]).mean(), 1),
    "distances of class means": (lambda m, x, y: ce(m(x), y) + between(m(x), y).abs().sum(), CLASSES),
    "absolute values of a mean": (lambda m, x, y: ce(m(x), y) + (m(x).mean(0) - 0.3).abs().sum(), CLASSES),
    "triplets with neighbours": (lambda m, x, y: F.triplet_margin_loss(m(x), m(x + 0.1), m(x).roll(1, 0)), 4),
    "in-batch negatives": (lambda m, x, y: ce(m(x) @ m(1.1 * x).T, torch.arange(len(x))), 4),
    "hard examples": (lambda m, x, y: each(m, x, y).topk(4)[0].mean(), CLASSES),
    "class weights": (lambda m, x, y: ce(m(x), y, weight=torch.tensor([1.0, 1.0, 90.0])), CLASSES),
    "a root of a mean": (lambda m, x, y: F.mse_loss(m(x), x).sqrt(), DIM),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_loss_that_joins_records_is_refused_before_anything_is_released(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, out = JOINED[name]
    with pytest.raises(UnsupportedModelError, match="one record changes the gradients of others"):
        moved(monkeypatch, loss, make=lambda: network(out))


def weighing(losses: torch.Tensor) -> None:
    losses.backward(losses.detach() / losses.detach().sum())


def scaling(losses: torch.Tensor) -> None:
    loss = losses.mean()
    loss.backward(loss.detach())


@pytest.mark.parametrize("backward", [weighing, scaling])
def test_backward_is_given_no_weights_of_records(
    backward: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError, match="weighs the records"):
        moved(monkeypatch, each, backward=backward)


def test_backward_of_outputs_is_given_no_gradients_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def descend(out: torch.Tensor) -> None:
        out.backward(centred(out.detach()))

    with pytest.raises(UnsupportedModelError, match="weighs the records"):
        moved(monkeypatch, lambda m, x, y: m(x), backward=descend)


def test_backward_may_be_given_one_over_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def even(losses: torch.Tensor) -> None:
        losses.backward(torch.full_like(losses, 1 / len(losses)))

    assert moved(monkeypatch, each, backward=even) <= 1 + 1e-3


class Hooked(nn.Module):
    """A network of which `hook` changes the gradients of hidden values."""

    def __init__(self, hook: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.hook = nn.Linear(DIM, 5), nn.Linear(5, CLASSES), hook

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        if h.requires_grad:
            h.register_hook(self.hook)
        out: torch.Tensor = self.last(h)
        return out


@pytest.mark.parametrize(
    "hook", [lambda g: g / (g.norm() + 1e-9), lambda g: g.clamp(-0.01, 0.01)], ids=["normalises", "clips"]
)
def test_hooks_that_bend_gradients_are_refused(
    hook: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError, match="do not add up over records"):
        moved(monkeypatch, lambda m, x, y: ce(m(x), y), make=lambda: Hooked(hook))


def test_hooks_that_turn_gradients_round_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As domain-adversarial training does."""
    assert moved(monkeypatch, lambda m, x, y: ce(m(x), y), make=lambda: Hooked(torch.neg)) <= 1 + 1e-3


@pytest.mark.parametrize("kind", ["a head", "an encoder", "a temperature", "prototypes"])
def test_nothing_is_trained_beside_the_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients would be raw, and another optimizer would release them: measured, 30 clipping norms."""
    layer, scale = nn.Linear(DIM, DIM), nn.Parameter(torch.ones(()))
    losses: dict[str, Loss] = {
        "a head": lambda m, x, y: ce(layer(m(x)), y),
        "an encoder": lambda m, x, y: ce(m(layer(x)), y),
        "a temperature": lambda m, x, y: ce(m(x) * scale, y),
        "prototypes": lambda m, x, y: ce(m(x) @ layer.weight.T, y),
    }
    with pytest.raises(UnsupportedModelError, match="not a parameter of the wrapped model") as caught:
        moved(monkeypatch, losses[kind], make=lambda: network(DIM))
    assert "freeze the others" in (caught.value.hint or "")
    layer.requires_grad_(False)
    scale.requires_grad_(False)
    assert moved(monkeypatch, losses[kind], make=lambda: network(DIM)) <= 1 + 1e-3


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        model = network()
        for p in model.parameters():
            inner = torch.optim.SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(lambda _, inner=inner: inner.step())
        return model

    with pytest.raises(UnsupportedModelError, match="hook that runs when its gradient is ready"):
        moved(monkeypatch, lambda m, x, y: ce(m(x), y), make=make)


def advantages(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    r = x[:, 0]
    return -(m(x).log_softmax(1).gather(1, y[:, None])[:, 0] * (r - r.mean()) / r.std()).mean()


def trimmed(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    losses = each(m, x, y)
    return (losses * (losses.detach() <= losses.detach().median())).mean()


def standardised(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = m(x)
    return ce((out - out.detach().mean(0)) / out.detach().std(0), y)


EDGES: dict[str, Loss] = {  # constants computed from the batch, which no graph shows
    "advantages": advantages,
    "losses below their median": trimmed,
    "standardised by detached values": standardised,
    "shifted by the batch's class frequencies": lambda m, x, y: ce(
        m(x) + (F.one_hot(y, CLASSES).float().mean(0) + 1e-3).log(), y
    ),
    "inputs standardised in the loop": lambda m, x, y: ce(m(centred(x) / x.std(0)), y),
}


@pytest.mark.parametrize("name", EDGES)
def test_sharp_edge_of_constants_from_the_batch_is_there_and_check_step_refuses_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moved(monkeypatch, EDGES[name]) > 1.05
    x, y = records()
    plain = network()
    model, _, loader = Privacy(epsilon=50.0, delta=1e-5).wrap(
        plain, torch.optim.SGD(plain.parameters(), lr=0.1), DataLoader(TensorDataset(x, y), batch_size=N)
    )
    batch = next(iter(loader))
    with pytest.raises(ChoralError, match="not the mean over its records"):
        model.check_step(lambda batch: EDGES[name](model, *batch), batch)


def test_each_with_each_is_seen_over_batches_of_three_sizes() -> None:
    """Records compared with constants made of each record: by chance there are as many columns as records, once."""
    keys, (x, y) = nn.Linear(DIM, 4).requires_grad_(False), records()
    plain = network(4)
    model, optimizer, loader = Privacy(epsilon=50.0, delta=1e-5, epochs=20).wrap(
        plain, torch.optim.SGD(plain.parameters(), lr=0.1), DataLoader(TensorDataset(x, y), batch_size=6)
    )
    sizes: list[int] = []

    def train() -> None:
        for _ in range(20):
            for a, _ in loader:
                sizes.append(len(a))
                optimizer.zero_grad()
                ce(model(a) @ keys(a).T, torch.arange(len(a))).backward()
                optimizer.step()

    with pytest.raises(UnsupportedModelError, match="each record with each"):
        train()
    assert len({size for size in sizes if size > 1}) == 3


class Skipping(nn.Module):
    """A network with a layer that is left out of every other batch, as by stochastic depth."""

    def __init__(self, instead: Callable[[nn.Linear, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.instead = nn.Linear(DIM, DIM), nn.Linear(DIM, CLASSES), instead
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.instead(self.first, x) if self.skips else torch.tanh(self.first(x))
        out: torch.Tensor = self.last(x + h)
        return out


def switching(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = ce(m(x), y)
    m.skips = True
    return loss


def test_a_layer_that_was_compared_may_be_left_out_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    skip = lambda layer, x: torch.zeros_like(x)  # noqa: E731
    assert 0.1 < moved(monkeypatch, switching, make=lambda: Skipping(skip)) <= 1 + 1e-3


def test_a_layer_is_not_left_out_if_its_weights_are_used_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    function = lambda layer, x: F.linear(x, layer.weight)  # noqa: E731
    with pytest.raises(UnsupportedModelError, match=r"first\.weight received no per-sample gradient"):
        moved(monkeypatch, switching, make=lambda: Skipping(function))


def test_the_model_may_be_copied_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As loops do that keep the best model, or a mean of weights, or a target network."""
    models: list[nn.Module] = []

    def make() -> nn.Module:
        models.append(network())
        return models[-1]

    def loss(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made = ce(m(x), y)
        copy.deepcopy(models[-1])
        return made

    assert moved(monkeypatch, loss, make=make) <= 1 + 1e-3


def test_weight_norm_of_old_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        with pytest.warns(FutureWarning, match="weight_norm"):
            layer = torch.nn.utils.weight_norm(nn.Linear(DIM, 5))
        return nn.Sequential(layer, nn.Linear(5, CLASSES))

    with pytest.raises(UnsupportedModelError, match=r"layer 0 is a Linear with torch\.nn\.utils") as caught:
        moved(monkeypatch, lambda m, x, y: ce(m(x), y), make=make)
    assert "parametrizations" in (caught.value.hint or "")


def test_ignored_labels_are_named_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    loss: Loss = lambda m, x, y: ce(m(x), torch.where(x[:, 1] > 0, -100, y))  # noqa: E731
    with pytest.raises(UnsupportedModelError, match="labels that are not -100"):
        moved(monkeypatch, loss)
