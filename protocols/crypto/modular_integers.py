"""Integers modulo a power of two: bit-packing for the wire, and the signed values they stand for.

A vector modulo 2^bits lives in the narrowest unsigned numpy type that wraps natively (:func:`accumulator_dtype`), its
spare high bits being noise until :func:`unpack` or :func:`lift` looks at the low ``bits`` only. Signed values are
two's complement, with one centred lift after the sum.

Wire format: coordinate ``i`` takes bits ``i * bits`` to ``(i + 1) * bits - 1`` of one little-endian bit string, whose
bit ``j`` is bit ``j % 8`` (least significant first) of byte ``j // 8``; the last byte is padded with zero bits.

Vectors are processed in chunks of 2^18 coordinates: temporaries stay small and in cache, and every index is a Python
or 64-bit integer, so 2^31 coordinates of 64 bits (16 GiB) pass.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from choral.protocols.errors import SpecError

_CHUNK = 1 << 18
"""Coordinates per chunk; a multiple of 8, so that every chunk starts on a byte."""


class PackingError(SpecError):
    """Bytes that are not a packed vector of the agreed length and width."""


def accumulator_dtype(bits: int) -> np.dtype[Any]:
    """uint32 for 1 to 32 bits, uint64 for 33 to 64."""
    return np.dtype(np.uint32 if _check_bits(bits) <= 32 else np.uint64)


def packed_bytes(length: int, bits: int) -> int:
    """The exact size of a packed vector: ceil(length * bits / 8)."""
    if length < 0:
        raise SpecError(f"expected length >= 0, got {length}")
    return -(-length * _check_bits(bits) // 8)


def wrap(values: NDArray[np.int64], bits: int) -> NDArray[Any]:
    """Signed values as integers modulo 2^bits (two's complement), in :func:`accumulator_dtype`; a new array.

    Raises: SpecError unless every value lies in [-2^(bits-1), 2^(bits-1)): outside it the lift is another value.
    """
    dtype = accumulator_dtype(bits)
    if values.dtype != np.int64:
        raise SpecError(f"expected int64 values, got {values.dtype}")
    if values.size and bits < 64 and not (-(1 << bits - 1) <= int(values.min()) and int(values.max()) < 1 << bits - 1):
        raise SpecError(f"a value does not fit {bits} bits of two's complement")
    wrapped = values.astype(dtype)
    if bits < 8 * dtype.itemsize:
        wrapped &= dtype.type((1 << bits) - 1)
    return wrapped


def lift(values: NDArray[Any], bits: int) -> NDArray[np.int64]:
    """Each value's representative modulo 2^bits in [-2^(bits-1), 2^(bits-1)): int64, same shape, a new array.

    values: uint32 (bits <= 32) or uint64.
    """
    _check_values(values, bits)
    if bits == 32 and values.dtype == np.uint32:
        return values.view(np.int32).astype(np.int64)
    lifted = values.astype(np.uint64).view(np.int64)
    if bits < 64:
        lifted <<= 64 - bits
        lifted >>= 64 - bits  # arithmetic: copies the sign bit down
    return lifted


def pack(values: NDArray[Any], bits: int) -> bytes:
    """The low ``bits`` bits of each value, packed: :func:`packed_bytes` bytes.

    values: uint32 (bits <= 32) or uint64, shape (n,). Bits above ``bits`` are dropped, which is the reduction modulo
    2^bits.
    """
    _check_values(values, bits)
    out = np.empty(packed_bytes(values.size, bits), np.uint8)
    if bits == 8 * values.dtype.itemsize:
        out[:] = values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8)
        return out.tobytes()
    for start in range(0, values.size, _CHUNK):
        piece = values[start : start + _CHUNK]
        packed = _pack_chunk(piece, bits)
        first = start * bits // 8
        out[first : first + packed.size] = packed
    return out.tobytes()


def unpack(data: bytes, length: int, bits: int) -> NDArray[Any]:
    """The vector that :func:`pack` packed, in :func:`accumulator_dtype`, shape (length,), every value below 2^bits.

    Raises: PackingError unless ``data`` has exactly :func:`packed_bytes` bytes and its padding bits are zero.
    """
    expected = packed_bytes(length, bits)
    if len(data) != expected:
        raise PackingError(f"expected {expected} bytes for {length} values of {bits} bits, got {len(data)}")
    padding = expected * 8 - length * bits
    if padding and data[-1] >> 8 - padding:
        raise PackingError("the padding bits of a packed vector are not zero")
    dtype = accumulator_dtype(bits)
    if bits == 8 * dtype.itemsize:
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
    raw = np.frombuffer(data, np.uint8)
    out = np.empty(length, dtype)
    for start in range(0, length, _CHUNK):
        count = min(_CHUNK, length - start)
        first = start * bits // 8
        out[start : start + count] = _unpack_chunk(raw[first : first + -(-count * bits // 8)], count, bits)
    return out


def _group(bits: int, width: int) -> tuple[int, int, list[tuple[int, int]]]:
    """The fewest values of ``bits`` bits that fill whole words of ``width`` bits, the words, and where each starts."""
    divisor = gcd(bits, width)
    values = width // divisor
    return values, bits // divisor, [divmod(place * bits, width) for place in range(values)]


def _pack_chunk(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Shift and or whole columns: the values at one place of their groups all start at the same bit of a word."""
    word = values.dtype
    width = 8 * word.itemsize
    group, group_words, places = _group(bits, width)
    rows = -(-values.size // group)
    padded = np.zeros(rows * group, word)
    np.bitwise_and(values, word.type((1 << bits) - 1), out=padded[: values.size])
    columns = padded.reshape(rows, group)
    words = np.zeros((group_words, rows), word)
    column, shifted = np.empty(rows, word), np.empty(rows, word)
    for place, (first, shift) in enumerate(places):
        column[:] = columns[:, place]
        np.left_shift(column, word.type(shift), out=shifted)
        np.bitwise_or(words[first], shifted, out=words[first])
        if shift + bits > width:
            np.right_shift(column, word.type(width - shift), out=shifted)
            np.bitwise_or(words[first + 1], shifted, out=words[first + 1])
    packed = np.ascontiguousarray(words.T).astype(word.newbyteorder("<"), copy=False)
    return packed.view(np.uint8).reshape(-1)[: packed_bytes(values.size, bits)]


def _unpack_chunk(data: NDArray[np.uint8], count: int, bits: int) -> NDArray[Any]:
    word = accumulator_dtype(bits)
    width = 8 * word.itemsize
    group, group_words, places = _group(bits, width)
    rows = -(-count // group)
    padded = np.zeros(rows * group_words * word.itemsize, np.uint8)
    padded[: data.size] = data
    words = np.ascontiguousarray(padded.view(word.newbyteorder("<")).astype(word, copy=False).reshape(rows, -1).T)
    columns = np.empty((rows, group), word)
    value, shifted = np.empty(rows, word), np.empty(rows, word)
    for place, (first, shift) in enumerate(places):
        np.right_shift(words[first], word.type(shift), out=value)
        if shift + bits > width:
            np.left_shift(words[first + 1], word.type(width - shift), out=shifted)
            np.bitwise_or(value, shifted, out=value)
        np.bitwise_and(value, word.type((1 << bits) - 1), out=columns[:, place])
    return columns.reshape(-1)[:count]


def _check_bits(bits: int) -> int:
    if not 1 <= bits <= 64:
        raise SpecError(f"expected 1 to 64 bits, got {bits}")
    return bits


def _check_values(values: NDArray[Any], bits: int) -> None:
    _check_bits(bits)
    if values.ndim != 1:
        raise SpecError(f"expected a vector, got shape {values.shape}")
    if values.dtype != np.uint64 and not (values.dtype == np.uint32 and bits <= 32):
        raise SpecError(f"expected uint64 values (or uint32 for up to 32 bits) for {bits} bits, got {values.dtype}")
