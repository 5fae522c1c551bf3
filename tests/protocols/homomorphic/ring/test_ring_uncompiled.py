"""The compiled kernels as plain Python, where an index out of range is an error, against torch's: bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from choral.protocols.homomorphic.ring import gaussian, kernels_numba
from choral.protocols.homomorphic.ring.arithmetic import GROUP, REDUCE, largest_primes, ring
from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels
from choral.protocols.homomorphic.split.parameters import Digit

DEGREE = 256  # one stage more than are taken without a reduction
PRIMES = (*largest_primes(26, DEGREE, 2), *largest_primes(20, DEGREE, 1))
TORCH = TorchKernels()


@pytest.fixture
def python(uncompiled: Callable[[ModuleType], ModuleType]) -> Any:
    module = uncompiled(kernels_numba)
    assert not hasattr(module._encrypt, "py_func")  # a function, and not numba's dispatcher of one
    assert hasattr(kernels_numba._encrypt, "py_func")
    return module.NumbaKernels()


def rows(generator: Any, size: int) -> Any:
    return np.array([generator.integers(0, prime, size) for prime in PRIMES], np.int32)


@pytest.mark.parametrize("lanes", [1, 3])
def test_rings(python: Any, lanes: int) -> None:
    assert DEGREE.bit_length() - 1 > REDUCE
    generator = np.random.default_rng(lanes)
    r, size, primes = ring(DEGREE, PRIMES), DEGREE * lanes, np.array(PRIMES)[:, None]
    polynomial = generator.integers(-(2**52) + 1, 2**52, DEGREE).astype(np.float64)
    key = python.transform(r, polynomial)
    assert np.array_equal(key % primes, TORCH.transform(r, polynomial) % primes)
    given: dict[str, Any] = {
        "digits": generator.integers(-(2**52) + 1, 2**52, (7, size)).astype(np.float64),
        "scales": np.array([generator.integers(-(p // 2), p // 2 + 1, 7) for p in PRIMES], np.float64),
        "errors": generator.integers(-84, 85, size).astype(np.int8),
        "public": rows(generator, size),
        "key": key,
    }
    encrypted = python.encrypt(r, **given, lanes=lanes)
    assert np.array_equal(encrypted, TORCH.encrypt(r, **given, lanes=lanes))
    opened = python.remove(r, encrypted, given["public"], key, lanes=lanes)
    assert np.array_equal(opened, TORCH.remove(r, encrypted, given["public"], key, lanes=lanes))


@pytest.mark.parametrize("size", [1, 255, 257, 600])
def test_magnitudes(python: Any, size: int) -> None:
    words = np.random.default_rng(size).integers(0, 1 << 64, size, dtype=np.uint64)
    words[-1] = gaussian._KERNEL[3] << 1 | 1
    for found, wanted in zip(
        python.magnitudes(words, gaussian._KERNEL), TORCH.magnitudes(words, gaussian._KERNEL), strict=True
    ):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("bits", [20, 26])
def test_packing(python: Any, bits: int) -> None:
    """Of two groups: with the last bit string of the last group, beyond whose end nothing may be touched."""
    residues = np.random.default_rng(bits).integers(0, 1 << bits, 2 * GROUP).astype(np.int32)
    residues[-64:] = (1 << bits) - 1
    body = python.pack(residues, bits)
    assert body == TORCH.pack(residues, bits)
    sums = np.full(residues.size, 5, np.uint32)
    python.add(np.frombuffer(body, "<u4").astype(np.uint32), bits, sums)
    assert np.array_equal(sums, residues.astype(np.uint32) + np.uint32(5))


def test_limbs(python: Any) -> None:
    """Of more coefficients than lie in one chunk, the last chunk not full."""
    r, residues = ring(DEGREE, PRIMES), rows(np.random.default_rng(3), 300)
    for offset in (0, r.modulus // 2, r.modulus - 1):
        assert np.array_equal(python.limbs(r, residues, offset), TORCH.limbs(r, residues, offset))


def test_digits(python: Any) -> None:
    generator = np.random.default_rng(4)
    values = generator.integers(-(1 << 13), 1 << 13, 250)
    layout = (Digit(first=0, count=2), Digit(first=2, count=1))
    assert np.array_equal(python.digits(values, 100, layout, 20), TORCH.digits(values, 100, layout, 20))
    long = generator.integers(-(1 << 62), 1 << 62, 30)
    halves = (Digit(first=0, half="low"), Digit(first=0, half="high"))
    assert np.array_equal(python.digits(long, 40, halves, 64), TORCH.digits(long, 40, halves, 64))


def test_rejection(python: Any) -> None:
    words = np.random.default_rng(5).integers(0, 1 << 32, 500, dtype=np.uint64).astype(np.uint32)
    words[:2] = PRIMES[0], PRIMES[0] - 1
    for count in (200, 500):
        found, wanted = python.accept(words, PRIMES[0], count), TORCH.accept(words, PRIMES[0], count)
        assert (found is None) == (wanted is None) == (count == 500)
        assert wanted is None or np.array_equal(found, wanted)
