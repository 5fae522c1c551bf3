"""Bit-packing against Python's own big integers, and the lift against arithmetic."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.protocols.crypto import modular_integers as integers
from choral.protocols.crypto.modular_integers import (
    PackingError,
    accumulator_dtype,
    lift,
    pack,
    packed_bytes,
    unpack,
    wrap,
)
from choral.protocols.errors import SpecError


def draw(length: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.random.default_rng(seed).integers(0, 2**64, length, dtype=np.uint64)


@pytest.mark.parametrize("bits", range(1, 65))
def test_packing_is_one_little_endian_number(bits: int) -> None:
    for length in (0, 1, 2, 7, 8, 9, 63, 64, 65, 1001):
        values = draw(length, bits)
        expected = sum((int(value) % 2**bits) << place * bits for place, value in enumerate(values))
        data = pack(values, bits)
        assert data == expected.to_bytes(packed_bytes(length, bits), "little")
        found = unpack(data, length, bits)
        assert found.dtype == accumulator_dtype(bits)
        assert [int(value) for value in found] == [int(value) % 2**bits for value in values]


@pytest.mark.parametrize("bits", [1, 3, 8, 13, 16, 20, 24, 31, 32, 33, 40, 47, 63, 64])
def test_chunks_join_without_a_seam(bits: int) -> None:
    length = 2 * integers._CHUNK + 12_345
    values = draw(length, bits)
    data = pack(values, bits)
    assert len(data) == packed_bytes(length, bits)
    kept = values if bits == 64 else values & np.uint64(2**bits - 1)
    assert (unpack(data, length, bits) == kept.astype(accumulator_dtype(bits))).all()
    boundary = integers._CHUNK
    assert data[boundary * bits // 8 :][: 8 * bits] == pack(values[boundary:], bits)[: 8 * bits]


@settings(max_examples=200)
@given(bits=st.integers(1, 32), length=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_both_accumulators_pack_alike(bits: int, length: int, seed: int) -> None:
    values = draw(length, seed)
    assert pack(values.astype(np.uint32), bits) == pack(values & np.uint64(2**32 - 1), bits)


@pytest.mark.parametrize(("length", "bits"), [(1, 1), (3, 7), (10, 10), (5, 33), (9, 63)])
def test_each_padding_bit_must_be_zero(length: int, bits: int) -> None:
    data = pack(draw(length), bits)
    padding = len(data) * 8 - length * bits
    assert padding
    for bit in range(padding):
        with pytest.raises(PackingError):
            unpack(data[:-1] + bytes([data[-1] | 1 << 7 - bit]), length, bits)


@pytest.mark.parametrize("change", [-1, 1, 100])
def test_the_length_must_fit(change: int) -> None:
    data = pack(draw(1000), 20)
    with pytest.raises(PackingError):
        unpack(data[:change] if change < 0 else data + bytes(change), 1000, 20)
    with pytest.raises(PackingError):
        unpack(data, 1000 + change, 20)


@pytest.mark.parametrize("bits", [-1, 0, 65])
def test_bits_out_of_range(bits: int) -> None:
    for refused in (
        lambda: pack(draw(3), bits),
        lambda: unpack(b"", 0, bits),
        lambda: lift(draw(3), bits),
        lambda: wrap(np.zeros(3, np.int64), bits),
        lambda: accumulator_dtype(bits),
    ):
        with pytest.raises(SpecError):
            refused()


def test_other_types_are_refused() -> None:
    with pytest.raises(SpecError):
        pack(np.zeros(3, np.int64), 10)
    with pytest.raises(SpecError):
        pack(np.zeros(3, np.uint32), 33)
    with pytest.raises(SpecError):
        pack(np.zeros((3, 3), np.uint64), 10)
    with pytest.raises(SpecError):
        lift(np.zeros(3, np.float64), 10)
    with pytest.raises(SpecError):
        wrap(np.zeros(3, np.int32), 10)  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        unpack(b"", -1, 8)
    with pytest.raises(SpecError):
        packed_bytes(-1, 8)


@pytest.mark.parametrize("bits", range(1, 65))
def test_lift_is_the_centred_representative(bits: int) -> None:
    half = 1 << bits - 1
    edges = [0, 1, half - 1, half, half + 1, 2**bits - 2, 2**bits - 1]
    values = np.array([edge % 2**bits for edge in edges], np.uint64)
    expected = [(edge % 2**bits + half) % 2**bits - half for edge in edges]
    assert lift(values, bits).tolist() == expected
    if bits <= 32:
        assert lift(values.astype(np.uint32), bits).tolist() == expected
    if bits < 64:  # bits above are noise
        assert lift(values | np.uint64(1 << bits), bits).tolist() == expected


@pytest.mark.parametrize("bits", range(1, 65))
def test_wrap_then_lift_is_the_identity_on_the_range(bits: int) -> None:
    half = 1 << bits - 1
    values = np.array(
        sorted(
            {-half, -half + 1, -1, 0, half - 1} & set(range(-half, half)) if bits < 8 else {-half, -1, 0, 1, half - 1}
        ),
        np.int64,
    )
    wrapped = wrap(values, bits)
    assert wrapped.dtype == accumulator_dtype(bits)
    assert all(int(value) < 2**bits for value in wrapped)
    assert (lift(wrapped, bits) == values).all()


@pytest.mark.parametrize("bits", [1, 8, 31, 32, 33, 63])
def test_values_that_would_wrap_are_refused(bits: int) -> None:
    half = 1 << bits - 1
    for value in (half, -half - 1):
        with pytest.raises(SpecError):
            wrap(np.array([0, value], np.int64), bits)


@settings(max_examples=100)
@given(bits=st.integers(2, 64), parties=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_sums_in_the_accumulator_lift_to_the_plain_sum(bits: int, parties: int, seed: int) -> None:
    """The noise in the high bits of a uint32 or uint64 accumulator never reaches the low ones."""
    rng = np.random.default_rng(seed)
    bound = (2 ** (bits - 1) - 1) // parties
    vectors = rng.integers(-bound, bound, size=(parties, 50), dtype=np.int64, endpoint=True)
    dtype = accumulator_dtype(bits)
    total = rng.integers(0, 2**64, 50, dtype=np.uint64).astype(dtype)
    mask = total.copy()
    for vector in vectors:
        total += wrap(vector, bits)
    arrived = unpack(pack(total, bits), 50, bits) - unpack(pack(mask, bits), 50, bits)
    assert (lift(arrived, bits) == vectors.sum(axis=0)).all()


def test_memory_stays_bounded() -> None:
    """Beyond input and output, packing a long vector takes a few chunks: no 64 bytes per value."""
    length, bits = 4_000_000, 21
    values = draw(length)
    data = pack(values, bits)
    tracemalloc.start()
    pack(values, bits)
    _, packing = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    unpack(data, length, bits)
    _, unpacking = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert packing < 2 * len(data) + 30 * 2**20
    assert unpacking < 4 * length + 30 * 2**20
