"""What `Layout` sees of a model in one walk, where five walks saw it before, and that a vector of weights is a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from choral.trainers.task.flat_vector import Layout


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def _swap_data(model: nn.Sequential) -> None:
    model[2].weight.data = torch.zeros(5, 4)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "another parameter of the same shape": lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach())),
    "a frozen one that is another": lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach(), False)),
    "a shape": _swap_data,
    "what is trained": lambda m: m[2].weight.requires_grad_(False),
    "what is trained, too": lambda m: m[0].bias.requires_grad_(True),
    "a parameter more": lambda m: m[1].register_parameter("more", nn.Parameter(torch.zeros(1))),
    "a parameter less": lambda m: m[2].register_parameter("bias", None),
    "a buffer more": lambda m: m[1][0].register_buffer("more", torch.zeros(1)),
    "a buffer less": lambda m: m[1][1]._buffers.pop("running_mean"),
    "a layer more": lambda m: m[1].append(nn.Linear(4, 4)),
    "another layer": lambda m: m[1].__setitem__(0, nn.ReLU()),
    "a name in its place": lambda m: setattr(m[1], "_modules", {f"_{n}": c for n, c in m[1]._modules.items()}),
    "a name": lambda m: m[1]._modules.update(zero=m[1]._modules.pop("0")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_is_put_into_a_models_place_is_seen(change: Callable[[nn.Sequential], object]) -> None:
    model = _model()
    layout = Layout(model)
    model(torch.ones(5, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert layout.unchanged(model)
    change(model)
    assert not layout.unchanged(model)


def test_another_model_is_not_the_one_that_the_layout_is_of() -> None:
    assert not Layout(_model()).unchanged(_model())


class _KeepsOneStill(nn.Linear):
    def train(self, mode: bool = True) -> _KeepsOneStill:
        super().train(mode)
        self.asked = getattr(self, "asked", 0) + 1
        return self


def test_all_of_a_model_is_in_training_afterwards_and_a_method_of_its_own_is_called_each_time() -> None:
    model = _model()
    layout = Layout(model)
    model[1][1].eval()
    layout.begin_training(model)
    assert all(module.training for module in model.modules())
    model[1][0] = nn.ReLU().eval()  # not known to the layout
    layout.begin_training(model)
    assert all(module.training for module in model.modules())

    own = nn.Sequential(_KeepsOneStill(2, 2))
    for _ in range(3):
        Layout(own).begin_training(own)
    assert own[0].asked == 3
    patched, asked = nn.Sequential(nn.Linear(2, 2)), []
    layout = Layout(patched)
    patched[0].train = lambda mode=True: asked.append(mode)
    layout.begin_training(patched)
    assert asked == [True]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_read_as_a_copy_and_written_whatever_the_vector_holds_by_then(
    layers: int, kind: torch.dtype
) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers))).to(kind)
    layout = Layout(model)
    before = layout.read()
    kept = before.clone()
    assert (before.dtype, before.shape, before.requires_grad) == (torch.float32, (9 * layers,), False)
    given = torch.arange(9.0 * layers)
    layout.write(given)
    assert torch.equal(before, kept)
    assert torch.equal(layout.read(), given)
    given += 1  # the same vector, whose views are kept
    layout.write(given)
    assert torch.equal(layout.read(), given)
    layout.write(kept)
    assert torch.equal(layout.read(), kept)
