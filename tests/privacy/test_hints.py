"""What cannot be done with the wrapped three is refused with an error of ours that says what to do instead."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from choral.privacy import PrivacyError, UnsupportedModelError
from choral.privacy.per_sample.model import with_per_sample_gradients
from choral.privacy.record_independence.unsupported_calls import warn_of_clipping


class Apply(nn.Module):
    """A model of some layers and a function."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Own(nn.Module):
    """A module with a parameter of its own and whatever inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(6, 3))

    def forward(self, *given: Any, **named: Any) -> torch.Tensor:
        (x,) = [*given, *named.values()][:1]
        return (x[0] if isinstance(x, tuple) else x) @ self.w


@pytest.mark.parametrize(
    ("model", "why", "what"),
    [
        (Apply(lambda m, x: m.b(x, x), b=nn.Bilinear(6, 6, 3)), "b is a Bilinear", "nn.Linear of the outer product"),
        (Apply(lambda m, x: m.e(x.long().abs()), e=nn.EmbeddingBag(9, 3)), "e is a EmbeddingBag", "nn.Embedding"),
        (Apply(lambda m, x: m.c(x), c=nn.GRUCell(6, 3)), "c is a GRUCell", "replace_layers"),
        (Apply(lambda m, x: m.c(x)[0], c=nn.LSTMCell(6, 3)), "c is a LSTMCell", "replace_layers"),
        (Apply(lambda m, x: m.l(x), l=nn.LazyLinear(3)), "l is a LazyLinear whose parameters have no shape", "Call"),
        (Apply(lambda m, x: m.o(x, 2 * x), o=Own()), r"o \(Own\) .* was given Tensor, Tensor, expected", "one tensor"),
        (Apply(lambda m, x: m.o((x, x)), o=Own()), r"was given tuple, expected one", "one tensor"),
        (Apply(lambda m, x: m.o(x=x), o=Own()), r"was given keyword arguments alone", "one tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_without_gradients_of_records_are_named_with_what_to_use(
    problem: Any, loop: Any, model: nn.Module, why: str, what: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=why) as caught:
        loop(*problem.wrapped(model=model))
    assert what in caught.value.hint


def test_frozen_layers_of_such_kinds_are_kept(problem: Any, loop: Any) -> None:
    model = Apply(lambda m, x: m.head(m.b(x, x)), b=nn.Bilinear(6, 6, 4).requires_grad_(False), head=nn.Linear(4, 3))
    loop(*problem.wrapped(model=model))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("leaf", [False, True])
def test_the_older_kind_of_checkpointing_is_refused_and_the_newer_one_is_kept(
    problem: Any, loop: Any, leaf: bool
) -> None:
    def model(reentrant: bool) -> nn.Module:
        def forward(m: Any, x: torch.Tensor) -> Any:
            return m.head(checkpoint(m.body, x.clone().requires_grad_() if leaf else x, use_reentrant=reentrant))

        return Apply(forward, body=nn.Sequential(nn.Linear(6, 8), nn.Tanh()), head=nn.Linear(8, 3))

    with pytest.raises(UnsupportedModelError, match="use_reentrant=True") as caught:
        loop(*problem.wrapped(model=model(reentrant=True)))
    assert "use_reentrant=False" in caught.value.hint
    loop(*problem.wrapped(model=model(reentrant=False)))


def test_a_layer_that_is_unfrozen_after_wrap_is_named(problem: Any) -> None:
    model = problem.model()
    model[0].requires_grad_(False)
    private, optimizer, loader = problem.wrapped(model=model)

    def steps() -> None:
        for x, y in loader:
            cross_entropy(private(x), y).backward()
            optimizer.step()
            model[0].requires_grad_(True)

    with pytest.raises(UnsupportedModelError, match=r"0\.weight was frozen, with its whole layer") as caught:
        steps()
    assert "unwrap(model)" in caught.value.hint


def test_a_term_of_the_weights_in_the_loss_points_to_weight_decay(problem: Any) -> None:
    def steps(*, at_first: bool) -> None:
        private, optimizer, loader = problem.wrapped()
        for step, (x, y) in enumerate(loader):
            term = sum(p.square().sum() for p in private.parameters())
            (cross_entropy(private(x), y) + (0.01 * term if at_first or step else 0.0)).backward()
            optimizer.step()

    for at_first in (True, False):
        with pytest.raises(UnsupportedModelError) as caught:
            steps(at_first=at_first)
        assert "weight_decay" in caught.value.hint


def test_a_batch_looked_at_before_the_loop_is_said_to_have_been_drawn(problem: Any, loop: Any) -> None:
    wrapped = problem.wrapped(passes=2)
    next(iter(wrapped[2]))
    with pytest.raises(PrivacyError, match="never stepped") as caught:
        loop(*wrapped)
    assert "original loader" in caught.value.hint


def test_clipping_in_the_loop_is_warned_of_once(problem: Any) -> None:
    private, optimizer, loader = problem.wrapped()

    def steps() -> None:
        for x, y in loader:
            cross_entropy(private(x), y).backward()
            nn.utils.clip_grad_norm_(private.parameters(), 1.0)
            optimizer.step()

    with pytest.warns(UserWarning, match="clip_grad_norm_ does nothing") as caught:
        steps()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.wrapped()


@pytest.mark.parametrize(("between", "warned"), [(0, True), (1, True), (2, True), (3, False)])
def test_clipping_is_warned_of_in_the_loop_and_its_two_callers(between: int, warned: bool) -> None:
    def stepped(callers: int) -> bool:
        return stepped(callers - 1) if callers else warn_of_clipping(sys._getframe())

    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)

    def clips() -> bool:
        nn.utils.clip_grad_value_([weight], 1.0)
        return stepped(between - 1) if between else warn_of_clipping(sys._getframe())

    with pytest.warns(UserWarning, match="clip_grad_value_ does") if warned else contextlib.nullcontext():
        assert clips() == warned


def test_what_is_set_on_the_wrapped_model_reaches_the_model(problem: Any) -> None:
    """As schedules of a temperature do, or dropout that is turned off in mid-training."""
    model = Apply(lambda m, x: m.l(x) / m.temperature, l=nn.Linear(6, 3))
    model.temperature, model.batch_first = 1.0, "the model's"
    private = with_per_sample_gradients(model)
    assert model.batch_first == "the model's"  # not the wrapper's
    before = private(problem.x[:4])
    private.temperature = 2.0
    assert model.temperature == private.temperature == 2.0
    torch.testing.assert_close(private(problem.x[:4]), before / 2)
    private.note = "new"
    assert not hasattr(model, "note")


def test_hooks_on_the_private_optimizer_run_at_its_steps(problem: Any, loop: Any) -> None:
    private, optimizer, loader = problem.wrapped()
    heard = []
    optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    loop(private, optimizer, loader)
    assert heard == ["before", "after"] * 10


def test_relative_positions_are_named_and_work_frozen(problem: Any, loop: Any) -> None:
    """As T5's: one bias for each pair of positions, the same for all records, with heads first."""

    def forward(m: Any, t: torch.Tensor) -> Any:
        h = m.embed(t)
        distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
        bias = m.bias(distance).permute(2, 0, 1)[None]
        return m.head((torch.softmax((h @ h.mT)[:, None] + bias, -1) @ h[:, None]).mean((1, 2)))

    def model() -> Any:
        return Apply(forward, embed=nn.Embedding(9, 4), bias=nn.Embedding(6, 2), head=nn.Linear(4, 3))

    problem.dataset = TensorDataset(torch.randint(9, (200, 6)), problem.y)
    with pytest.raises(UnsupportedModelError, match="T5's relative positions") as caught:
        loop(*problem.wrapped(model=model()))
    assert "freeze" in caught.value.hint
    frozen = model()
    frozen.bias.requires_grad_(False)
    loop(*problem.wrapped(model=frozen))
