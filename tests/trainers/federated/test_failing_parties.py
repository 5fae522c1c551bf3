"""One party's failure is that party's dropout: named, counted, and no reason to end the run for the others."""

from __future__ import annotations

import logging

import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Homomorphic, Masked, Plain, Privacy, Run
from choral.privacy import Ledger
from choral.privacy.errors import EncodingError
from choral.protocols.errors import TooFewSurvivorsError
from choral.trainers import DivergedError, Epochs, Participation, TaskError, VirtualParties
from choral.trainers.algorithms import DANE, FSVRG, GD, CoCoA, FedAdam, FedAvg, FedNova, FedProx, Scaffold
from choral.trainers.engines import Cohort, Direct

BAD = 7.0  # a feature of the records at which the loop breaks down


def _party(count, seed, bad=False):
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 5, generator=draw).clamp(-3, 3)
    if bad:
        points[0, 0] = BAD
    return TensorDataset(points, torch.arange(count) % 2)


PARTIES = {name: _party(20 + 3 * seed, seed) for seed, name in enumerate(["ant", "bee", "cat", "dog", "elk"])}
WITH_BAD = PARTIES | {"fox": _party(30, 9, bad=True)}


def build(dataset):
    model = nn.Linear(5, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)


def loss(model, batch):
    if bool((batch[0] == BAD).any()):
        raise ValueError("record 17 of patient Miller is odd")
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].float(), reduction="none")


def fit(model, optimizer, loader):
    for batch in loader:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()


def _job(**replaced):
    usual = {"build": build, "fit": fit, "evaluate": lambda model: 0.5, "parties": WITH_BAD, "rounds": 2, "loss": loss}
    return usual | replaced


def _same(one, other, atol=0.0):
    return all(torch.allclose(one.state[name], other.state[name], rtol=0.0, atol=atol) for name in one.state)


def _breaks_all(model, optimizer, loader):
    """Also leaves the model that the next party is to use in pieces."""
    if any(bool((points == BAD).any()) for points, _ in loader):
        model.bias.requires_grad_(False)
        model.weight = nn.Parameter(torch.full((1, 5), 3.0))
        raise ValueError("in pieces")
    fit(model, optimizer, loader)


def _diverges(model, optimizer, loader):
    fit_good(model, optimizer, loader)
    if any(bool((points == BAD).any()) for points, _ in loader):
        model.weight.data.fill_(float("nan"))


def _too_far(model, optimizer, loader):
    fit_good(model, optimizer, loader)
    if any(bool((points == BAD).any()) for points, _ in loader):
        model.weight.data.fill_(40.0)


def fit_good(model, optimizer, loader):
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(points)[:, 0], labels.float()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("loop", "how"),
    [
        (fit, "its training failed"),
        (_breaks_all, "its training failed"),
        (_diverges, "its training diverged"),
        (_too_far, "its update cannot be encoded"),
    ],
)
def test_a_party_that_fails_drops_out_and_the_others_train_as_without_it(loop, how, tmp_path, caplog):
    sum_of = Masked(min_survivors=2, corrupt=1, dropouts=2)
    run = federate(**_job(fit=loop), secure_sum=sum_of, out=tmp_path / "run")
    alone = federate(**_job(fit=fit_good, parties=PARTIES))
    assert _same(run, alone, atol=1e-6)
    assert [entry.dropped for entry in run.history] == [{}, {"fox": how}, {"fox": how}]
    assert [entry.survivors for entry in run.history[1:]] == [5, 5]
    assert run.info.dropped == {"fox": 2} == Run.load(tmp_path / "run").info.dropped
    assert sum("'fox'" in record.message for record in caplog.records) == 2


def test_the_reason_is_for_the_user_and_in_no_file(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="choral.trainers"):
        federate(**_job(), out=tmp_path / "run", transcript="messages")
    assert "ValueError: record 17 of patient Miller is odd" in caplog.text
    assert f"{__file__}, line " in caplog.text
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"Miller" not in path.read_bytes()


@pytest.mark.parametrize(
    "algorithm",
    [FedAvg(), FedProx(), FedAdam(), Scaffold(), FedNova(), GD(), FSVRG(step=0.5), DANE(mu=0.5), CoCoA()],
    ids=lambda kind: kind.kind,
)
@pytest.mark.parametrize(
    "secure_sum", [Plain(), Masked(min_survivors=2, corrupt=1, dropouts=2)], ids=lambda kind: kind.name
)
def test_every_algorithm_goes_on_without_a_party_that_fails(algorithm, secure_sum):
    run = federate(**_job(), algorithm=algorithm, secure_sum=secure_sum)
    assert [entry.dropped for entry in run.history] == [{}, *2 * ({"fox": "its training failed"},)]
    assert [entry.survivors for entry in run.history[1:]] == [5, 5]


def test_a_homomorphic_sum_goes_on_without_it():
    run = federate(**_job(rounds=1), secure_sum=Homomorphic(min_survivors=2, corrupt=1, dropouts=2))
    assert run.history[-1].survivors == 5


@pytest.mark.parametrize("engine", [Direct, Cohort, None])
def test_every_engine_goes_on_without_it(engine):
    def criterion(outputs, targets, *, reduction):
        return nn.functional.cross_entropy(outputs, targets, reduction=reduction)

    def wide(dataset):
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    odd = PARTIES | {"fox": TensorDataset(torch.full((20, 5), float("inf")), torch.arange(20) % 2)}
    options = {"engine": engine} if engine else {}
    run = federate(**_job(build=wide, fit=Epochs(criterion=criterion), parties=odd), **options)
    alone = federate(**_job(build=wide, fit=Epochs(criterion=criterion), parties=PARTIES), **options)
    assert run.history[-1].dropped == {"fox": "its training diverged"}
    assert _same(run, alone, atol=1e-5)


def test_a_party_that_cannot_even_be_built_is_left_out():
    def picky(dataset):
        if bool((dataset.tensors[0] == BAD).any()):
            raise OSError("no such column")
        return build(dataset)

    for loop in (fit_good, Epochs(criterion=lambda o, t, *, reduction: ((o[:, 0] - t) ** 2).mean())):
        assert federate(**_job(build=picky, fit=loop)).history[-1].dropped == {"fox": "its training failed"}


def test_virtual_parties_fail_one_by_one():
    names = list(WITH_BAD)
    parties = VirtualParties(
        len(names),
        lambda index: WITH_BAD[names[index]],
        lambda index: len(WITH_BAD[names[index]]),
        total=sum(len(dataset) for dataset in WITH_BAD.values()),
        largest=40,
    )
    run = federate(**_job(parties=parties, rounds=6), participation=Participation(cohort=4, least=2, draw="seed"))
    assert run.finished
    assert any(entry.dropped for entry in run.history)
    assert any(not entry.dropped for entry in run.history[1:])


def test_where_all_fail_the_run_ends_with_each_ones_reason(tmp_path):
    def never(model, optimizer, loader):
        raise KeyError("x")

    with pytest.raises(
        TaskError, match=r"no party could train in round 1: ant: .*KeyError.*line.*; bee: .*; fox: "
    ) as said:
        federate(**_job(fit=never), participation=Participation(patience=3), out=tmp_path / "run")
    assert isinstance(said.value.__cause__, KeyError)
    with pytest.raises(DivergedError, match="diverged in round 1"):
        federate(**_job(fit=lambda m, o, loader: m.weight.data.fill_(float("inf"))))
    with pytest.raises(EncodingError, match="338"):
        federate(**_job(fit=lambda m, o, loader: m.weight.data.fill_(338.0)), secure_sum=Masked(min_survivors=2))


def test_too_few_left_is_a_failed_round_that_patience_covers():
    strict = Masked(min_survivors=6, corrupt=1, dropouts=0)
    with pytest.raises(TooFewSurvivorsError, match=r"training failed at 1 parties .*ValueError"):
        federate(**_job(), secure_sum=strict)
    run = federate(**_job(), secure_sum=strict, participation=Participation(patience=2))
    assert all(entry.failed and entry.dropped for entry in run.history[1:])
    assert all("Miller" not in entry.failed for entry in run.history)


def test_a_private_party_that_fails_has_paid_and_others_go_on(tmp_path):
    privacy = Privacy(epsilon=8.0, delta=1e-3, max_grad_norm=1.0)
    odd = TensorDataset(torch.full((30, 5), BAD), torch.arange(30) % 2)  # whichever records are drawn
    run = federate(**_job(parties=PARTIES | {"fox": odd}), privacy=privacy, out=tmp_path / "run")
    assert run.history[-1].dropped == {"fox": "its training failed"}
    paid = [len(Ledger(tmp_path / "run" / "ledger" / f"{name}.jsonl").events) for name in ("fox", "ant")]
    assert paid[0] >= 1
    assert paid[1] == 2
    assert run.info.spent["fox"].epsilon > 0


def test_whether_a_client_failed_is_hidden_where_clients_are_what_is_hidden(tmp_path, caplog):
    privacy = ClientPrivacy(epsilon=50.0, delta=1e-3, min_survivors=6, clip=1.0)
    run = federate(**_job(), privacy=privacy, secure_sum=Masked(min_survivors=6), out=tmp_path / "run")
    assert [entry.survivors for entry in run.history[1:]] == [6, 6]
    assert not any(entry.dropped for entry in run.history)
    assert "'fox'" in caplog.text
    for path in (tmp_path / "run").rglob("*.json*"):
        assert b"failed" not in path.read_bytes().replace(b'"failed":""', b"")
