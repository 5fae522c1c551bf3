"""The rotation against scipy's Hadamard matrices, on numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as matrix

from choral.errors import ConfigError
from choral.privacy.errors import EncodingError
from choral.privacy.noise.rotation import hadamard, padded_length, random_signs, rotate, unrotate

SEED = bytes(range(32))


@pytest.mark.parametrize("bits", range(13))
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_transform_is_scipys_matrix(bits: int, kind: str) -> None:
    x = np.random.default_rng(bits).standard_normal(1 << bits)
    expected = matrix(1 << bits) @ x / 2 ** (bits / 2)
    found = hadamard(x) if kind == "numpy" else hadamard(torch.from_numpy(x)).numpy()
    assert found.dtype == np.float64
    assert np.allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", [1, 2, 3, 31, 1000, 70_001])
def test_rotating_keeps_norms_and_sums_and_can_be_undone(length: int, dtype: Any) -> None:
    x, y = np.random.default_rng(length).standard_normal((2, length)).astype(dtype)
    signs = random_signs(SEED, padded_length(length)).astype(dtype)
    close = 1e-4 if dtype == np.float32 else 1e-10
    assert rotate(x, signs).dtype == dtype
    assert np.linalg.norm(rotate(x, signs)) == pytest.approx(np.linalg.norm(x), rel=1e-5)
    assert np.allclose(rotate(x, signs) + rotate(y, signs), rotate(x + y, signs), atol=close)
    assert np.allclose(unrotate(rotate(x, signs), signs, length), x, atol=close)
    assert torch.allclose(
        rotate(torch.from_numpy(x), torch.from_numpy(signs)), torch.from_numpy(rotate(x, signs)), atol=close
    )


def test_one_large_coordinate_is_spread_evenly() -> None:
    x = np.zeros(1 << 12, np.float32)
    x[17] = 1.0
    assert np.allclose(np.abs(rotate(x, random_signs(SEED, 1 << 12))), 2.0**-6)
    # Without the signs a constant vector would stay in one coordinate; with them it is near its share everywhere.
    even = np.full(1 << 12, 2.0**-6, np.float32)
    assert np.abs(hadamard(even)).max() > 0.99
    assert np.abs(rotate(even, random_signs(SEED, 1 << 12))).max() < 6 * 2.0**-6


def test_signs_are_one_stream_of_the_seed() -> None:
    signs = random_signs(SEED, 100_000)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5.5 / np.sqrt(len(signs))  # false alarm 4e-8, once: the seed is fixed
    assert np.array_equal(signs[:777], random_signs(SEED, 777))
    assert not np.array_equal(signs, random_signs(SEED[::-1], 100_000))


def test_what_is_refused() -> None:
    for bad in (np.zeros(3), np.zeros((2, 2)), np.zeros(4, np.int64), torch.zeros(4, dtype=torch.int64), np.zeros(0)):
        with pytest.raises(EncodingError):
            hadamard(bad)  # type: ignore[type-var]
    with pytest.raises(EncodingError, match="pads to 8"):
        rotate(np.zeros(4), random_signs(SEED, 8))
    with pytest.raises(ConfigError):
        random_signs(b"short", 8)
    with pytest.raises(ConfigError):
        padded_length(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same() -> None:
    x = torch.randn(70_001, dtype=torch.float64)
    signs = torch.from_numpy(random_signs(SEED, 1 << 17)).double()
    assert torch.allclose(rotate(x.cuda(), signs.cuda()).cpu(), rotate(x, signs), atol=1e-10)
