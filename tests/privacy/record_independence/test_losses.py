"""Losses of a plain loop that are no mean over records are refused; means, whatever they are of, are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from choral.privacy import UnsupportedModelError
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.per_sample.model import with_per_sample_gradients
from choral.privacy.record_independence import loss_observers
from choral.privacy.record_independence.loss_graph import LossGraphCheck

WEIGHTS = torch.tensor([1.0, 200.0, 1.0])
STEPS = 5


class Tokens(nn.Module):
    """Scores for each of five tokens of a record, shape (records, 5, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(t)))  # type: ignore[no-any-return]


def kept(t: torch.Tensor) -> torch.Tensor:
    """The first one to five tokens of each record are real."""
    return torch.arange(5) <= t[:, :1] % 5


def labels(t: torch.Tensor) -> torch.Tensor:
    return (t % 4).masked_fill(~kept(t), -100)


def each(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, y, reduction="none")


def token_losses(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o.transpose(1, 2), t % 4, reduction="none")


# Of scores and classes, shape (records, 3) and (records,).
REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "class weights": lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS),
    "class weights, smoothed": lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS, label_smoothing=0.1),
    "class weights in nll_loss": lambda o, y: F.nll_loss(o.log_softmax(1), y, weight=WEIGHTS),
    "class weights in a module": lambda o, y: 0.5 * nn.CrossEntropyLoss(weight=WEIGHTS)(o, y) + o.square().mean(),
    "weights divided by their sum": lambda o, y: (each(o, y) * WEIGHTS[y]).sum() / WEIGHTS[y].sum(),
    "weights divided by their mean": lambda o, y: (each(o, y) * WEIGHTS[y]).mean() / WEIGHTS[y].mean(),
    "an ignored class": lambda o, y: F.cross_entropy(o, y, ignore_index=1),
    "an ignored class, smoothed": lambda o, y: F.cross_entropy(o, y, ignore_index=1, label_smoothing=0.1),
    "a sum": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "a sum of squares": lambda o, y: F.mse_loss(o, F.one_hot(y, 3).float(), reduction="sum"),
    "a plain sum": lambda o, y: each(o, y).sum(),
    "a sum beside a mean": lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().sum(),
    "a sum by the batch size that was asked for": lambda o, y: each(o, y).sum() / 20,
    "a sum by the records of one class": lambda o, y: each(o, y)[y == 0].sum() / (y == 0).sum(),
    "the records of one class": lambda o, y: each(o, y)[y == 0].mean(),
    "the records of one class, selected": lambda o, y: each(o, y).masked_select(y == 0).mean(),
    "a root of the mean": lambda o, y: F.mse_loss(o, F.one_hot(y, 3).float()).sqrt(),
    "a square of the mean": lambda o, y: F.cross_entropy(o, y).pow(2),
    "a product of means": lambda o, y: F.cross_entropy(o, y) * o.square().mean(),
    "flooding": lambda o, y: (F.cross_entropy(o, y) - 0.1).abs() + 0.1,
    "a variance": lambda o, y: F.cross_entropy(o, y) + each(o, y).var(),
    "a deviation by hand": lambda o, y: (each(o, y) - each(o, y).mean()).square().mean(),
    "the worst records": lambda o, y: each(o, y).topk(2).values.mean(),
    "the worst record": lambda o, y: each(o, y).max(),
    "a root of each column's mean": lambda o, y: o.square().mean(0).sqrt().mean(),
    "a product of columns' means": lambda o, y: (o.mean(0) * o.square().mean(0)).sum() + F.cross_entropy(o, y),
    "a norm": lambda o, y: torch.linalg.vector_norm(o - F.one_hot(y, 3)),
    "a soft maximum": lambda o, y: torch.logsumexp(each(o, y), 0),
    "a softmax over records": lambda o, y: (each(o, y) * o.softmax(0)[:, 0]).mean(),
    "contrast": lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o))),
    "distances": lambda o, y: torch.cdist(o, o.clone(), compute_mode="donot_use_mm_for_euclid_dist").mean(),
}

HONEST: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross entropy": F.cross_entropy,
    "smoothed": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "equal class weights": lambda o, y: F.cross_entropy(o, y, weight=torch.full((3,), 2.0)),
    "public weights": lambda o, y: (each(o, y) * WEIGHTS[y]).mean(),
    "public weights of two": lambda o, y: (F.cross_entropy(o, y, reduction="none", weight=WEIGHTS)).mean() * 0.3,
    "a sum by the records drawn": lambda o, y: each(o, y).sum() / len(o),
    "a sum by all numbers": lambda o, y: o.square().sum() / o.numel() + F.cross_entropy(o, y),
    "a sum times a part": lambda o, y: each(o, y).sum() * (1 / len(o)) * 0.7,
    "a sum by a number and twice the records": lambda o, y: -each(o, y).sum() / (-2 * len(o)),
    "an ignored class that nobody has": lambda o, y: F.cross_entropy(o, y, ignore_index=-1),
    "positive weights": lambda o, y: F.binary_cross_entropy_with_logits(
        o, F.one_hot(y, 3).float(), pos_weight=WEIGHTS, weight=torch.tensor([1.0, 2.0, 3.0])
    ),
    "binary": lambda o, y: F.binary_cross_entropy(o.sigmoid(), F.one_hot(y, 3).float()),
    "squares": lambda o, y: F.mse_loss(o, F.one_hot(y, 3).float()),
    "huber": lambda o, y: F.smooth_l1_loss(o, F.one_hot(y, 3).float()) + F.huber_loss(o, F.one_hot(y, 3).float()),
    "l1": lambda o, y: F.l1_loss(o, F.one_hot(y, 3).float()),
    "divergence": lambda o, y: F.kl_div(o.log_softmax(1), F.one_hot(y, 3).float(), reduction="batchmean"),
    "gaussian": lambda o, y: F.gaussian_nll_loss(o[:, 0], y.float(), o[:, 1].exp()),
    "margin": lambda o, y: F.multi_margin_loss(o, y),
    "roots of records": lambda o, y: (o - F.one_hot(y, 3)).square().mean(1).add(1e-6).sqrt().mean(),
    "norms of records": lambda o, y: torch.linalg.vector_norm(o - F.one_hot(y, 3), dim=1).mean(),
    "focal": lambda o, y: ((1 - (-each(o, y)).exp()) ** 2 * each(o, y)).mean(),
    "entropy": lambda o, y: F.cross_entropy(o, y) - 0.1 * (o.softmax(1) * o.log_softmax(1)).sum(1).mean().neg(),
    "the label's score": lambda o, y: -o.log_softmax(1)[torch.arange(len(o)), y].mean(),
    "gathered": lambda o, y: -o.log_softmax(1).gather(1, y[:, None]).mean(),
    "one column": lambda o, y: o[:, [0, 2]].square().mean() + o[:, 1].square().mean(),
    "records in another order": lambda o, y: F.cross_entropy(o[torch.arange(len(o)).flip(0)], y.flip(0)),
    "several tasks": lambda o, y: torch.stack([F.cross_entropy(o, y), o.square().mean(), o.abs().mean()]).sum(),
    "the mean of tasks": lambda o, y: torch.stack([F.cross_entropy(o, y), o.square().mean()]).mean(),
    "a mean in two steps": lambda o, y: o.square().mean(0).mean(),
    "the mean beside each record": lambda o, y: (each(o, y) + each(o, y).mean()).mean(),
    "distances to centres": lambda o, y: torch.cdist(o, torch.eye(3)).gather(1, y[:, None]).mean(),
    "a temperature": lambda o, y: F.cross_entropy(o / torch.tensor(2.0), y) * torch.tensor(0.5) / torch.tensor(3.0),
    "accumulated by class": lambda o, y: sum((each(o, y) * (y == k)).mean() for k in range(3)),
    "in double precision": lambda o, y: F.cross_entropy(o.double(), y),
}

OF_TOKENS_REFUSED = {
    "ignored tokens": lambda o, t: F.cross_entropy(o.transpose(1, 2), labels(t)),
    "ignored tokens, flat": lambda o, t: F.cross_entropy(o.reshape(-1, 4), labels(t).reshape(-1)),
    "a masked mean": lambda o, t: (token_losses(o, t) * kept(t)).sum() / kept(t).sum(),
    "picked tokens": lambda o, t: F.cross_entropy(o[kept(t)], (t % 4)[kept(t)]),
    "picked losses": lambda o, t: token_losses(o, t)[kept(t)].mean(),
    "a sum of tokens": lambda o, t: token_losses(o, t).sum(),
}

OF_TOKENS_HONEST = {
    "all tokens": lambda o, t: F.cross_entropy(o.transpose(1, 2), t % 4),
    "all tokens, flat": lambda o, t: F.cross_entropy(o.reshape(-1, 4), (t % 4).reshape(-1)),
    "a mean of each record": lambda o, t: ((token_losses(o, t) * kept(t)).sum(1) / kept(t).sum(1)).mean(),
    "a sum of each record": lambda o, t: F.cross_entropy(o.transpose(1, 2), labels(t), reduction="none").sum(1).mean(),
    "token after token": lambda o, t: sum(F.cross_entropy(o[:, i], t[:, i] % 4) for i in range(5)),
    "the last token": lambda o, t: F.cross_entropy(o[torch.arange(len(o)), kept(t).sum(1) - 1], t[:, 0] % 4),
    "two tokens of each": lambda o, t: o[:, torch.tensor([1, 3])].square().mean(),
}


def steps(problem: Any, loss: Any, *, tokens: bool = False) -> int:
    if tokens:
        torch.manual_seed(0)
        t = torch.randint(9, (200, 5))
        problem.dataset = TensorDataset(t, t)
    private, optimizer, loader = problem.wrapped(model=Tokens() if tokens else None)
    done = 0
    for x, y in loader:
        optimizer.zero_grad()
        loss(private(x), y).backward()
        optimizer.step()
        done += 1
        if done == STEPS:
            break
    return done


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_is_no_mean_over_records_is_refused_in_a_plain_loop(problem: Any, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="one record changes") as caught:
        steps(problem, REFUSED[name])
    assert "reduction='none'" in caught.value.hint


@pytest.mark.parametrize("name", OF_TOKENS_REFUSED)
def test_a_mean_over_the_tokens_of_a_batch_is_refused_in_a_plain_loop(problem: Any, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="one record changes"):
        steps(problem, OF_TOKENS_REFUSED[name], tokens=True)


@pytest.mark.parametrize("name", HONEST)
def test_a_mean_over_records_passes(problem: Any, name: str) -> None:
    assert steps(problem, HONEST[name]) == STEPS


@pytest.mark.parametrize("name", OF_TOKENS_HONEST)
def test_a_mean_over_the_tokens_of_each_record_passes(problem: Any, name: str) -> None:
    assert steps(problem, OF_TOKENS_HONEST[name], tokens=True) == STEPS


def sensitivity(loss: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """By how many clipping norms the first record changes the clipped sum, without noise and without this check."""
    sums = []
    for rows in (slice(0, None), slice(1, None)):
        torch.manual_seed(1)
        model = nn.Linear(6, 3)
        private = with_per_sample_gradients(model)
        loss_observers._observers.discard(private)
        optimizer = PrivateOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0),
            private,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=1,
            source=lambda count: b"\xff" * count,
        )
        optimizer.expect(len(x[rows]))
        loss(private(x[rows]), y[rows]).backward()
        optimizer.step()
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    return float((sums[0] - sums[1]).norm())


def test_a_loss_is_shown_to_the_models_alone_that_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may hold many wrapped models; each backward pass of another one must not wait for all of them."""
    shown: list[LossGraphCheck] = []
    monkeypatch.setattr(LossGraphCheck, "look", lambda self, *_: shown.append(self))
    x, models = torch.randn(4, 6), [with_per_sample_gradients(nn.Linear(6, 3)) for _ in range(3)]
    for model in models:
        model.drawn = 4
    first, second, third = (model(x) for model in models)
    nn.Linear(6, 3)(x).mean().backward()
    assert shown == []
    first.mean().backward()
    assert shown == [models[0]._losses]
    (second.mean() + third.mean()).backward()
    assert {id(one) for one in shown[1:]} == {id(model._losses) for model in models[1:]}
    assert len(shown) == 3
    torch.autograd.backward([nn.Linear(6, 3)(x).mean(), models[0](x).mean()])  # each of several losses counts
    assert shown[3:] == [models[0]._losses]


def test_what_is_refused_would_exceed_the_clipping_norm_many_times() -> None:
    """One rare record of a heavy class among 64: 15 and more clipping norms; with losses as in the hint, one."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=generator) + 1.0, torch.zeros(64, dtype=torch.long)
    y[0] = 1
    assert sensitivity(REFUSED["class weights"], x, y) > 15.0
    assert sensitivity(REFUSED["weights divided by their mean"], x, y) > 15.0
    for name in ("cross entropy", "public weights", "a sum by the records drawn"):
        assert sensitivity(HONEST[name], x, y) <= 1.0 + 2**-9


def test_a_step_that_was_checked_may_have_a_loss_that_the_graph_does_not_show(problem: Any) -> None:
    """A sum by a number that is the records drawn, in a form that is not read off the graph."""
    private, optimizer, loader = problem.wrapped()

    def loss(batch: Any) -> torch.Tensor:
        x, y = batch
        return each(private(x), y).sum() * torch.tensor([0.37 / len(x)]).squeeze()

    for batch in loader:
        private.check_step(loss, batch)
        loss(batch).backward()
        optimizer.step()


def test_losses_of_other_models_are_left_alone(problem: Any) -> None:
    private, optimizer, loader = problem.wrapped()
    for done, (x, y) in enumerate(loader):
        other = nn.Linear(6, 3)
        each(other(x), y).sum().backward()
        assert other.weight.grad is not None
        with torch.no_grad():
            private(x)
        F.cross_entropy(private(x), y).backward()
        optimizer.step()
        if done == 2:
            break
