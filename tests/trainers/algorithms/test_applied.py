"""What an algorithm hangs on the user's optimizer is applied, or the loop is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from flat_arguments import federate
from torch import nn

from choral import Privacy
from choral.trainers import Epochs, TaskError
from choral.trainers.algorithms import DANE, FSVRG, GD, FedAvg, FedNova, FedProx, Scaffold

from .conftest import fit as good
from .conftest import loss


def _own_optimizer(model, optimizer, loader):
    good(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)


def _loaded_copy(model, optimizer, loader):
    twin = copy.deepcopy(model)
    good(twin, torch.optim.SGD(twin.parameters(), lr=0.1), loader)
    model.load_state_dict(twin.state_dict())


def _own_optimizer_after_one_step(model, optimizer, loader):
    good(model, optimizer, [next(iter(loader))])
    good(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)


def _by_hand_between_steps(model, optimizer, loader):
    for batch in loader:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.grad
        optimizer.step()


def _copied_optimizer(model, optimizer, loader):
    twin, own = copy.deepcopy((model, optimizer))
    good(twin, own, loader)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.copy_(theirs)


ELSEWHERE = [_own_optimizer, _loaded_copy, _own_optimizer_after_one_step, _by_hand_between_steps, _copied_optimizer]


@pytest.mark.parametrize("algorithm", [FedProx(mu=0.5), Scaffold(), FedNova()], ids=lambda kind: kind.kind)
@pytest.mark.parametrize("fit", ELSEWHERE)
def test_a_loop_that_trains_beside_its_optimizer_is_refused(convex, algorithm, fit):
    with pytest.raises(TaskError, match=r"outside the steps of the optimizer|with plain SGD|needs plain SGD"):
        federate(**convex(fit=fit), algorithm=algorithm)


@pytest.mark.parametrize("fit", ELSEWHERE)
def test_averaging_alone_takes_any_loop(convex, fit):
    assert federate(**convex(fit=fit), algorithm=FedAvg()).finished


def _with_closure(model, optimizer, loader):
    for batch in loader:

        def closure(batch=batch):
            optimizer.zero_grad()
            value = loss(model, batch).mean()
            value.backward()
            return value

        optimizer.step(closure)


@pytest.mark.parametrize("algorithm", [FedProx(mu=0.5), Scaffold()], ids=lambda kind: kind.kind)
def test_a_step_that_evaluates_the_loss_itself_is_corrected(convex, algorithm):
    one, other = (federate(**convex(fit=fit), algorithm=algorithm) for fit in (good, _with_closure))
    assert torch.equal(one.state["weight"], other.state["weight"])
    plain = federate(**convex(fit=_with_closure), algorithm=FedAvg())
    assert not torch.allclose(plain.state["weight"], other.state["weight"], atol=1e-4)


def test_weights_that_a_private_loop_changes_without_noise_are_refused(convex):
    def fit(model, optimizer, loader):
        good(model, optimizer, loader)
        with torch.no_grad():
            model.weight.add_(1e-3)

    with pytest.raises(TaskError, match="changed has no noise"):
        federate(**convex(fit=fit), privacy=Privacy(epsilon=8.0, delta=1e-4, max_grad_norm=1.0))


@pytest.mark.parametrize("algorithm", [FedProx(mu=0.5), Scaffold()], ids=lambda kind: kind.kind)
def test_sparse_gradients_that_would_have_to_be_corrected_are_named(convex, algorithm):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(6, 3, sparse=True), nn.Linear(3, 1)

        def forward(self, rows):
            return self.out(self.table(rows.abs().long().clamp(max=5)).mean(1))

    job = convex()
    plain = job["build"]

    def build(dataset):
        model = Words()
        return model, torch.optim.SGD(model.parameters(), lr=0.1), plain(dataset)[2]

    with pytest.raises(TaskError, match=r"'table\.weight' is sparse"):
        federate(**(job | {"build": build}), algorithm=algorithm)
    assert federate(**(job | {"build": build})).finished
    with pytest.raises(TaskError, match=r"'table\.weight' is sparse"):
        federate(**(job | {"build": build, "fit": Epochs(criterion=_criterion)}), algorithm=algorithm)


def _criterion(outputs, targets, *, reduction):
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.float(), reduction=reduction)


def test_sparse_gradients_of_records_are_taken_or_named(convex):
    """A lookup and its dense twin have the same gradient; the exact solver needs the gradient's own gradient."""
    job = convex()
    plain = job["build"]

    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.table = nn.Embedding(6, 1, sparse=sparse)

        def forward(self, rows):
            return self.table(rows.abs().long().clamp(max=5)).mean(1)

    def build(sparse):
        def made(dataset):
            model = Words(sparse)
            return model, torch.optim.SGD(model.parameters(), lr=0.1), plain(dataset)[2]

        return made

    for algorithm in (GD(), FSVRG(scaled=False)):
        one, other = (federate(**(job | {"build": build(sparse)}), algorithm=algorithm) for sparse in (True, False))
        assert torch.equal(one.state["table.weight"], other.state["table.weight"])
    with pytest.raises(TaskError, match=r"'table\.weight' is sparse"):
        federate(**(job | {"build": build(True)}), algorithm=DANE(mu=0.5, solver="newton"))
