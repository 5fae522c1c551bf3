"""bf16 and compiled training: what is computed in which precision, equal results, what is refused, and copies ahead."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Masked, Privacy
from choral.errors import ConfigError
from choral.privacy import PrivacyError
from choral.trainers import FSVRG, GD, Epochs, Run, TaskError
from choral.trainers.centralized.data_parallel import BatchShares, Workers
from choral.trainers.engines import Cohort, Direct, Fastest, fastest
from choral.trainers.local_steps.logistic_regression import ClosedForm
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.device_batches import ahead, mapped, reads_ahead, tensors_of

BOTH = pytest.mark.parametrize("trainer", [federate, centralize])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRIVACY = Privacy(epsilon=50.0, delta=1e-3)


def apart(first: Run, second: Run) -> float:
    return max(float((first.state[name] - second.state[name]).abs().max()) for name in first.state)


@BOTH
def test_bf16_is_of_the_model_and_of_nothing_else(job, trainer):
    seen, within = set(), []

    class Model(nn.Linear):
        def forward(self, batch):
            outputs = super().forward(batch)
            within.append((outputs.dtype, self.training and torch.is_grad_enabled()))
            return outputs

    def build(dataset):
        model = Model(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    def fit(model, optimizer, loader):
        for batch, target in loader:
            optimizer.zero_grad()
            outputs = model(batch)
            nn.functional.cross_entropy(outputs, target).backward()
            seen.add((outputs.dtype, model.weight.dtype, model.weight.grad.dtype, torch.is_autocast_enabled("cpu")))
            optimizer.step()

    def evaluate(model):
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, 5))
        return 0.0

    reduced = trainer(**job(build=build, fit=fit, evaluate=evaluate), precision="bf16")
    assert seen == {(torch.float32, torch.float32, torch.float32, False)}
    assert set(within) == {(torch.bfloat16, True), (torch.float32, False)}  # in training, in evaluation
    assert (reduced.info.precision, reduced.info.compile) == ("bf16", False)
    assert all(tensor.dtype == torch.float32 for tensor in reduced.state.values())
    exact = trainer(**job(build=build, fit=fit, evaluate=evaluate))
    assert exact.info.precision == "float32"
    assert 0 < apart(reduced, exact) < 0.02  # 2^-8 is the resolution of bfloat16


@pytest.mark.parametrize("engine", [None, Direct, Cohort, Fastest])
@pytest.mark.parametrize("wide", [False, True])
def test_every_engine_computes_in_bf16(job, engine, wide):
    """Also for one linear layer, whose gradient `Direct` would write down in float32."""

    def build(dataset):
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)) if wide else nn.Linear(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    own = job(build=build, fit=lambda model, optimizer, loader: Epochs()(model, optimizer, loader))
    exact, expected = federate(**own), federate(**own, precision="bf16")
    found = federate(**job(build=build, fit=Epochs()), precision="bf16", engine=engine)
    assert apart(exact, expected) > 1e-4
    assert 1e-5 < apart(found, exact) < 0.02  # engines in float32 are within 1e-6
    assert apart(found, expected) < (1e-7 if engine is Direct else 0.005)  # stacks round each gradient otherwise


def test_the_written_down_trainer_refuses(job):
    def build(dataset):
        model = nn.Linear(5, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    with pytest.raises(ConfigError, match="calls no model"):
        federate(**job(build=build), precision="bf16", engine=ClosedForm.of(rate=0.2, batch_size=10))


@BOTH
def test_record_level_privacy_in_bf16(job, trainer):
    """The checks of the first batches pass, since they are of float32, and later batches are reduced."""
    seen = []

    class Layer(nn.Linear):  # known by its class alone, so its gradients are made by torch.func
        def forward(self, batch):
            outputs = super().forward(batch)
            seen.append(outputs.dtype)
            return outputs

    def build(dataset):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Layer(8, 2))
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    run = trainer(**job(build=build), privacy=PRIVACY, precision="bf16")
    assert run.finished
    assert seen.count(torch.bfloat16) > run.spent.steps / 2  # one call a step; the checks, in float32, are many more
    assert 0 < run.spent.epsilon <= 50.0


def test_client_level_privacy_and_secure_sums_in_bf16(job):
    privacy = ClientPrivacy(epsilon=50.0, delta=1e-3, noise="central")
    assert federate(**job(), privacy=privacy, precision="bf16").finished
    assert federate(**job(), secure_sum=Masked(), precision="bf16").finished


@BOTH
def test_what_does_not_go_together_is_refused(job, trainer, tmp_path):
    for more, message in [
        ({"precision": "fp16"}, "expected precision 'float32' or 'bf16', got 'fp16'"),
        ({"compile": True, "privacy": PRIVACY}, "compile with record-level privacy"),
    ]:
        with pytest.raises(ConfigError, match=message):
            trainer(**job(), **more, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", [GD(rate=0.1), FSVRG(step=0.1)])
@pytest.mark.parametrize(("more", "name"), [({"precision": "bf16"}, "precision"), ({"compile": True}, "compile")])
def test_algorithms_that_read_gradients_of_records_refuse(job, algorithm, more, name):
    with pytest.raises(ConfigError, match=f"^{name} with an algorithm that reads gradients"):
        federate(**job(loss=Epochs().loss), algorithm=algorithm, **more)


@BOTH
def test_another_precision_is_another_run(job, trainer, tmp_path):
    trainer(**job(), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="precision was float32, now it is bf16"):
        trainer(**job(), precision="bf16", out=tmp_path / "run", resume=True)
    assert Run.load(tmp_path / "run").info.precision == "float32"


@BOTH
def test_a_run_in_bf16_is_resumed_in_bf16(job, trainer, tmp_path):
    whole = trainer(**job(), precision="bf16")

    def stops(entry):
        if entry.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(**job(), precision="bf16", out=tmp_path / "run", on_round=stops)
    resumed = trainer(**job(), precision="bf16", out=tmp_path / "run", resume=True)
    assert resumed.info.precision == Run.load(tmp_path / "run").info.precision == "bf16"
    assert apart(resumed, whole) == 0


def test_a_fit_that_goes_past_the_model_is_refused(job):
    def fit(model, optimizer, loader):
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(nn.functional.linear(batch, model.weight, model.bias), target).backward()
            optimizer.step()

    assert federate(**job(fit=fit)).finished
    with pytest.raises(TaskError, match="never called the model"):
        federate(**job(fit=fit), precision="bf16")


def test_a_model_whose_forward_was_replaced_is_refused(job):
    def build(dataset):
        model, optimizer, loader = job()["build"](dataset)
        model.forward = MethodType(lambda self, batch: nn.functional.linear(batch, self.weight), model)
        return model, optimizer, loader

    with pytest.raises(TaskError, match="was replaced by another"):
        federate(**job(build=build), precision="bf16")


def test_a_deep_copy_made_in_fit_computes_with_its_own_weights():
    arithmetic, model, batch = Arithmetic(CPU, "bf16"), nn.Linear(5, 2), torch.randn(3, 5)
    with arithmetic.over(model, "north"):
        other = copy.deepcopy(model)
        before = model(batch)
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(other(batch), other.bias.bfloat16().float().expand(3, -1))
        assert torch.equal(model(batch), before)
    assert "forward" not in vars(model)
    assert model(batch).dtype == torch.float32


def test_outputs_keep_their_kind():
    class Named(OrderedDict):
        pass

    number, kept = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    made = Arithmetic(CPU, "bf16").returned(Named(logits=number, more=(kept, [number], None)))
    assert type(made) is Named
    assert [tensor.dtype for tensor in tensors_of(made)] == [torch.float32, torch.int64, torch.float32]
    assert made["more"][2] is None


def test_a_device_without_bf16_is_named(monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    with pytest.raises(ConfigError, match="device cpu has no bfloat16"):
        Arithmetic(CPU, "bf16")


def test_without_a_compiler_there_is_one_clear_error(tmp_path):
    program = (
        "import torch\nfrom choral.errors import ConfigError\nfrom choral.trainers.task.arithmetic import Arithmetic\n"
        "try:\n    Arithmetic(torch.device('cpu'), compile=True)\nexcept ConfigError as error:\n"
        "    print(error, '|', error.hint, '|', error.__suppress_context__)\n"
    )
    bare = {"PATH": str(tmp_path), "CXX": str(tmp_path / "no-such-compiler"), "OMP_NUM_THREADS": "1"}
    bare |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.compile does not work here (")
    assert "install a C++ compiler" in done.stdout
    assert done.stdout.endswith("True\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it loads its compiler
def test_fastest_tries_what_is_compiled_and_what_is_not(monkeypatch):
    """And takes a compiled model only where it was faster, the time of compiling left out."""
    made = {"first goes": 0}

    def seconds(trainer, orders, weights, number, *, twice):
        made["first goes"] += twice
        return {True: 3.0, False: 1.0}[getattr(trainer, "_arithmetic", Arithmetic(CPU)).compile] + isinstance(
            trainer, Cohort
        )

    monkeypatch.setattr(fastest, "_seconds", seconds)
    monkeypatch.setattr("choral.trainers.task.arithmetic._probe_compiler", lambda kind: None)

    def build(dataset):
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    data = {name: TensorDataset(torch.randn(20, 5), torch.arange(20) % 2) for name in ("north", "south")}
    arithmetic = Arithmetic(CPU, compile=True)
    resident = Resident(build=build, fit=Epochs(), datasets=data, privacy_engines={}, seed=0, arithmetic=arithmetic)
    trainer = Fastest(resident)
    orders = [(name, fastest_work()) for name in data]
    assert len(list(trainer.do(orders, resident.layout.read(), 1))) == 2
    assert isinstance(trainer.chosen, Direct)
    assert trainer.chosen._arithmetic.compile is False
    assert made["first goes"] == 3


def fastest_work() -> Any:
    from choral.trainers.algorithms.interface import Train

    return Train()


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")), reason="no C++ compiler here"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@BOTH
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_compiled_training_equals_plain(job, trainer, precision):
    called = []

    class Model(nn.Linear):
        def forward(self, batch):
            if not torch.compiler.is_compiling():
                called.append(self.training and torch.is_grad_enabled())
            return super().forward(batch)

    def build(dataset):
        model = Model(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    def evaluate(model):
        model.eval()
        return float(model(torch.ones(1, 5)).sum())

    run = trainer(**job(build=build, evaluate=evaluate), precision=precision, compile=True)
    assert not any(called)  # no step of training outside what was compiled
    assert run.info.compile
    plain = trainer(**job(build=build, evaluate=evaluate), precision=precision)
    assert any(called)
    assert apart(run, plain) < (1e-5 if precision == "float32" else 0.01)


def test_reading_ahead_is_for_torchs_own_loader_on_cuda_alone(parties):
    loader = DataLoader(parties["north"], batch_size=10)
    assert reads_ahead(loader, CUDA)
    assert not reads_ahead(loader, CPU)
    assert not reads_ahead(loader, torch.device("mps"))
    model = nn.Linear(5, 2)
    private = PRIVACY.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)[2]
    assert isinstance(private, DataLoader)
    assert not reads_ahead(private, CUDA)
    assert not reads_ahead(BatchShares(loader, Workers(0, 2)), CUDA)
    assert not reads_ahead([1, 2], CUDA)


def test_a_private_loader_read_ahead_would_count_wrongly(parties):
    """Why it is not: its optimizer is told of a batch's records before that is shown, and finds those of another."""
    model = nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = PRIVACY.wrap(model, optimizer, DataLoader(parties["north"], batch_size=10))
    with pytest.raises(PrivacyError):
        Epochs()(model, optimizer, ahead(loader, lambda batch: lambda: batch))


def test_ahead_starts_the_next_copy_before_it_gives_a_batch():
    told: list[str] = []

    def read() -> Iterator[int]:
        for number in range(3):
            told.append(f"read {number}")
            yield number

    def start(number: int) -> Any:
        told.append(f"start {number}")
        return lambda: told.append(f"wait {number}") or number

    got = []
    for number in ahead(read(), start):
        told.append(f"train {number}")
        got.append(number)
    assert got == [0, 1, 2]
    assert told == [
        *("read 0", "start 0", "read 1", "start 1", "wait 0", "train 0"),
        *("read 2", "start 2", "wait 1", "train 1", "wait 2", "train 2"),
    ]
    assert list(ahead([], start)) == []


def test_nested_batches_keep_their_shape():
    batch = {"x": torch.ones(2), "more": (torch.zeros(1), ["text", torch.ones(3)])}
    doubled = mapped(batch, lambda tensor: tensor * 2)
    assert doubled["more"][1][0] == "text"
    assert [float(tensor.sum()) for tensor in tensors_of(doubled)] == [4.0, 0.0, 6.0]
    assert float(batch["x"].sum()) == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between streams need a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_on_cuda_the_batches_arrive_whole_and_in_order(job, precision):
    def fit(model, optimizer, loader):
        for batch, target in loader:
            assert batch.is_cuda
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    def evaluate(model):
        return float(sum(parameter.sum() for parameter in model.parameters()))

    here = federate(**job(fit=fit_anywhere, evaluate=evaluate), precision=precision)
    there = federate(**job(fit=fit, evaluate=evaluate), precision=precision, device="cuda")
    assert max(float((here.state[n] - there.state[n].cpu()).abs().max()) for n in here.state) < 0.02


def fit_anywhere(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    Epochs()(model, optimizer, loader)
