"""Encoding with a share of noise: norms, means, variances under dropouts, wrapping, and an attack on neighbours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import beta

from choral.errors import ConfigError
from choral.privacy.accounting import client_level
from choral.privacy.client_level import client_noise_shares
from choral.privacy.client_level.central import CentralScheme
from choral.privacy.client_level.client_noise_shares import DistributedScheme, design
from choral.privacy.errors import EncodingError
from choral.privacy.noise.gaussian import os_stream

ALARM = 1e-7  # false alarms of each statistical test here
MECHANISMS = ["discrete_gaussian", "skellam"]
SEED = bytes(range(32))


def scheme(mechanism: Any = "discrete_gaussian", **changes: Any) -> DistributedScheme:
    given: dict[str, Any] = {"bits": 16, "length": 100, "clients": 20, "holders": 12, "ratio": 1.0}
    return design(mechanism=mechanism, **(given | changes))


def vectors(count: int, length: int, norm: float = 3.0) -> np.ndarray:
    drawn = np.random.default_rng(count).standard_normal((count, length))
    return norm * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.parametrize("bits", [8, 12, 16, 20])
@pytest.mark.parametrize("length", [1, 7, 100, 5000])
def test_integers_are_never_longer_than_the_sensitivity(bits: int, length: int) -> None:
    made = scheme(bits=bits, length=length, ratio=3.0, mechanism="skellam")
    signs = made.signs(SEED)
    inputs = [
        *vectors(5, length),
        *vectors(5, length, 0.3),
        np.zeros(length),
        np.eye(1, length)[0],
        np.full(length, 1e30),
    ]
    for vector in inputs:
        integers = made.encode(vector, 1.0, signs, os_stream, noisy=False)
        assert integers.dtype == np.int64
        assert int((integers.astype(object) ** 2).sum()) <= made.sensitivity_squared
        assert np.abs(integers).max() <= made.bound
    zero = made.encode(np.zeros(length), 1.0, signs, os_stream, noisy=False)
    assert not zero.any(), "zeroing out a client must send zeros, or neighbours are further apart"


def test_rounding_is_tried_again_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adversarial source always rounds up: after 20 tries the vector is rounded towards zero, within the norm."""
    made, calls = scheme(bits=8, length=4096, ratio=10.0, mechanism="skellam"), []

    def up(count: int) -> bytes:
        calls.append(count)
        return b"\xff" * count

    vector, signs = vectors(1, 4096)[0], made.signs(SEED)
    integers = made.encode(vector, 1.0, signs, up, noisy=False)
    assert len(calls) == client_noise_shares.TRIES
    assert (integers**2).sum() <= made.sensitivity_squared
    # Without the condition these integers would be far longer than what is paid for.
    out = np.empty(made.padded, np.int64)
    longest = client_noise_shares._round_at_random(np.full(4096, 1e-3), 1.0, up, out)
    assert longest > made.sensitivity_squared


def test_rounding_towards_zero_is_within_the_norm_where_every_coordinate_is_whole() -> None:
    """As long as the clipping norm allows, and along the diagonal, where rounding up lengthens most."""
    made = scheme(bits=20, length=64, ratio=0.1)
    factor = made.scale
    integers = made._round(np.full(64, 1.0 / 8.0), factor, lambda count: b"\xff" * count)
    assert (integers == math.floor(factor / 8.0 * (1.0 - 2.0**-10))).all()
    assert (integers**2).sum() <= made.sensitivity_squared


def test_rounding_keeps_the_mean() -> None:
    made = scheme(bits=12, length=64, ratio=1.0, mechanism="skellam")
    vector, signs = vectors(1, 64, 0.9)[0], made.signs(SEED)
    draws = np.array([made.encode(vector, 1.0, signs, os_stream, noisy=False) for _ in range(4000)])
    exact = client_noise_shares.rotate(vector, signs) * made.scale
    spread = np.maximum(draws.std(0), 0.05) / math.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - exact) / spread).max() < stats.norm.isf(ALARM / 128)
    assert set(np.unique(draws - np.floor(exact))) <= {0.0, 1.0}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_sum_decodes_to_the_sum_of_clipped_vectors(mechanism: str) -> None:
    made = scheme(mechanism, bits=20, length=300, ratio=0.05)
    signs, inputs = made.signs(SEED), vectors(20, 300, 5.0)
    inputs[3] *= 0.01  # shorter than the clip: kept
    total = sum(made.encode(vector, 2.0, signs, os_stream) for vector in inputs)
    clipped = inputs * np.minimum(1.0, 2.0 / np.linalg.norm(inputs, axis=1, keepdims=True))
    noise = 2.0 * 0.05 * math.sqrt(20 / 12)
    assert np.abs(made.decode(total, 2.0, signs) - clipped.sum(0)).max() < 6 * noise


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("lost", [0, 2, 8])
def test_the_sum_has_the_promised_variance_under_dropouts(mechanism: str, lost: int) -> None:
    """0, 10 and 40 % of 20 clients drop out; noise is sized for the 12 that are left at worst."""
    made = scheme(mechanism, bits=16, length=4096, ratio=2.0)
    signs = made.signs(SEED)
    survivors = 20 - lost
    total = sum(made.encode(np.zeros(4096), 1.0, signs, os_stream) for _ in range(survivors))
    noise = made.decode(total, 1.0, signs)
    expected = survivors / 12 * 2.0**2
    ratio = float((noise**2).sum()) / expected
    assert ALARM < stats.chi2.cdf(ratio, 4096) < 1 - ALARM
    promised = stats.chi2.ppf(ALARM, 4096) / 4096 * 2.0**2
    assert noise.var() > promised
    if lost == 8:  # the version that is sized for all 20 is caught: it has 0.6 of the variance
        naive = scheme(mechanism, bits=16, length=4096, ratio=2.0, holders=20)
        total = sum(naive.encode(np.zeros(4096), 1.0, signs, os_stream) for _ in range(survivors))
        assert naive.decode(total, 1.0, signs).var() < promised


def test_sums_wrap_rarely_and_reducing_twice_changes_nothing() -> None:
    made = scheme(bits=12, length=4096, clients=50, holders=50, ratio=1.0)
    signs = made.signs(SEED)
    same = vectors(1, 4096, 1.0)[0]  # all clients alike: the worst case
    total = sum(made.encode(same, 1.0, signs, os_stream) for _ in range(50))
    half = 1 << 11
    reduced = (total + half) % (2 * half) - half
    assert np.array_equal(made.decode(total, 1.0, signs), made.decode(reduced, 1.0, signs))
    assert (reduced != total).mean() < 1e-3  # 4 deviations: 6e-5 for a Gaussian


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("cheat", [1.0, 0.5], ids=["as promised", "half the noise"])
def test_distinguisher(mechanism: str, cheat: float) -> None:
    """The best test on neighbours: is one client's vector in the sum, or zeros? See test_distinguisher.py.

    At 20,000 trials the promised noise passes, and half of it is caught, by far more than five standard deviations.
    """
    trials, delta, length = 20_000, 0.02, 2
    honest = scheme(mechanism, bits=20, length=length, clients=4, holders=2, ratio=1.2)
    promised = client_level.epsilon([honest.release(2)], delta)
    made = replace(honest, share_variance=honest.share_variance * int(cheat * 4) ** 2 / 16)
    signs, vector = made.signs(SEED), np.array([1e3, 1e3])
    direction = honest.encode(vector, 1.0, signs, os_stream, noisy=False)
    noise = [made.noise.draw(trials * length, os_stream).reshape(trials, length) for _ in range(4)]
    without = (noise[0] + noise[1]) @ direction / honest.scale**2
    with_it = (noise[2] + noise[3] + direction) @ direction / honest.scale**2
    best = 0.0
    for cut in np.linspace(-1, 5, 40):
        hits, alarms = int((with_it > cut).sum()), int((without > cut).sum())
        true = beta.ppf(5e-7, max(hits, 1e-9), trials - hits + 1)
        false = beta.ppf(1 - 5e-7, alarms + 1, max(trials - alarms, 1e-9))
        if true > delta:
            best = max(best, math.log((true - delta) / false))
    assert (best > promised) == (cheat < 1.0), (best, promised)


def test_neighbouring_sums_through_the_whole_encoding_are_as_far_apart_as_the_distinguisher_assumes() -> None:
    made = scheme(bits=20, length=2, clients=4, holders=2, ratio=1.2)
    signs, vector = made.signs(SEED), np.array([1e3, 1e3])
    moved = [
        made.encode(vector, 1.0, signs, os_stream).astype(float) + made.encode(vector * 0, 1.0, signs, os_stream)
        for _ in range(3000)
    ]
    direction = made.encode(vector, 1.0, signs, os_stream, noisy=False)
    deviation = math.sqrt(2 * made.share_variance)
    assert np.abs((np.mean(moved, 0) - direction) / deviation).max() < 5.5 / math.sqrt(3000)
    assert np.std(moved, axis=0) == pytest.approx(deviation, rel=0.08)


def test_tensors_are_encoded_like_arrays() -> None:
    made = scheme(length=100)
    vector, signs = vectors(1, 100)[0], made.signs(SEED)

    def fixed(count: int) -> bytes:
        return b"\x80" * count

    as_tensor = made.encode(torch.from_numpy(vector), 1.0, torch.from_numpy(signs).double(), fixed, noisy=False)
    assert np.array_equal(as_tensor, made.encode(vector, 1.0, signs, fixed, noisy=False))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bits": 4, "clients": 100}, "at least 6 bits"),
        ({"bits": 6, "clients": 100, "holders": 50}, "expected at least 2"),
        ({"bits": 3}, "4 to 24"),
        ({"bits": 25}, "4 to 24"),
        ({"bits": True}, "4 to 24"),
        ({"ratio": 0.0}, "> 0"),
        ({"ratio": math.nan}, "> 0"),
        ({"holders": 0}, "1 to clients"),
        ({"holders": 21}, "1 to clients"),
        ({"length": 0}, ">= 1"),
    ],
    ids=str,
)
def test_settings_out_of_range(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scheme(**changes)
    assert complaint in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("made", [scheme(), CentralScheme(length=100, ratio=1.0)], ids=["distributed", "central"])
def test_vectors_that_are_refused(made: Any) -> None:
    signs = made.signs(SEED)
    for bad in (np.full(100, math.nan), np.full(100, math.inf), np.zeros(99), np.zeros((10, 10)), np.zeros(100, int)):
        with pytest.raises(EncodingError):
            made.encode(bad, 1.0, signs, os_stream)
    for clip in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="clipping norm"):
            made.encode(np.zeros(100), clip, signs, os_stream)
    assert np.isfinite(made.encode(np.full(100, 1e300), 1.0, signs, os_stream)).all()  # long, but it can be clipped


def test_central_noise_is_what_it_says_and_rounding_shortens() -> None:
    made = CentralScheme(length=5000, ratio=0.7)
    for vector in vectors(5, 5000, 9.0):
        integers = made.encode(vector, 2.0, None, os_stream)
        assert np.linalg.norm(integers * made.grid) <= 1.0
        assert np.abs(integers * made.grid * 2.0 - vector * 2 / 9).max() <= 2 * made.grid
    noise = made.decode(np.zeros(5000, np.int64), 2.0, None, os_stream)
    deviation = 2.0 * 0.7 * (1 + made.grid * math.sqrt(5000))
    assert ALARM < stats.chi2.cdf(float((noise**2).sum()) / deviation**2, 5000) < 1 - ALARM
    with pytest.raises(ConfigError):
        CentralScheme(length=5, ratio=0.0)
