"""Which models are refused, by what name, and that the rest get the gradients autograd gives."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn

from choral.privacy import UnsupportedModelError, unwrap
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.noise.gaussian import os_stream
from choral.privacy.per_sample.model import with_per_sample_gradients


def one_step(model: nn.Module, x: torch.Tensor, loss: Any = None) -> None:
    """One private step on records x, first dimension the batch."""
    private = with_per_sample_gradients(model)
    optimizer = PrivateOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        private,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(x),
        source=os_stream,
    )
    optimizer.expect(len(x))
    out = private(x)
    (loss(out) if loss else out.square().flatten(1).mean(1).mean()).backward()
    optimizer.step()


class Apply(nn.Module):
    """A module from a function of itself and its input, so that each case fits a few lines."""

    def __init__(self, forward: Any, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


tokens = torch.arange(12).reshape(4, 3) % 5


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6).eval()])
def test_batchnorm_is_refused_even_in_eval_or_without_weights(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 1 is a BatchNorm1d") as caught:
        with_per_sample_gradients(nn.Sequential(nn.Linear(6, 6), layer))
    assert "GroupNorm" in caught.value.hint
    assert "accuracy" in caught.value.hint


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.LSTM(6, 6), nn.GRU(6, 6), nn.RNN(6, 6), nn.MultiheadAttention(6, 2)),
        *(nn.LSTMCell(6, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6)),
    ],
)
def test_layers_without_per_sample_gradients_are_refused_with_a_replacement(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=f"layer 0 is a {type(layer).__name__}") as caught:
        with_per_sample_gradients(nn.Sequential(layer))
    assert "replace_layers(model)" in caught.value.hint


def test_running_statistics_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="running statistics"):
        with_per_sample_gradients(nn.Sequential(nn.InstanceNorm1d(6, track_running_stats=True), nn.Linear(6, 2)))


def test_buffers_that_follow_the_data_are_refused() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.mean += 0.1 * x.detach().mean(0)
            return x

    with pytest.raises(UnsupportedModelError, match=r"buffer 0\.mean"):
        one_step(nn.Sequential(Mean(), nn.Linear(6, 2)), torch.randn(4, 6))


def test_trainable_layer_with_buffers_is_refused() -> None:
    layer = nn.Linear(3, 3)
    layer.register_buffer("seen", torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match="buffers"):
        with_per_sample_gradients(nn.Sequential(layer))


def test_no_trainable_parameter_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no trainable parameter"):
        with_per_sample_gradients(nn.Sequential(nn.Flatten()))
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module"):
        with_per_sample_gradients(lambda x: x)  # type: ignore[arg-type]


def test_bare_parameter_beside_layers_is_named() -> None:
    """A class token or a learned position: functorch takes the whole module, and the check holds it to autograd."""
    model = Apply(lambda m, x: m.head(x * m.scale), scale=nn.Parameter(torch.ones(6)), head=nn.Linear(6, 2))
    one_step(model, torch.randn(4, 6))


def test_wrong_per_sample_gradients_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule for a layer that returns something of the right shape and the wrong value."""
    from opacus.grad_sample import GradSampleModule

    rules = dict(GradSampleModule.GRAD_SAMPLERS)
    right = rules[nn.Linear]
    rules[nn.Linear] = lambda m, a, b: {p: (2 * g if p is m.bias else g) for p, g in right(m, a, b).items()}
    monkeypatch.setattr(GradSampleModule, "GRAD_SAMPLERS", rules)
    with pytest.raises(UnsupportedModelError, match=r"parameter 0\.bias: its per-sample gradients do not average"):
        one_step(nn.Sequential(nn.Linear(6, 2)), torch.randn(4, 6))


def test_layer_that_mixes_records_is_refused() -> None:
    model = Apply(lambda m, x: m.head(x - x.mean(0)), head=nn.Linear(6, 2))
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        one_step(model, torch.randn(4, 6))


def centred_in_training(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(x - x.mean(0) if m.training else x)


def with_random_depth(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Random in a way that torch's generator does not repeat."""
    h = torch.tanh(m.body(x)) * random.random()
    return m.head(h - h.mean(0))


def cumulative(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(torch.cumsum(x, 0))  # record i depends on those before it alone


def of_detached_statistics(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(x / x.detach().abs().amax(0))  # no gradient passes


def of_a_neighbour(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(x + 0.1 * x[torch.arange(len(x)) ^ 1] if len(x) % 2 == 0 else x)  # within pairs


def attends_over_the_batch(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.body(x)
    return m.head(torch.softmax(h @ h.T, -1) @ h)


@pytest.mark.parametrize("rows", [2, 3, 4, 40])
@pytest.mark.parametrize("answer", ["tensor", "dict", "tuple"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "forward",
    [
        centred_in_training,
        with_random_depth,
        cumulative,
        of_detached_statistics,
        of_a_neighbour,
        attends_over_the_batch,
    ],
)
def test_mixing_is_found_in_training_mode(forward: Any, dropout: float, answer: str, rows: int) -> None:
    """Whatever the answer looks like, with dropout, and from two records on."""
    if forward is of_a_neighbour and rows == 3:
        return
    model = Apply(
        lambda m, x: {"tensor": lambda y: y, "dict": lambda y: {"logits": y}, "tuple": lambda y: (y, None)}[answer](
            m.drop(forward(m, x))
        ),
        body=nn.Linear(6, 6),
        head=nn.Linear(6, 40),
        drop=nn.Dropout(dropout),
    )
    private = with_per_sample_gradients(model)
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        private(torch.rand(rows, 6, generator=torch.Generator().manual_seed(3)) + 0.1)
    assert not private.unmixed


def test_mixing_of_tokens_is_found() -> None:
    model = Apply(lambda m, t: m.head(m.embed(t) - m.embed(t).mean(0)), embed=nn.Embedding(5, 6), head=nn.Linear(6, 5))
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        one_step(model, tokens)


def test_mixing_before_a_head_that_is_still_zero_is_found() -> None:
    model = Apply(lambda m, x: m.head(m.body(x) - m.body(x).mean(0)), body=nn.Linear(6, 6), head=nn.Linear(6, 2))
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        one_step(model, torch.randn(4, 6))


def test_models_that_answer_in_mappings_and_sequences_pass() -> None:
    for wrap in (lambda y: {"logits": y, "size": 3}, lambda y: (y, [y, None]), lambda y: y.flatten(0, 1)):
        model = Apply(
            lambda m, t, wrap=wrap: wrap(m.drop(m.head(m.embed(t)))),
            embed=nn.Embedding(5, 6),
            head=nn.Linear(6, 5),
            drop=nn.Dropout(0.5),
        )
        private = with_per_sample_gradients(model)
        private.begin(len(tokens))
        private(tokens)
        assert private.unmixed


def test_a_model_that_returns_its_loss_alone_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="one row for each of the 4 records") as caught:
        one_step(Apply(lambda m, x: m.head(x).square().mean(), head=nn.Linear(6, 2)), torch.randn(4, 6), lambda y: y)
    assert "outside the model" in caught.value.hint


def test_a_batch_of_one_record_postpones_the_check() -> None:
    model = Apply(centred_in_training, head=nn.Linear(6, 2))
    one_step(model, torch.randn(1, 6))
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        one_step(model, torch.randn(2, 6))


def test_a_model_whose_forward_was_not_called_is_refused(problem: Any) -> None:
    """The wrapper's forward is what finds mixing; the plain model and its layers are not looked at."""
    plain = problem.model()
    private = with_per_sample_gradients(plain)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(plain.parameters(), lr=0.1),
        private,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
        source=os_stream,
    )
    optimizer.expect(4)
    plain(problem.x[:4]).square().mean(1).mean().backward()
    with pytest.raises(UnsupportedModelError, match="it was not seen whether"):
        optimizer.step()


def test_the_mixing_check_leaves_gradients_and_random_numbers_alone() -> None:
    def gradients(unmixed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, 2))
        private = with_per_sample_gradients(model)
        private.unmixed = unmixed
        private(torch.randn(5, 6)).square().mean(1).mean().backward()
        return [private.per_sample(p) for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def summed(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(x), y, reduction="sum")


def weighted(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(x), y, weight=torch.tensor([1.0, 2.0, 3.0]))


def over_kept_labels(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(x), y, ignore_index=1)


def contrastive(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = m(x)
    return nn.functional.cross_entropy(h @ h.T, torch.arange(len(x)))


def mean(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(x), y)


def weighted_by_record(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (nn.functional.cross_entropy(m(x), y, reduction="none") * torch.tensor([1.0, 2.0, 3.0])[y]).mean()


def noisy(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(x + torch.randn_like(x)), y)


@pytest.mark.parametrize("rows", [2, 3, 8, 33])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("loss", [summed, weighted, over_kept_labels, contrastive, mean, weighted_by_record, noisy])
def test_a_loss_can_be_checked_to_be_a_mean_over_records(loss: Any, dropout: float, rows: int) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
    private = with_per_sample_gradients(model)
    batch = torch.randn(rows, 6), torch.arange(rows) % 3
    private.drawn = rows
    if loss in (mean, weighted_by_record, noisy):
        private.check_step(lambda b: loss(private, *b), batch)
        assert not private.unmixed  # the model is called, and will be looked at by itself
        assert all(m.training for m in model.modules())
        loss(private, *batch).backward()  # as if nothing had been
        assert len(private.per_sample(model[0].weight)) == rows
    else:
        with pytest.raises(UnsupportedModelError, match="not the mean over its records"):
            private.check_step(lambda b: loss(private, *b), batch)
        assert not private.unmixed


def test_a_checked_step_may_use_the_models_parts(problem: Any) -> None:
    model = problem.model()
    private, optimizer, loader = problem.wrapped(model=model)

    def step(batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model[2](torch.relu(model[0](x))), y)

    for batch in loader:
        private.check_step(step, batch)
        step(batch).backward()
        optimizer.step()


@pytest.mark.parametrize("layer", [nn.Embedding(5, 6, sparse=True), nn.EmbeddingBag(5, 6, sparse=True)])
def test_sparse_gradients_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="sparse gradients") as caught:
        with_per_sample_gradients(nn.Sequential(layer))
    assert "sparse=False" in caught.value.hint


def test_parameter_used_outside_its_layer_is_named() -> None:
    model = Apply(
        lambda m, x: nn.functional.linear(m.first(x), m.second.weight), first=nn.Linear(6, 6), second=nn.Linear(6, 2)
    )
    with pytest.raises(UnsupportedModelError, match=r"second\.weight received no per-sample gradient"):
        one_step(model, torch.randn(4, 6))


def test_tied_weights_through_layers_are_right_and_through_functions_are_refused() -> None:
    embed, head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
    head.weight = embed.weight
    one_step(Apply(lambda m, t: m.head(m.embed(t)), embed=embed, head=head), tokens)  # held to autograd
    model = Apply(lambda m, t: m.embed(t) @ m.embed.weight.T, embed=nn.Embedding(5, 6))
    with pytest.raises(UnsupportedModelError, match=r"embed\.weight: its per-sample gradients do not average"):
        one_step(model, tokens)


def test_unused_parameter_is_named_and_frozen_ones_are_fine() -> None:
    model = Apply(lambda m, x: m.used(x), used=nn.Linear(6, 2), spare=nn.Linear(6, 2))
    with pytest.raises(UnsupportedModelError, match=r"spare\.weight received no"):
        one_step(model, torch.randn(4, 6))
    model = Apply(lambda m, x: m.head(m.body(x)), body=nn.Linear(6, 6).requires_grad_(False), head=nn.Linear(6, 2))
    one_step(model, torch.randn(4, 6))


def test_eval_mode_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 2)).eval()
    with pytest.raises(UnsupportedModelError, match="eval mode") as caught:
        one_step(model, torch.randn(4, 6))
    assert "model.train()" in caught.value.hint


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)),
        nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3)
        ),
        nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Dropout(0.5), nn.Linear(64, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.PReLU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Flatten(2), Apply(lambda m, x: m.rnn(x)[0], rnn=DPLSTM(64, 5, batch_first=True))),
        Apply(
            lambda m, x: m.a(*[x.flatten(2).expand(-1, 3, -1)] * 3)[0], a=DPMultiheadAttention(64, 4, batch_first=True)
        ),
    ],
    ids=["cnn", "strided cnn", "layernorm dropout", "prelu", "lstm", "attention"],
)
def test_ordinary_models_pass_the_first_batch_check(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.randn(2, 1, 8, 8))  # materialises lazy layers
    one_step(model, torch.randn(5, 1, 8, 8))


def test_siamese_calls_add_up_per_record() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    private = with_per_sample_gradients(model)
    a, b = torch.randn(5, 6), torch.randn(5, 6)
    private.forget()
    (private(a) - private(b)).square().sum(1).mean().backward()
    for i in range(5):
        alone = torch.autograd.grad(
            (model.eval()(a[i : i + 1]) - model(b[i : i + 1])).square().sum(), list(model.parameters())
        )
        for p, g in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(private.per_sample(p)[i], g)


def test_wrapper_is_reused_and_can_be_removed() -> None:
    model = nn.Sequential(nn.Linear(6, 2))
    private = with_per_sample_gradients(model)
    assert with_per_sample_gradients(model) is private is with_per_sample_gradients(private)
    assert list(private.state_dict()) == ["0.weight", "0.bias"] == list(model.state_dict())
    assert unwrap(private) is model is unwrap(model)
    assert not model[0]._forward_hooks
    assert not hasattr(model[0].weight, "grad_sample")
    assert with_per_sample_gradients(model) is not private


def test_attributes_and_methods_of_the_model_still_work() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.width = nn.Linear(6, 2), 7

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encode(x)

    private = with_per_sample_gradients(Net())
    assert private.width == 7
    assert private.encode(torch.randn(3, 6)).shape == (3, 2)
    with pytest.raises(AttributeError, match="missing"):
        _ = private.missing


def test_copy_of_a_wrapped_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 2))
    with_per_sample_gradients(model)
    with pytest.raises(UnsupportedModelError, match="copy of a wrapped model"):
        with_per_sample_gradients(copy.deepcopy(model))


def test_copy_whose_forward_trains_the_original_is_refused() -> None:
    """A forward that closes over its own layers: the copy's parameters never get a gradient."""
    head = nn.Linear(6, 2)
    original = Apply(lambda _, x: head(x), head=head)
    with pytest.raises(UnsupportedModelError, match=r"is not a parameter of the wrapped model"):
        one_step(copy.deepcopy(original), torch.randn(4, 6))


def test_data_parallel_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        with_per_sample_gradients(nn.DataParallel(nn.Linear(6, 2)))
