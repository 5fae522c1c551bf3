"""Fixed point: the error bound is a theorem, and nothing is ever clipped or wrapped."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from choral.errors import ConfigError
from choral.privacy.errors import EncodingError
from choral.privacy.fixed_point import FixedPoint

CODER = FixedPoint(bound=2.0, value_bits=16, max_weight=1000)


@given(
    parties=st.lists(
        st.tuples(st.integers(1, 1000), st.lists(st.floats(-2.0, 2.0), min_size=5, max_size=5)), min_size=1, max_size=8
    ),
    bits=st.integers(2, 48),
)
def test_weighted_mean_is_within_the_error_bound(parties: list[tuple[int, list[float]]], bits: int) -> None:
    codec = FixedPoint(bound=2.0, value_bits=bits, max_weight=1000)
    encoded = [codec.encode(np.array(values), weight) for weight, values in parties]
    assert all(np.abs(e).max() <= codec.integer_bound for e in encoded)
    mean, weight = codec.decode(np.sum(encoded, axis=0))
    exact = [
        math.fsum(w * v[i] for w, v in parties) / sum(w for w, _ in parties) for i in range(5)
    ]  # correctly rounded sums
    assert weight == sum(w for w, _ in parties)
    assert mean.dtype == torch.float64
    assert np.abs(mean.numpy() - exact).max() <= codec.error_bound * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_takes_every_float_type(dtype: torch.dtype) -> None:
    update = torch.tensor([0.5, -2.0, 0.0], dtype=dtype, requires_grad=True)
    encoded = CODER.encode(update, 3)
    assert encoded.dtype == np.int64
    assert encoded.tolist() == [3 * round(0.5 / CODER.step), -3 * 32767, 0, 3]


def test_rounds_half_to_even() -> None:
    codec = FixedPoint(bound=127.0, value_bits=8, max_weight=1)
    assert codec.step == 1.0
    assert codec.encode(np.array([0.5, 1.5, 2.5, -0.5, -1.5]), 1)[:-1].tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 2.0000001, -2.0000001], ids=["nan", "inf", "-inf", "above", "below"]
)
def test_refuses_what_does_not_fit(bad: float) -> None:
    with pytest.raises(EncodingError, match="largest coordinate"):
        CODER.encode(np.array([0.0, bad, 1.0]), 1)


def test_bound_itself_fits() -> None:
    assert np.abs(CODER.encode(np.array([2.0, -2.0]), 1000)).max() == CODER.integer_bound == 1000 * 32767


@pytest.mark.parametrize("weight", [0, -1, 1001, 1.5, True, "3", None])
def test_refuses_a_bad_weight(weight: object) -> None:
    with pytest.raises(EncodingError, match="weight"):
        CODER.encode(np.zeros(3), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("update", [np.zeros((2, 2)), np.zeros(3, dtype=int), torch.zeros(3, dtype=torch.int32)])
def test_refuses_what_is_not_a_float_vector(update: object) -> None:
    with pytest.raises(EncodingError):
        CODER.encode(update, 1)  # type: ignore[arg-type]


def test_decode_refuses_a_sum_that_cannot_be() -> None:
    with pytest.raises(EncodingError, match="total weight"):
        CODER.decode(np.array([0, 0], dtype=np.int64))
    with pytest.raises(EncodingError, match="larger than its weight"):
        CODER.decode(np.array([32768, 1], dtype=np.int64))
    with pytest.raises(EncodingError, match="int64"):
        CODER.decode(np.array([1, 1], dtype=np.int32))  # type: ignore[arg-type]
    with pytest.raises(EncodingError):
        CODER.decode(np.array([np.iinfo(np.int64).min, 1], dtype=np.int64))


@pytest.mark.parametrize("weight", [2, -1, 0, 3001, 2**40])
def test_decode_refuses_a_weight_that_so_many_parties_cannot_have(weight: int) -> None:
    with pytest.raises(EncodingError, match=r"total weight is .*, expected 3 to 3000"):
        CODER.decode(np.array([0, weight]), 3)
    with pytest.raises(EncodingError, match="no mean"):
        CODER.decode(np.array([0, 1]), 0)
    for possible in (3, 3000):
        assert CODER.decode(np.array([0, possible]), 3)[1] == possible


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.dtype(">f8")])
def test_the_update_itself_stays_as_it_is(kind: Any) -> None:
    """Of what is no float64 of this machine a copy is made, and worked on in place; of nothing else."""
    given = np.linspace(-2, 2, 101).astype(kind)
    whole = CODER.encode(given, 3)
    assert np.array_equal(given, np.linspace(-2, 2, 101).astype(kind))
    if given.dtype.isnative:
        update = torch.from_numpy(given)
        assert np.array_equal(CODER.encode(update, 3), whole)
        assert np.array_equal(update, np.linspace(-2, 2, 101).astype(kind))


@pytest.mark.parametrize(
    "settings",
    [
        {"bound": 0.0},
        {"bound": math.nan},
        {"value_bits": 1},
        {"value_bits": 49},
        {"max_weight": 0},
        {"value_bits": 48, "max_weight": 1 << 16},
    ],
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        FixedPoint(**{"bound": 1.0, "value_bits": 16, "max_weight": 10, **settings})  # type: ignore[arg-type]


@given(values=st.lists(st.floats(-2.0, 2.0, width=32), max_size=20), weight=st.integers(1, 1000))
def test_the_device_path_gives_the_same_integers(values: list[float], weight: int) -> None:
    update = torch.tensor(values)
    assert np.array_equal(CODER._encode_tensor(update, weight).numpy(), CODER.encode(update, weight))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.1])
def test_the_device_path_refuses_the_same(bad: float) -> None:
    with pytest.raises(EncodingError, match="largest coordinate"):
        CODER._encode_tensor(torch.tensor([0.0, bad]), 1)
    with pytest.raises(EncodingError, match="float vector"):
        CODER._encode_tensor(torch.tensor([0, 1]), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_updates_stay_on_the_device() -> None:
    update = torch.linspace(-2, 2, 1001)
    encoded = CODER.encode(update.cuda(), 7)
    assert isinstance(encoded, torch.Tensor)
    assert encoded.is_cuda
    assert np.array_equal(encoded.cpu().numpy(), CODER.encode(update, 7))
