"""Integers modulo a power of two: bit-packing for the wire, and the signed values they stand for.

A vector modulo 2^bits lives in the narrowest unsigned numpy type that wraps natively (:func:`accumulator_dtype`), its
spare high bits being noise until :func:`unpack` or :func:`lift` looks at the low ``bits`` only. Signed values are
two's complement, with one centred lift after the sum.

Wire format: coordinate ``i`` takes bits ``i * bits`` to ``(i + 1) * bits - 1`` of one little-endian bit string, whose
bit ``j`` is bit ``j % 8`` (least significant first) of byte ``j // 8``; the last byte is padded with zero bits.

Vectors are processed in chunks of 2^15 coordinates: temporaries stay small and in cache, and every index is a Python
or 64-bit integer, so 2^31 coordinates of 64 bits (16 GiB) pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from choral.protocols.errors import SpecError

_CHUNK = 1 << 15
"""Coordinates per chunk; a multiple of 8, so that every chunk starts on a byte."""
_WHOLE_BYTES = (8, 16, 32, 64)
"""Widths that numpy has types of: a cast drops the bits above."""


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
    if bits in _WHOLE_BYTES:
        return values.astype(f"<u{bits // 8}").tobytes()
    out = np.empty(packed_bytes(values.size, bits), np.uint8)
    for start in range(0, values.size, _CHUNK):
        piece = values[start : start + _CHUNK]
        first, size = start * bits // 8, packed_bytes(piece.size, bits)
        out[first : first + size] = _pack_chunk(piece, bits)[:size]
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
    if bits in _WHOLE_BYTES:
        return np.frombuffer(data, f"<u{bits // 8}").astype(dtype)
    raw = np.frombuffer(data, np.uint8)
    out = np.empty(length, dtype)
    for start in range(0, length, _CHUNK):
        count = min(_CHUNK, length - start)
        first = start * bits // 8
        out[start : start + count] = _unpack_chunk(raw[first : first + -(-count * bits // 8)], count, bits)
    return out


@dataclass(frozen=True)
class _Layout:
    """Where values of so many bits stand in words: in groups, the fewest values that fill whole words.

    first, shift: of each place of a group, the word in which it starts, and at which of its bits. lead: of each word,
    the first place that starts in it; later: the others, as pairs (words, places), in none of which a word is twice.
    over, back: the places that go on in the next word, and by how many bits they are shifted to the right there.
    """

    first: NDArray[np.intp]
    shift: NDArray[Any]
    lead: NDArray[np.intp]
    later: tuple[tuple[NDArray[np.intp], NDArray[np.intp]], ...]
    over: NDArray[np.intp]
    back: NDArray[Any]


@lru_cache(maxsize=128)
def _layout(bits: int, word: np.dtype[Any]) -> _Layout:
    width = 8 * word.itemsize
    divisor = gcd(bits, width)
    starts = np.arange(width // divisor) * bits
    first, shift = starts // width, starts % width
    lead = np.searchsorted(first, np.arange(bits // divisor))
    rank = np.arange(len(starts)) - lead[first]
    later = tuple((first[rank == at], np.flatnonzero(rank == at)) for at in range(1, int(rank.max()) + 1))
    over = np.flatnonzero(shift + bits > width)
    return _Layout(
        first, shift.astype(word)[:, None], lead, later, over, back=(width - shift[over]).astype(word)[:, None]
    )


def _pack_chunk(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Shift and or whole rows: the values at one place of their groups all start at the same bit of a word."""
    word = values.dtype
    layout = _layout(bits, word)
    groups = -(-values.size // len(layout.first))
    if (rest := groups * len(layout.first) - values.size) > 0:
        values = np.concatenate([values, np.zeros(rest, word)])
    placed = np.ascontiguousarray(values.reshape(groups, -1).T) & word.type((1 << bits) - 1)
    shifted = placed << layout.shift
    words = shifted[layout.lead]
    for which, places in layout.later:
        words[which] |= shifted[places]
    words[layout.first[layout.over] + 1] |= placed[layout.over] >> layout.back
    return np.ascontiguousarray(words.T).astype(word.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1)


def _unpack_chunk(data: NDArray[np.uint8], count: int, bits: int) -> NDArray[Any]:
    word = accumulator_dtype(bits)
    layout = _layout(bits, word)
    size = -(-count // len(layout.first)) * len(layout.lead) * word.itemsize
    if data.size != size:
        data = np.concatenate([data, np.zeros(size - data.size, np.uint8)])
    rows = data.view(word.newbyteorder("<")).astype(word, copy=False).reshape(-1, len(layout.lead))
    words = np.ascontiguousarray(rows.T)
    values: NDArray[Any] = words[layout.first] >> layout.shift
    values[layout.over] |= words[layout.first[layout.over] + 1] << layout.back
    values &= word.type((1 << bits) - 1)
    found: NDArray[Any] = values.T.reshape(-1)[:count]
    return found


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
