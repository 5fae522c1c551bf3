"""Norms and sums made without per-sample gradients, against loops over single records with autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from choral.privacy import PrivacyError, UnsupportedModelError
from choral.privacy.dpsgd import clipped_sum, private_optimizer
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.per_sample import convolution_gradients, ghost_norms, layer_gradients
from choral.privacy.per_sample.model import with_per_sample_gradients


class Apply(nn.Module):
    """A module from a function of itself and its input."""

    def __init__(self, forward: Any, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def per_record(out: torch.Tensor) -> torch.Tensor:
    """A loss for each record, of any output, with gradients that differ by position."""
    flat = out.flatten(1)
    return (flat * torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)).sin().sum(1)


def private_of(model: nn.Module, clip: float, records: int) -> tuple[Any, PrivateOptimizer]:
    private = with_per_sample_gradients(model)
    optimizer = PrivateOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        private,
        noise_multiplier=1.0,
        max_grad_norm=clip,
        expected_batch_size=records,
        source=lambda count: b"\xff" * count,  # noise 0
    )
    return private, optimizer


def stepped(private: Any, optimizer: PrivateOptimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.expect(len(x))
    per_record(private(x)).mean().backward()
    optimizer.step()
    return torch.cat([p.grad.double().reshape(-1) for p in private.parameters() if p.requires_grad])


def by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gradients of single records, shape (records, parameters), float64."""
    model = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    params = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(per_record(model(x[i : i + 1])).sum(), params) for i in range(len(x))]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def images(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(6, *shape)


def tokens() -> torch.Tensor:
    return torch.randint(7, (6, 5))


def tied() -> nn.Module:
    embed, head = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    return Apply(lambda m, t: m.head(m.embed(t)), embed=embed, head=head)


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[4].requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), images(4)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(inplace=True)), images(4)),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)), images(3, 4)),
    "two sequence dimensions": (lambda: nn.Sequential(nn.Linear(4, 3)), images(3, 2, 4)),
    "wide, short": (lambda: nn.Sequential(nn.Linear(40, 50)), images(2, 40)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)),
        images(2, 7, 6),
    ),
    "strides, padding, dilation": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1), bias=False)),
        images(2, 9, 8),
    ),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1)), images(4, 7, 6)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), images(4, 6, 6)),
    "padding by name": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="same")), images(2, 5, 5)),
    **{
        f"padding by {mode}, {dims} dimensions": (
            lambda mode=mode, kind=kind, dims=dims: nn.Sequential(
                kind(4, 2, 3, padding=(2, 1, 2)[:dims], stride=2, groups=2 if dims == 2 else 1, padding_mode=mode)
            ),
            images(4, *(5, 4, 6)[:dims]),
        )
        for mode in ("circular", "reflect", "replicate")
        for dims, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)
    },
    "padding by name on uneven sides": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, (2, 3, 4), padding="same", padding_mode="circular")),
        images(2, 4, 5, 6),
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2), groups=2)),
        images(2, 4, 5, 3),
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.GroupNorm(1, 3)), images(2, 8)),
    "by groups of records": (
        lambda: nn.Sequential(nn.Conv2d(8, 9, 3, stride=2, padding=(2, 1), dilation=(1, 2)), nn.Conv2d(9, 8, 2)),
        images(8, 9, 8),
    ),
    "by groups of records and channels": (
        lambda: nn.Sequential(nn.Conv1d(16, 6, 3, padding=1, groups=2, padding_mode="reflect"), nn.GroupNorm(2, 6)),
        images(16, 7),
    ),
    "few positions": (
        lambda: nn.Sequential(nn.Conv2d(10, 90, 3, padding=1, bias=False)),
        images(10, 4, 4),
    ),
    "few positions, strides": (lambda: nn.Sequential(nn.Conv2d(12, 40, 3, stride=2, padding=1)), images(12, 3, 4)),
    "normalised": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), images(3, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), tokens),
    "padded embedding": (lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=3)), tokens),
    "tied": (tied, tokens),
    "partly frozen": (partly_frozen, images(4)),
    "frozen first": (lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)), images(4)),
    "used twice": (lambda: Apply(lambda m, x: m.f(torch.tanh(m.f(x))), f=nn.Linear(4, 4)), images(3, 4)),
    "siamese": (lambda: Apply(lambda m, x: m.f(x) * m.f(x.flip(1)), f=nn.Linear(4, 3)), images(4)),
    "by functorch": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 2)), images(4)),
}


@pytest.mark.parametrize("way", ["as chosen", "small memory", "small chunks"])
@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_equal_a_loop_over_records(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first step, which torch's gradients accompany, and of later ones, without; clipped, half, and not."""
    if way != "as chosen":
        monkeypatch.setattr(ghost_norms, "_SMALL", 0 if way == "small memory" else 1 << 22)
        monkeypatch.setattr(ghost_norms, "_WORK", 30)  # several chunks
        monkeypatch.setattr(ghost_norms, "_UNFOLDED", 30)
        monkeypatch.setattr(ghost_norms, "_WIDE", 3)
        monkeypatch.setattr(convolution_gradients, "_GROUPED", 2000)
        monkeypatch.setattr(clipped_sum, "_PIECE", 7)
        monkeypatch.setattr(private_optimizer, "_CACHED", 5)
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    rows = by_hand(model, x)
    for clip in (1e-2, float(rows.norm(dim=1).median()), 1e4):
        plain = copy.deepcopy(model)
        private, optimizer = private_of(plain, clip, len(x))
        private.unmixed = clip > 1e-2  # the model was looked at
        want = (rows * (clip / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)).mean(0)
        for _ in range(3):
            got = stepped(private, optimizer, x)
            # 1e-4 for the margin of the clip, 2^-11 C / 6 for the grid of the noise
            assert (got - want).norm() <= 2e-4 * want.norm() + clip * 2**-11 / 6 + 1e-6
        assert private.checked


def outer_of(a: torch.Tensor, g: torch.Tensor) -> ghost_norms.Outer:
    return ghost_norms.Outer(
        lambda part: (a[part], g[part]), len(a), (a.shape[1], a.shape[2], g.shape[2]), float(len(a))
    )


@pytest.mark.parametrize(("positions", "d", "p"), [(1, 30, 20), (3, 60, 50), (40, 8, 6)])
def test_norms_and_sums_need_no_gradients(positions: int, d: int, p: int) -> None:
    """The product of norms, Gram matrices, and products made and dropped; each at the sizes that lead to it."""
    torch.manual_seed(1)
    a, g = torch.randn(9, positions, d), torch.randn(9, positions, p)
    rows = 9 * torch.bmm(g.double().mT, a.double()).flatten(1)
    outer, weights = outer_of(a, g), torch.rand(9, dtype=torch.float64)
    torch.testing.assert_close(outer.norms(), rows.norm(dim=1), rtol=1e-4, atol=0.0)
    assert bool((outer.norms() >= rows.norm(dim=1) * (1 - 1e-6)).all())
    torch.testing.assert_close(outer.weighted_sum(weights), weights @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outer.dense(4).double(), rows[:4], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("positions", "d", "p"), [(4, 60, 50), (60, 20, 10), (40, 1100, 90), (66, 500, 420)])
def test_norms_are_not_too_small_where_positions_cancel(positions: int, d: int, p: int) -> None:
    """Gradients of positions a million times longer than their sum: float32 Gram matrices give a norm of 0 or NaN."""
    torch.manual_seed(2)
    a, g = torch.randn(5, positions, d), torch.randn(5, positions, p)
    a[:, 1::2] = a[:, ::2] * (1 + 2.0**-20)
    g[:, 1::2] = -g[:, ::2]
    rows = 5 * torch.bmm(g.double().mT, a.double()).flatten(1)  # products of 48 bits, differences of 2^-20 of them
    got = outer_of(a, g).norms()
    assert bool((got >= rows.norm(dim=1) * (1 - 1e-6)).all())


def test_gradients_in_several_parts_are_those_of_one() -> None:
    rows, weights = torch.randn(9, 30), torch.rand(9, dtype=torch.float64)
    rows[4, 7] = torch.nan
    gone = torch.arange(9) == 4
    one = ghost_norms.Dense(rows, 3.0).without(gone)
    parts = [ghost_norms.Dense(part, 3.0) for part in torch.split(rows, 4)]
    several = ghost_norms.Joined(parts).without(gone)  # type: ignore[arg-type]
    assert several.records == 9
    torch.testing.assert_close(several.norms(), one.norms(), rtol=0.0, atol=0.0)
    torch.testing.assert_close(several.weighted_sum(weights), one.weighted_sum(weights), rtol=1e-14, atol=1e-14)
    for first in (None, 0, 3, 4, 6, 20):
        assert torch.equal(several.dense(first), one.dense(first))


def test_gradients_nobody_asked_for_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a frozen weight with a trained bias."""
    made: list[int] = []
    monkeypatch.setattr(layer_gradients, "_linear_weight", lambda *_: made.append(1))
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    private, optimizer = private_of(nn.Sequential(layer), 1.0, 6)
    stepped(private, optimizer, torch.randn(6, 4))
    assert not made


def test_the_same_record_weighs_the_same_in_any_batch() -> None:
    """Removing a record moves the sum by its own clipped gradient and nothing else: no float32 sum over records."""
    torch.manual_seed(3)
    a, g = 1e3 * torch.randn(200, 1, 30), torch.randn(200, 1, 20)
    own = torch.bmm(g.double().mT, a.double()).flatten(1)
    weights = 1.0 / own.norm(dim=1)
    for first in range(0, 200, 40):
        whole, rest = (
            ghost_norms.Outer(lambda s, f=f: (a[f:][s], g[f:][s]), 200 - f, (1, 30, 20), 1.0)
            for f in (first, first + 1)
        )
        moved = whole.weighted_sum(weights[first:]) - rest.weighted_sum(weights[first + 1 :])
        assert float((moved - weights[first] * own[first]).norm()) < 1e-12


def test_torch_does_not_make_the_gradients_that_are_thrown_away() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    private, optimizer = private_of(model, 1.0, 6)
    fired: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    counts = []
    for _ in range(2):
        fired.clear()
        stepped(private, optimizer, torch.randn(6, 4))
        counts.append(len(fired))
    assert counts == [4, 0]
    assert all(p.requires_grad for p in model.parameters())


def test_large_layers_keep_factors_and_small_ones_gradients() -> None:
    def kind(d: int, p: int, positions: int, records: int = 64) -> type:
        a, g = torch.zeros(records, positions, d), torch.zeros(records, positions, p)
        return type(layer_gradients.per_sample(nn.Linear(d, p), a, g)["weight"])

    assert kind(64, 64, 64) is ghost_norms.Dense
    assert kind(512, 512, 16) is ghost_norms.Outer  # 16 M numbers against 1 M
    assert kind(64, 64, 8) is ghost_norms.Dense  # faster, and small
    assert kind(64, 64, 8, records=513) is ghost_norms.Outer  # 2.1 M numbers: the smaller
    assert kind(256, 256, 16) is kind(64, 256, 4, records=9) is ghost_norms.Outer  # faster, however small
    assert kind(300, 300, 1000) is ghost_norms.Dense  # 6 M numbers against 38 M
    assert kind(512, 10, 1) is ghost_norms.Outer


def first_checked(model: nn.Module, x: torch.Tensor) -> tuple[Any, PrivateOptimizer]:
    private, optimizer = private_of(model, 1.0, len(x))
    stepped(private, optimizer, x)
    optimizer.expect(len(x))
    return private, optimizer


def test_a_weight_used_beside_its_layer_is_found_at_any_step() -> None:
    model = Apply(lambda m, x: m.f(x) + m.extra * x @ m.f.weight.T, f=nn.Linear(4, 4))
    model.extra = 0
    model.forward = lambda x: model.f(x) if not model.extra else model.f(x) + x @ model.f.weight.T  # type: ignore[method-assign]
    x = torch.randn(6, 4)
    private, optimizer = first_checked(model, x)
    model.extra = 1
    per_record(private(x)).mean().backward()
    with pytest.raises(UnsupportedModelError, match=r"f\.weight received a gradient from outside its own layer"):
        optimizer.step()


def test_inputs_changed_in_place_after_use_are_found() -> None:
    """Torch sees this where it needs the input itself; here it does not any more."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = x * 1.0
        y = m.f(h)
        if m.spoil:
            h.add_(1.0)
        return y

    model = Apply(forward, f=nn.Linear(4, 4), spoil=False)
    x = torch.randn(6, 4)
    private, _ = first_checked(model, x)
    model.spoil = True
    with pytest.raises(UnsupportedModelError, match="input of layer f was changed in place"):
        per_record(private(x)).mean().backward()


def test_gradients_of_gradients_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(6, 4)
    private, _ = first_checked(model, x)
    x.requires_grad_()
    with pytest.raises(UnsupportedModelError, match="create_graph"):
        torch.autograd.grad(private(x).sum(), x, create_graph=True)


def test_a_graph_gone_through_twice_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(6, 4)
    private, optimizer = first_checked(model, x)
    loss = per_record(private(x)).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(Exception, match="two backward passes"):
        optimizer.step()


def test_a_graph_that_was_not_kept_is_refused_the_second_time() -> None:
    """Inputs of layers are let go in the pass, unless the graph is kept; torch itself would allow this sum's."""
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(6, 4)
    private, _ = first_checked(model, x)
    loss = private(x).sum(1).mean()
    loss.backward()
    with pytest.raises(PrivacyError, match="second backward pass"):
        loss.backward()


def test_an_error_in_forward_leaves_parameters_trainable() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(6, 4)
    private, optimizer = first_checked(model, x)
    with pytest.raises(RuntimeError, match="shapes"):
        private(torch.randn(6, 3))
    assert all(p.requires_grad for p in model.parameters())
    per_record(private(x)).mean().backward()
    optimizer.step()


def test_wrong_norms_are_named_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ghost_norms.Outer.norms
    monkeypatch.setattr(ghost_norms.Outer, "norms", lambda self: right(self) / 2)
    private, optimizer = private_of(nn.Sequential(nn.Linear(4, 2)), 1.0, 6)
    with pytest.raises(UnsupportedModelError, match=r"parameter 0\.weight: its per-sample gradients"):
        stepped(private, optimizer, torch.randn(6, 4))


def test_wrong_sums_are_named_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_gradients.convolution_weight
    monkeypatch.setattr(
        layer_gradients, "convolution_weight", lambda layer, a, g, scale: right(layer, a, g.flip(0), scale)
    )
    private, optimizer = private_of(nn.Sequential(nn.Conv2d(1, 2, 2)), 1.0, 6)
    with pytest.raises(UnsupportedModelError, match=r"parameter 0\.weight: its per-sample gradients"):
        stepped(private, optimizer, torch.randn(6, 1, 5, 5))


@pytest.mark.parametrize("layer", [nn.Embedding(5, 6, max_norm=1.0), nn.EmbeddingBag(5, 6, max_norm=1.0)])
def test_tables_that_are_rewritten_by_use_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="max_norm"):
        with_per_sample_gradients(nn.Sequential(layer))
