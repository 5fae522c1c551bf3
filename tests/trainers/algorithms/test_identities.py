"""What the algorithms are in special cases, and what resuming, dropouts and privacy leave of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Homomorphic, Masked, Plain, Privacy, Run
from choral.errors import ConfigError
from choral.privacy import Ledger, PrivacyEngine
from choral.trainers import DivergedError, Dropouts, Participation, RunFolderError, TaskError
from choral.trainers.algorithms import (
    DANE,
    FSVRG,
    GD,
    KINDS,
    CoCoA,
    FedAdam,
    FedAvg,
    FedNova,
    FedProx,
    FedSGD,
    Scaffold,
)
from choral.trainers.algorithms.interface import Train
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.run_folder.algorithm_state import read_algorithm_state
from choral.trainers.task.arithmetic import Arithmetic

from .conftest import RATE, build, fit

SUMS = [Plain(), Masked(), Homomorphic()]


def whole_batch(dataset):
    model = nn.Linear(6, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size=len(dataset))


def equal(a, b, atol=0.0):
    for name in a.state:
        torch.testing.assert_close(a.state[name], b.state[name], rtol=0, atol=atol)
    return not torch.equal(a.state["weight"], torch.zeros_like(a.state["weight"]))


@pytest.mark.parametrize("secure_sum", SUMS, ids=lambda kind: kind.name)
def test_fedprox_without_a_pull_is_fedavg(convex, secure_sum):
    fedavg = federate(**convex(), secure_sum=secure_sum)
    assert equal(federate(**convex(), algorithm=FedProx(mu=0.0), secure_sum=secure_sum), fedavg)
    assert not torch.equal(federate(**convex(), algorithm=FedProx(mu=0.1)).state["weight"], fedavg.state["weight"])


@pytest.mark.parametrize("secure_sum", SUMS[:2], ids=lambda kind: kind.name)
def test_one_inexact_pass_of_dane_is_naive_fsvrg(convex, secure_sum):
    dane = DANE(eta=1.0, mu=0.0, ridge=0.01, solver="svrg", step=0.1, passes=1)
    naive = FSVRG(step=0.1, ridge=0.01, scaled=False, over_examples=False, mean="parties")
    first, second = (federate(**convex(), algorithm=kind, secure_sum=secure_sum) for kind in (dane, naive))
    assert equal(first, second)


@pytest.mark.parametrize("secure_sum", SUMS[:2], ids=lambda kind: kind.name)
def test_one_full_batch_step_of_fedavg_is_gradient_descent(convex, secure_sum):
    fedavg = federate(**convex(build=whole_batch), secure_sum=secure_sum)
    descent = federate(**convex(build=whole_batch), algorithm=GD(rate=0.5), secure_sum=secure_sum)
    assert equal(fedavg, descent, atol=2e-6)


@pytest.mark.parametrize("secure_sum", SUMS[:2], ids=lambda kind: kind.name)
def test_scaffold_with_zero_variates_is_fedavg(convex, secure_sum):
    """The first round has none; in later ones a party's variate and the server's differ."""
    start = federate(**convex(rounds=1), secure_sum=secure_sum)
    assert equal(federate(**convex(rounds=1), algorithm=Scaffold(), secure_sum=secure_sum), start)
    later = federate(**convex(rounds=2), algorithm=Scaffold())
    assert not torch.equal(later.state["weight"], federate(**convex(rounds=2)).state["weight"])


def test_fednova_with_equal_steps_is_fedavg(convex):
    fedavg = federate(**convex(build=whole_batch))
    assert equal(federate(**convex(build=whole_batch), algorithm=FedNova()), fedavg, atol=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["fedavg", "scaffold", "fedadam", "fedyogi", "fsvrg", "dane", "cocoa"])
def test_resumed_equals_uninterrupted(convex, tmp_path, kind):
    """Moments, control variates, counts and dual variables come back with the weights."""
    algorithm = DANE(mu=0.5) if kind == "dane" else KINDS[kind]()
    job = convex(rounds=4) | {"algorithm": algorithm}
    # Some parties drop out, other ones in each round, so that what is kept of those that were there matters.
    job |= {"dropout_rate": 0.3, "secure_sum": Plain()}
    whole = federate(**job)
    assert min(entry.survivors for entry in whole.history[1:]) < 4

    def stop(entry):
        if entry.round == 2:
            raise Stop

    with pytest.raises(Stop):
        federate(**job, out=tmp_path / "run", on_round=stop)
    resumed = federate(**job, out=tmp_path / "run", resume=True)
    assert equal(whole, resumed)
    assert Run.load(tmp_path / "run").info.algorithm == algorithm.record()
    with pytest.raises(ConfigError, match=r"algorithm\."):
        federate(**job | {"algorithm": FedProx(mu=0.5)}, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["scaffold", "cocoa"])
def test_what_parties_keep_agrees_with_the_server_though_some_were_lost(convex, oracle, tmp_path, kind, fails):
    """SCAFFOLD: c is the weighted mean of all variates. CoCoA+: w is what the dual variables say.

    fails: rounds of fewer than three parties do, the first among them; the next one that succeeds is then the first.
    """
    rule = Participation(dropouts=Dropouts(vector=0.3), patience=6)
    job = convex(rounds=6) | {"participation": rule, "seed": 4}
    if fails:
        job |= {"secure_sum": Homomorphic(key="shared", min_survivors=3)}
    run = federate(**job, algorithm=KINDS[kind](), out=tmp_path / "run")
    assert bool(run.history[1].failed) == fails
    assert min(entry.survivors for entry in run.history[1:] if not entry.failed) < 4
    kept = read_algorithm_state(tmp_path / "run", 6)
    total = sum(oracle.counts.values())
    if kind == "scaffold":
        mean = sum(oracle.counts[name] * state["variate"].double() for name, state in kept.parties.items()) / total
        assert mean.abs().max() > 0.05
        torch.testing.assert_close(kept.server["control"].double(), mean, rtol=0, atol=1e-6)
    else:
        blocks = {name: state["dual"].numpy() for name, state in kept.parties.items()}
        primal = sum((block * oracle.data[name][1]) @ oracle.data[name][0] for name, block in blocks.items())
        flat = torch.cat([tensor.reshape(-1) for tensor in run.state.values()]).numpy()
        assert np.abs(flat - primal / (0.01 * total)).max() < 1e-5


def test_bytes_down_count_what_is_sent_when_it_is_sent(convex):
    """Weights once a round, FSVRG's direction every round, its shares once; 7 coordinates of 4 bytes."""
    history = federate(**convex(rounds=3), algorithm=FSVRG()).history
    assert [entry.bytes_down for entry in history[1:]] == [3 * 28, 2 * 28, 2 * 28]
    assert history[1].bytes_up > history[2].bytes_up == history[3].bytes_up


def test_weights_that_move_within_a_round_are_told_again(convex):
    """Before each of FedSGD's steps, beside what a step is told itself."""
    one, three = (
        federate(**convex(rounds=2), algorithm=FedSGD(batch_size=8, steps_per_round=steps)).history for steps in (1, 3)
    )
    assert [entry.bytes_down for entry in three[1:]] == [3 * entry.bytes_down for entry in one[1:]]
    assert one[1].bytes_down >= 28


def test_corrections_come_after_clipping_and_noise(shards):
    """Gradients are clipped to 1e-4 and their noise is small; a shift by 1 is in each step whole."""
    privacy = Privacy(epsilon=8.0, delta=1e-3, max_grad_norm=1e-4)
    privacy_engine = PrivacyEngine(privacy, holder="north", ledger=Ledger(None, holder="north"), passes=1)
    resident = Resident(
        build=build,
        fit=fit,
        datasets=shards,
        privacy_engines={"north": privacy_engine},
        seed=0,
        arithmetic=Arithmetic(torch.device("cpu")),
    )
    ((_, done),) = resident.do([("north", Train(shift=torch.ones(7)))], resident.layout.read(), 1)
    assert done.steps == privacy_engine.spent().steps == 4
    assert done.path == pytest.approx(4 * RATE)
    torch.testing.assert_close(done.vector, torch.full((7,), -4 * RATE), rtol=0, atol=1e-2)


def test_a_lost_algorithm_state_is_refused(convex, tmp_path):
    job = convex(rounds=3) | {"algorithm": FedAdam()}

    def stop(entry):
        if entry.round == 2:
            raise Stop

    with pytest.raises(Stop):
        federate(**job, out=tmp_path / "run", on_round=stop)
    (tmp_path / "run" / "algorithm_state.2.safetensors").unlink()
    with pytest.raises(RunFolderError, match="fedadam kept after round 2 is missing"):
        federate(**job, out=tmp_path / "run", resume=True)


def test_the_algorithm_state_of_an_earlier_version_is_read_and_its_file_goes(convex, tmp_path):
    """Earlier versions called it memory.ROUND.safetensors."""
    job = convex(rounds=4) | {"algorithm": FedAdam()}
    straight = federate(**job)

    def stop(entry):
        if entry.round == 2:
            raise Stop

    with pytest.raises(Stop):
        federate(**job, out=tmp_path / "run", on_round=stop)
    for file in (tmp_path / "run").glob("algorithm_state.*"):
        file.rename(file.with_name(file.name.replace("algorithm_state", "memory")))
    resumed = federate(**job, out=tmp_path / "run", resume=True)
    assert all(torch.equal(resumed.state[name], tensor) for name, tensor in straight.state.items())
    assert list((tmp_path / "run").glob("memory.*")) == []


RECORD = Privacy(epsilon=8.0, delta=1e-3)
CLIENT = ClientPrivacy(epsilon=40.0, delta=1e-2, clip=1.0, noise="central")


@pytest.mark.parametrize("kind", ["fedavg", "fedprox", "scaffold", "fedadam", "fedyogi", "fednova"])
def test_releases_by_fit_alone_go_with_record_level_privacy(convex, kind):
    run = federate(**convex(rounds=2), algorithm=KINDS[kind](), privacy=RECORD)
    assert all(0 < spent.epsilon <= 8.0 for spent in run.info.spent.values())
    assert {release["source"] for release in run.info.releases} <= {"fit", "derived"}


@pytest.mark.parametrize("kind", ["fsvrg", "dane", "gd", "cocoa"])
def test_releases_that_no_step_of_fit_pays_for_are_refused(convex, kind):
    with pytest.raises(ConfigError, match=f"{kind} also releases .*, read from the records outside fit"):
        federate(**convex(), algorithm=KINDS[kind](), privacy=RECORD)


@pytest.mark.parametrize(
    ("algorithm", "sums"),
    [(FedAvg(), 1), (FedProx(), 1), (FedAdam(), 1), (GD(), 1), (DANE(solver="svrg"), 2), (FSVRG(scaled=False), 2)],
    ids=lambda value: getattr(value, "kind", value),
)
def test_client_level_privacy_charges_each_sum(convex, algorithm, sums):
    run = federate(**convex(rounds=3), algorithm=algorithm, privacy=CLIENT)
    spent = run.info.spent["clients"]
    assert spent.steps == 3 * sums
    assert 38 < spent.epsilon <= 40


@pytest.mark.parametrize("algorithm", [FSVRG(), Scaffold(), FedNova(), CoCoA()], ids=lambda kind: kind.kind)
def test_what_client_level_privacy_cannot_clip_is_refused(convex, algorithm):
    with pytest.raises(ConfigError, match=algorithm.kind):
        federate(**convex(), algorithm=algorithm, privacy=CLIENT)


def _momentum(dataset):
    model = nn.Linear(6, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), DataLoader(dataset, batch_size=8)


def _deep(dataset):
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=8)


def _lbfgs(dataset):
    model = nn.Linear(6, 1)
    return model, torch.optim.LBFGS(model.parameters()), DataLoader(dataset, batch_size=8)


def _summed(model, batch):
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].float())


def _square(model, batch):
    return (model(batch[0])[:, 0] - batch[1]) ** 2


def _detached(model, batch):
    return model(batch[0]).detach()[:, 0] ** 2


@pytest.mark.parametrize(
    ("algorithm", "change", "error", "message"),
    [
        (GD(), {"loss": None}, TaskError, "gd needs the gradients"),
        (GD(), {"loss": _summed}, TaskError, r"loss returned shape \(\)"),
        (GD(), {"loss": lambda model, batch: 3.0}, TaskError, "loss returned float"),
        (GD(), {"loss": _detached}, TaskError, "does not depend on the model"),
        (Scaffold(), {"build": _momentum}, TaskError, "plain SGD"),
        (FedNova(), {"build": _momentum}, TaskError, "plain SGD"),
        (FedNova(max_steps=1), {}, TaskError, "4 steps"),
        (FedProx(), {"build": _lbfgs}, TaskError, "LBFGS"),
        (FSVRG(), {"build": _deep}, TaskError, "linear models"),
        (CoCoA(), {"build": _deep}, TaskError, "linear models"),
        (CoCoA(), {"loss": _square}, TaskError, "not the logistic one"),
        (DANE(), {"build": _deep}, TaskError, "not convex|no minimum"),
        (GD(rate=1e42), {}, DivergedError, "server's step diverged in round 1"),
        (FSVRG(step=1e300), {}, DivergedError, "party 'north' diverged in round 1"),
    ],
)
def test_what_an_algorithm_cannot_do_is_named(convex, algorithm, change, error, message):
    with pytest.raises(error, match=message):
        federate(**convex(**change), algorithm=algorithm)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedProx(mu=-1.0), "mu is -1"),
        (lambda: FedProx(mu=float("nan")), "mu is nan"),
        (lambda: FedAdam(beta2=1.0), "beta2"),
        (lambda: FSVRG(step=0.0), "step is 0"),
        (lambda: FSVRG(mean="all"), "mean is 'all'"),
        (lambda: DANE(solver="magic"), "solver"),
        (lambda: CoCoA(ridge=0.0), "ridge is 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_algorithm_must_be_one(convex):
    with pytest.raises(ConfigError, match="expected an Algorithm, or one of fedavg"):
        federate(**convex(), algorithm=0.5)


def test_the_algorithm_of_the_guide_runs(convex, oracle):
    """The code block of docs/algorithms.md, as it stands there."""
    text = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    imports = "import torch\nfrom dataclasses import dataclass\nfrom choral.trainers.algorithms.interface import *\n"
    names: dict[str, Any] = {"__name__": __name__}
    exec(imports + code, names)  # noqa: S102
    run = federate(**convex(rounds=1), algorithm=names["Signs"]())
    step = sum(np.sign(oracle.gradient(name, oracle.start)) for name in oracle.data) / len(oracle.data)
    flat = torch.cat([tensor.reshape(-1) for tensor in run.state.values()])
    assert np.abs(flat.numpy() - (oracle.start - 0.01 * step)).max() < 1e-6


def test_fednova_of_many_equal_steps_is_fedavg_to_the_rounding_of_one_update(convex):
    """A change per step would be off by 4,000 roundings, 8e-5 at most."""
    draw = torch.Generator().manual_seed(5)
    parties = {
        name: TensorDataset(torch.randn(40, 6, generator=draw), torch.randint(2, (40,), generator=draw))
        for name in ("ant", "bee")
    }

    def build(dataset):
        model = nn.Linear(6, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(dataset, batch_size=40)

    def fit(model, optimizer, loader):
        (points, labels) = next(iter(loader))
        weight, bias = model.parameters()
        with torch.no_grad():  # the slope by hand: autograd would take most of the time
            for _ in range(4000):
                wrong = torch.sigmoid(torch.addmv(bias, points, weight[0])) - labels
                weight.grad, bias.grad = (wrong @ points)[None] / len(points), wrong.mean()[None]
                optimizer.step()

    job = convex(build=build, fit=fit, parties=parties, rounds=1)
    one, other = (federate(**job, algorithm=kind) for kind in (FedAvg(), FedNova(max_steps=4096)))
    assert (one.state["weight"] - other.state["weight"]).abs().max() < 3e-6
    near = federate(**job, algorithm=FedNova(max_steps=4096, reference=4000))
    assert (one.state["weight"] - near.state["weight"]).abs().max() < 5e-7
