"""Sums of floats in CKKS: the stated error against measured ones, and against its own model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tenseal.sealapi as sealapi

from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.shared.ckks import CkksPlan, choose
from choral.protocols.homomorphic.shared.seal import RingKey, SealRing

SEED = bytes(range(32))
CASES = [(2, 1.0, 1e-6), (10, 1.0, 1e-6), (10, 8.0, 1e-3), (40, 0.01, 1e-9), (3, 1e6, 1e-2), (30, 1.0, 1e-10)]


def summed(plan: CkksPlan, vectors: Any) -> Any:
    ring = SealRing(plan.parameters)
    key = RingKey.from_seed(ring, SEED)
    encryptor, total = key.encryptor(), None
    for vector in vectors:
        body = ring.dump_fresh(encryptor.encrypt_symmetric(plan.encode(ring, vector)))
        assert len(body) == plan.parameters.seeded_bytes
        one = ring.load_fresh(body)
        if total is None:
            total = one
        else:
            ring.evaluator.add_inplace(total, one)
    plain = sealapi.Plaintext()
    key.decryptor().decrypt(ring.load_sum(ring.dump_sum(total)), plain)
    return plan.decode(ring, plain, vectors[0].size)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "extreme", "alike", "short"])
def test_the_error_is_within_its_bound(case: tuple[int, float, float], kind: str) -> None:
    parties, bound, precision = case
    plan = choose(parties, bound, 10_000, precision)
    assert 0 < plan.error_bound <= precision
    rng = np.random.default_rng(1)
    length = plan.block if kind != "short" else 3
    vectors = [rng.uniform(-bound, bound, length) for _ in range(parties)]
    if kind == "extreme":
        vectors = [np.where(vector > 0, bound, -bound) for vector in vectors]
    if kind == "alike":
        vectors = [np.full(length, bound)] * parties
    exact = np.sum(np.array(vectors, np.longdouble), axis=0)
    assert float(np.abs(summed(plan, vectors) - exact).max()) <= plan.error_bound


def test_the_error_is_as_large_as_its_model_says() -> None:
    """Encryption errors of variance 21/2 and roundings of 1/12 in each of N coefficients, through the cosines: variance
    n (N / 2) (10.5 + 1/12) in units of the scale. 20,480 slots: the sample deviation has a relative one of 1/200, so
    5 % is passed by chance once in 10^22. Without the encryption's part the ratio would be 11, without the cosines'
    1/2 it would be 0.7.
    """
    parties = 4
    plan = choose(parties, 1.0, 10_000, 1e-6)
    rng, errors = np.random.default_rng(2), []
    while sum(map(len, errors)) < 20_480:
        vectors = [rng.uniform(-1, 1, plan.block) for _ in range(parties)]
        errors.append(summed(plan, vectors) - np.sum(vectors, axis=0))
    measured = float(np.concatenate(errors).std()) * 2.0**plan.scale_bits
    model = float(np.sqrt(parties * plan.parameters.degree / 2 * (10.5 + 1 / 12)))
    assert 0.95 < measured / model < 1.05


def test_plans_are_within_the_128_bit_level_and_grow_with_precision() -> None:
    sizes = []
    for precision in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        plan = choose(10, 1.0, 100_000, precision)
        bits = sum(prime.bit_length() for prime in plan.parameters.primes) + plan.parameters.special.bit_length()
        assert bits <= {1024: 27, 2048: 54, 4096: 109}[plan.parameters.degree]
        assert plan.parties * plan.bound * 2.0**plan.scale_bits * 2**7 < plan.parameters.modulus
        sizes.append(plan.bytes_per_value)
    assert sizes == sorted(sizes)
    assert sizes[2] < 57.4 / 4  # of TenSEAL at NVFlare's defaults, for a better precision


@pytest.mark.parametrize(
    ("bound", "precision"),
    [
        (1.0, 1e-15),
        (float("nan"), 1e-3),
        (float("inf"), 1e-3),
        (1.0, float("nan")),
        (-1.0, 1e-3),
        (1.0, 0.0),
        (1e9, 1e-9),
    ],
)
def test_what_no_ring_can_do_is_refused(bound: float, precision: float) -> None:
    with pytest.raises(SpecError):
        choose(10, bound, 100, precision)


def test_the_bound_is_that_of_the_module() -> None:
    """Its parts, computed once more from the docstring: Hoeffding over 2 length tails, and Cauchy-Schwarz."""
    plan = choose(10, 1.0, 100_000, 1e-6)
    n, degree, scale = 10, plan.parameters.degree, 2.0**plan.scale_bits
    tail = 2.0**-64
    encryption = math.sqrt(2 * (10.5 * n * degree / 2) * math.log(2 * 100_000 / tail))
    rounding = n * 0.5 * math.sqrt(degree) * math.sqrt(degree / 2)
    assert plan.error_bound >= (encryption + rounding) / scale
    assert plan.error_bound == pytest.approx((encryption + rounding) / scale, rel=1e-3)
    # two-sided Gaussian quantile of the same variance: the sub-Gaussian bound is above it, and by less than a tenth
    deviation = math.sqrt(10.5 * n * degree / 2)
    quantile = deviation * float(scipy.stats.norm.isf(tail / (2 * 100_000)))
    assert quantile < encryption < 1.1 * quantile
