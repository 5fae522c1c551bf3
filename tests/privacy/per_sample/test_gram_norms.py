"""Norms from Gram matrices of float32 products, and which way of a convolution is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from choral.privacy.full_precision import exact_float32
from choral.privacy.per_sample import convolution_gradients, ghost_norms, layer_gradients


def outer_of(a: torch.Tensor, g: torch.Tensor) -> ghost_norms.Outer:
    return ghost_norms.Outer(
        lambda part: (a[part], g[part]), len(a), (a.shape[1], a.shape[2], g.shape[2]), float(len(a))
    )


@pytest.mark.parametrize("positions", [2, 32, 64, 66])
def test_norms_from_gram_matrices_are_bounds_and_close(positions: int) -> None:
    """Of float32 products up to 64 positions: above the true norms, by less than 6e-4 however positions are added."""
    torch.manual_seed(4)
    a, g = torch.randn(3, positions, 600), torch.randn(3, positions, 500)
    a[1] = a[1, :1]  # the same at all positions
    g[1] = g[1, :1]
    a[2], g[2] = 1e-18 * a[2], 1e-18 * g[2]
    outer = outer_of(a, g)
    assert outer.by_grams
    over = outer.norms() / (3 * torch.bmm(g.double().mT, a.double()).flatten(1)).norm(dim=1) - 1.0
    assert bool((over[:2] > -1e-9).all())
    assert bool((over[:2] < (6e-4 if positions <= 64 else 1e-9)).all())
    assert float(over[2]) > -1e-9


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_norms_are_of_wide_products_where_torch_was_told_to_round_float32(precision: str) -> None:
    """Rounded to bfloat16, as some processors do then, a norm may be 2^-8 too small, and the released row too long."""
    a, g = torch.randn(3, 8, 40), torch.randn(3, 8, 50)
    wide = torch.bmm(a.double(), a.double().mT)
    product = torch.bmm(g.double().mT, a.double()).flatten(1)
    bound = 8 * 2.0**-24 * (a.norm(dim=2) * g.norm(dim=2)).sum(1).double()
    assert not torch.equal(ghost_norms.gram(a), wide)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert not exact_float32(a.device)
        assert not exact_float32(torch.device("cuda"))
        assert torch.equal(ghost_norms.gram(a), wide)
        found = ghost_norms._product_norms(a, g)
        assert torch.equal(found, ghost_norms.norms(product) + bound)
    finally:
        torch.set_float32_matmul_precision(before)
    assert exact_float32(a.device)
    assert exact_float32(torch.device("cuda"))
    assert not exact_float32(torch.device("mps"))
    assert not torch.equal(ghost_norms._product_norms(a, g), found)


def test_a_driver_that_rounds_float32_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert not exact_float32(torch.device("cuda"))


def test_images_of_few_positions_have_gram_matrices_of_pixels() -> None:
    torch.manual_seed(5)
    layer = nn.Conv2d(10, 30, 3, padding=1, stride=(1, 2), dilation=(2, 1))
    a = torch.randn(4, 10, 5, 6)
    got = convolution_gradients._pixel_grams(layer, convolution_gradients._padded(layer, a))
    rows = convolution_gradients._unfolded(layer, convolution_gradients._padded(layer, a), 1).double()
    torch.testing.assert_close(got, rows @ rows.mT, rtol=1e-5, atol=1e-4)


def test_a_kind_of_convolution_is_made_as_it_is_cheapest() -> None:
    def kind(layer: Any, *shape: int) -> Any:
        a = torch.randn(16, *shape)
        return layer_gradients.per_sample(layer, a, layer(a).detach(), ("weight",))["weight"]

    grouped: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        honest = convolution_gradients._grouped
        patch.setattr(convolution_gradients, "_grouped", lambda *given: grouped.append(1) or honest(*given))
        assert type(kind(nn.Conv2d(16, 16, 3, padding=1), 16, 8, 8)) is ghost_norms.Joined
        assert grouped == [1]
        assert type(kind(nn.Conv2d(3, 16, 3, padding=1), 3, 8, 8)) is ghost_norms.Dense  # too few channels
        few = kind(nn.Conv2d(256, 256, 3, padding=1), 256, 4, 4)
        assert grouped == [1]
    assert type(few) is ghost_norms.Outer
    assert few.grams is not None
