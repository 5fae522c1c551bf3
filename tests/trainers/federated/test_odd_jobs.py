"""Jobs on which a faster engine would silently compute something else than the user's loop, if it did not look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

from choral.trainers import Epochs
from choral.trainers.algorithms.interface import Done, Train
from choral.trainers.engines import Cohort, Direct, Fastest
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.task.arithmetic import Arithmetic

CPU = Arithmetic(torch.device("cpu"))

SIZES = [23, 10, 9, 42, 7, 23]
Job = Callable[[Any], tuple[nn.Module, torch.optim.Optimizer, Any]]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.2} | options))


def shuffled(dataset: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **({"batch_size": 10, "shuffle": True} | options))


def job_of(model: Callable[[], nn.Module], **options: Any) -> Job:
    def build(dataset: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        made = model()
        return made, sgd(made, **options), shuffled(dataset)

    return build


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.back.weight = self.there.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.back(torch.tanh(self.there(inputs)))


class Unused(nn.Module):
    """One layer has no gradient: SGD does not decay its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.used(inputs)
        return outputs


class Centred(nn.Module):
    """A record's output depends on the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(inputs) * len(inputs)
        return outputs - outputs.mean(0)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Unstackable(nn.Module):
    """Leaves torch for a moment, which fails within vmap with an error that does not speak of vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.layer.weight.detach().numpy().size != 18 or inputs.dim() != 2 or inputs.data_ptr() == 0:
            raise ValueError("not a batch")
        outputs: torch.Tensor = self.layer(inputs)
        return outputs


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def with_masked_gradient() -> nn.Module:
    model = mlp()
    model[0].weight.register_hook(lambda slope: slope * torch.tensor([1.0, 0, 1, 0, 1, 0]))
    return model


def with_clipped_gradient() -> nn.Module:
    model = mlp()

    def clip(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.clamp_(-0.01, 0.01)

    model[0].weight.register_post_accumulate_grad_hook(clip)
    return model


def with_hook_on_the_whole() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    model.register_forward_hook(lambda module, inputs, outputs: 3 * outputs)
    return model


def with_masked_slope_of_a_linear_model() -> nn.Module:
    model = nn.Linear(6, 3)
    model.weight.register_hook(lambda slope: 0 * slope)
    return model


def with_backward_hook() -> nn.Module:
    model = nn.Linear(6, 3)
    model.register_full_backward_pre_hook(lambda module, slopes: (2 * slopes[0],))
    return model


def with_forward_of_its_own() -> nn.Module:
    model = nn.Linear(6, 3)
    model.forward = lambda inputs: 3 * F.linear(inputs, model.weight, model.bias)  # type: ignore[method-assign]
    return model


def transposed() -> nn.Module:
    model = nn.Linear(6, 3)
    model.weight = nn.Parameter(model.weight.detach().T.contiguous().T)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied weights": Tied,
    "a layer without gradient": Unused,
    "outputs that depend on the batch": Centred,
    "a subclass of Linear": lambda: Doubled(6, 3),
    "not for vmap": Unstackable,
    "frozen weights": frozen,
    "a hook on a gradient": with_masked_gradient,
    "a hook after a gradient": with_clipped_gradient,
    "a hook on a linear model": with_hook_on_the_whole,
    "a hook on the gradient of a linear model": with_masked_slope_of_a_linear_model,
    "a backward hook on a linear model": with_backward_hook,
    "a forward of its own": with_forward_of_its_own,
    "weights that are not contiguous": transposed,
    "parametrized weights": lambda: parametrizations.weight_norm(nn.Linear(6, 3)),
}


def results(build: Job, fit: Any, engine: Any, make: Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]) -> Any:
    generator = torch.Generator().manual_seed(5)
    parties = {f"party-{k}": TensorDataset(*make(n, generator)) for k, n in enumerate(SIZES)}
    resident = Resident(build=build, fit=fit, datasets=parties, privacy_engines={}, seed=3, arithmetic=CPU)
    trainer = engine(resident)
    weights = resident.layout.read() + 0.05 * torch.linspace(-1, 1, resident.length)
    return trainer, dict(trainer.do([(party, Train()) for party in parties], weights, 2))


def classes(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def check(build: Job, make: Any = classes, fit: Epochs | None = None) -> dict[str, Any]:
    """Compare all engines with the user's loop; return them."""
    fit = fit or Epochs(epochs=2)
    _, expected = results(build, lambda m, o, x: fit(m, o, x), lambda resident: resident, make)
    trainers = {}
    for engine in (Direct, Cohort, Fastest):
        trainers[engine.__name__], found = results(build, fit, engine, make)
        for party, done in found.items():
            wanted: Done = expected[party]
            torch.testing.assert_close(done.vector, wanted.vector, rtol=1e-5, atol=3e-6, msg=f"{engine} {party}")
            assert (done.steps, done.path) == (wanted.steps, wanted.path)
    return trainers


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=["plain", "decaying"])
@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, options: dict[str, Any]) -> None:
    check(job_of(MODELS[model], **options))


@pytest.mark.parametrize("model", ["a layer without gradient", "frozen weights", "tied weights"])
def test_corrections_of_models(model: str) -> None:
    build = job_of(MODELS[model], weight_decay=0.1)
    work = Train(pull=0.3)
    found = []
    for fit, engine in ((lambda m, o, x: Epochs()(m, o, x), lambda r: r), (Epochs(), Direct), (Epochs(), Cohort)):
        generator = torch.Generator().manual_seed(5)
        parties = {f"party-{k}": TensorDataset(*classes(n, generator)) for k, n in enumerate(SIZES)}
        resident = Resident(
            build=build,
            fit=fit,
            datasets=parties,
            privacy_engines={},
            seed=3,
            arithmetic=CPU,
        )
        weights = resident.layout.read()
        done = engine(resident).do([(party, work) for party in parties], weights, 2)
        found.append(torch.stack([result.vector for _, result in done]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=3e-6)


def test_double_precision() -> None:
    def doubles(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = classes(n, generator)
        return inputs.double(), targets

    check(job_of(lambda: mlp().double()), doubles)
    check(job_of(lambda: nn.Linear(6, 3).double()), doubles)


@pytest.mark.parametrize("sparse", [False, True])
def test_numbers_of_words(sparse: bool) -> None:
    def words(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(9, (n, 4), generator=generator), torch.randint(3, (n,), generator=generator)

    check(
        job_of(lambda: nn.Sequential(nn.Embedding(9, 5, padding_idx=0, sparse=sparse), nn.Flatten(), nn.Linear(20, 3))),
        words,
    )


def test_columns_of_a_transposed_table() -> None:
    def columns(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(6, n, generator=generator).T, torch.randint(3, (n,), generator=generator)

    check(job_of(lambda: nn.Linear(6, 3)), columns)
    check(job_of(mlp), columns)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_class_numbers_of_another_type(kind: torch.dtype) -> None:
    def small(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = classes(n, generator)
        return inputs, targets.to(kind)

    check(job_of(lambda: nn.Linear(6, 3)), small)


def weighted(outputs: torch.Tensor, targets: torch.Tensor, /, *, reduction: str) -> torch.Tensor:
    """A mean that is not the mean of its terms."""
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 0.2]), reduction=reduction)


def ignoring(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = classes(n, generator)
    return inputs, targets.where(torch.arange(n) % 3 > 0, -100)


def test_weights_of_classes() -> None:
    check(job_of(mlp), fit=Epochs(criterion=weighted, epochs=2))


@pytest.mark.parametrize("model", [mlp, lambda: nn.Linear(6, 3)])
def test_labels_to_be_ignored(model: Callable[[], nn.Module]) -> None:
    check(job_of(model), ignoring)


def test_no_stack_is_padded_for_nothing() -> None:
    """The usual job is still stacked, unequal parties and all."""
    trainers = check(job_of(mlp))
    assert trainers["Cohort"].stackable
    assert trainers["Cohort"].pads


class Backwards(RandomSampler):
    def __iter__(self) -> Iterator[int]:
        return reversed(range(len(self.data_source)))


def test_samplers() -> None:
    def part(dataset: Any) -> Any:
        model = mlp()
        loader = DataLoader(dataset, batch_size=10, sampler=SequentialSampler(range(5)))
        return model, sgd(model), loader

    def backwards(dataset: Any) -> Any:
        model = mlp()
        return model, sgd(model), DataLoader(dataset, batch_size=4, sampler=Backwards(dataset))

    check(part)
    check(backwards)


def test_optimizers_with_hooks_or_steps_of_their_own() -> None:
    def halving(dataset: Any) -> Any:
        model = mlp()
        optimizer = sgd(model)

        def halve(stepped: torch.optim.Optimizer, *_: Any) -> None:
            for group in stepped.param_groups:
                for parameter in group["params"]:
                    parameter.data /= 2

        optimizer.register_step_post_hook(halve)
        return model, optimizer, shuffled(dataset)

    def clipping(dataset: Any) -> Any:
        model = mlp()
        optimizer = sgd(model)
        step = optimizer.step

        def clipped(closure: Any = None) -> Any:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 0.01)
            return step(closure)

        optimizer.step = clipped  # type: ignore[method-assign]
        return model, optimizer, shuffled(dataset)

    for build in (halving, clipping):
        check(build)


def test_several_groups() -> None:
    def build(dataset: Any) -> Any:
        model = mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
        return model, torch.optim.SGD(groups, lr=0.3), shuffled(dataset)

    check(build)


@pytest.mark.parametrize("options", [{"batch_size": 100}, {"batch_size": 7, "drop_last": True}, {"batch_size": 1}])
def test_batches(options: dict[str, Any]) -> None:
    def build(dataset: Any) -> Any:
        model = mlp()
        return model, sgd(model), shuffled(dataset, **options)

    check(build)
