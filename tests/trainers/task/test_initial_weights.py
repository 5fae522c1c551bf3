"""Start from any state dict; train, send and protect only what is trainable."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from flat_arguments import centralize, federate
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from choral import Masked, Privacy, Run, audit
from choral.errors import ConfigError
from choral.trainers import InitialWeightsError, lora
from choral.trainers.task.initial_weights import Weights


@pytest.fixture
def pretrained():
    torch.manual_seed(99)
    return nn.Linear(5, 2).state_dict()


@pytest.mark.parametrize("trainer", [federate, centralize])
@pytest.mark.parametrize("kind", ["mapping", "file"])
def test_round_0_is_the_start(job, pretrained, tmp_path, trainer, kind):
    start = pretrained
    if kind == "file":
        start = tmp_path / "base.safetensors"
        save_file(pretrained, start)
    first = {}

    def evaluate(model):
        first.update({name: tensor.clone() for name, tensor in model.state_dict().items() if name not in first})
        return 1.0

    run = trainer(**job(evaluate=evaluate, rounds=1), initial_weights=start, out=tmp_path / "run")
    assert all(torch.equal(first[name], pretrained[name]) for name in pretrained)
    assert not torch.equal(run.state["weight"], pretrained["weight"])
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["start"]
    assert recorded["bytes"] == 4 * 12
    assert recorded["source"] == ("base.safetensors" if kind == "file" else "mapping")
    if kind == "file":
        assert recorded["sha256"] == hashlib.sha256(start.read_bytes()).hexdigest()


def test_a_mapping_and_its_file_have_one_hash(pretrained, tmp_path):
    save_file(pretrained, tmp_path / "base.safetensors")
    assert Weights.read(pretrained).sha256 == Weights.read(tmp_path / "base.safetensors").sha256
    changed = pretrained | {"bias": pretrained["bias"] + 1e-6}
    assert Weights.read(changed).sha256 != Weights.read(pretrained).sha256


def test_a_run_goes_on_in_another(job, tmp_path):
    """The weights of a run folder are a start like any other, and training from them continues the descent."""
    first = federate(**job(rounds=2), out=tmp_path / "first")
    second = federate(**job(rounds=2), initial_weights=tmp_path / "first" / "model.safetensors")
    assert second.history[0].metrics == first.metrics
    assert not torch.equal(second.state["weight"], first.state["weight"])


def test_another_start_is_refused_on_resume(job, pretrained, tmp_path):
    federate(**job(), initial_weights=pretrained, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"start(\.sha256)? was"):
        federate(**job(), out=tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"start(\.sha256)? was"):
        federate(**job(), initial_weights=pretrained | {"bias": torch.ones(2)}, out=tmp_path / "run", resume=True)
    assert federate(**job(), initial_weights=pretrained, out=tmp_path / "run", resume=True).finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"weight": s["weight"]}, "lacks 'bias'"),
        (lambda s: {}, "lacks 'bias', 'weight'"),
        (lambda s: s | {"head": torch.ones(2)}, "has 'head', which the model lacks"),
        (lambda s: s | {"bias": torch.ones(3)}, r"'bias' has shape \(3,\), expected \(2,\)"),
        (lambda s: s | {"bias": torch.ones(2, 1)}, "shape"),
        (lambda s: s | {"bias": torch.ones(2, dtype=torch.float64)}, "is torch.float64, expected torch.float32"),
        (lambda s: s | {"bias": torch.ones(2, dtype=torch.int64)}, "is torch.int64"),
        (lambda s: s | {"bias": torch.tensor([1.0, float("nan")])}, "'bias' holds NaN"),
        (lambda s: s | {"bias": torch.tensor([1.0, float("inf")])}, "infinite"),
        (lambda s: {"epoch": 3, "model": s}, "expected names to tensors"),
        (lambda s: {3: torch.ones(2)}, "expected names to tensors"),
        (lambda s: [s], "initial_weights is a list"),
        (lambda s: "gone.safetensors", "no such file"),
        (lambda s: "base.pt", "may run code"),
    ],
)
@pytest.mark.parametrize("trainer", [federate, centralize])
def test_other_weights_are_refused(job, pretrained, tmp_path, trainer, change, message):
    with pytest.raises(InitialWeightsError, match=message):
        trainer(**job(), initial_weights=change(dict(pretrained)), out=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b"\xff" * 16, lambda b: b"", lambda b: b[:5]])
def test_damaged_files_are_refused(pretrained, tmp_path, damage):
    path = tmp_path / "base.safetensors"
    save_file(pretrained, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InitialWeightsError, match="damaged"):
        Weights.read(path)


def test_nothing_is_copied_from_weights_that_do_not_fit(pretrained):
    model = nn.Linear(5, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InitialWeightsError):
        Weights.read(pretrained | {"bias": torch.full((2,), float("nan"))}).load_into(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_of_tied_weights_one_name_is_enough_and_both_must_agree():
    given = torch.randn(7, 4)
    model = Tied()
    Weights.read({"head.weight": given}).load_into(model)
    assert torch.equal(model.embed.weight, given)
    assert model.embed.weight is model.head.weight
    Weights.read({"head.weight": given, "embed.weight": given.clone()}).load_into(model)
    with pytest.raises(InitialWeightsError, match="ties them"):
        Weights.read({"head.weight": given, "embed.weight": given + 1}).load_into(model)


def two_layers(frozen: bool):
    def build(dataset):
        model = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 2))
        model[0].requires_grad_(not frozen)
        held = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.SGD(held, lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    return build


def adapted(dataset):
    model = lora(nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 2)), rank=1)
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.SGD(held, lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)


@pytest.fixture
def base():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 2)).state_dict()


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    ("build", "trainable"), [(two_layers(frozen=True), 62), (adapted, 5 + 30 + 30 + 2)], ids=["frozen", "lora"]
)
def test_only_what_trains_is_sent(job, base, tmp_path, build, trainable, private):
    """Vectors of the sum and bytes on the wire shrink with the trainable part; the folder holds the whole model."""
    privacy = Privacy(epsilon=4.0, delta=1e-3) if private else None
    whole = federate(**job(build=two_layers(frozen=False), rounds=1), initial_weights=base, secure_sum=Masked())
    run = federate(
        **job(build=build, rounds=2), initial_weights=base, secure_sum=Masked(), privacy=privacy, out=tmp_path / "run"
    )
    assert whole.info.parameters == 5 * 30 + 30 + 62
    assert run.info.parameters == trainable
    full, part = whole.history[1], run.history[1]
    shrunk = 4 * (whole.info.parameters - trainable)  # at least: int64 mod 2^b travels in 4 bytes or more
    assert full.bytes_up - part.bytes_up >= shrunk
    assert full.bytes_down - part.bytes_down >= shrunk
    state = Run.load(tmp_path / "run").state
    assert state.keys() >= base.keys()
    assert torch.equal(state["0.weight"], base["0.weight"])
    moved = [name for name, tensor in state.items() if name not in base or not torch.equal(tensor, base[name])]
    assert sum(state[name].numel() for name in moved) == trainable
    if private:
        assert all(0 < spent.epsilon <= 4.0 for spent in run.info.spent.values())
        assert audit(tmp_path / "run").verdict == "holds"


def test_the_vector_of_the_sum_is_as_long_as_what_trains(job, base, monkeypatch):
    from choral.protocols.plain import Plain

    opened, real = [], Plain.open
    monkeypatch.setattr(Plain, "open", lambda self, spec: opened.append(spec) or real(self, spec))
    federate(**job(build=two_layers(frozen=True), rounds=1), initial_weights=base)
    federate(**job(build=adapted, rounds=1), initial_weights=base)
    assert [spec.length for spec in opened] == [62 + 1, 67 + 1]


def test_a_start_with_adapters_must_have_them_all(base):
    model = lora(nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 2)), rank=2)
    Weights.read(base).load_into(model)
    assert torch.equal(model[0].weight, base["0.weight"])
    whole = dict(model.state_dict())
    Weights.read(whole).load_into(model)
    del whole["2.lora_b.weight"]
    with pytest.raises(InitialWeightsError, match=r"lacks '2\.lora_b\.weight'"):
        Weights.read(whole).load_into(model)
