"""The mask stream: 32 bytes of seed become as many uniform integers as a vector has coordinates.

The stream of ``seed`` is the key stream of **AES-128-CTR** (NIST SP 800-38A) with key ``seed[:16]`` and initial
counter block ``seed[16:]``, a 128-bit big-endian integer that grows by one per 16-byte block (mod 2^128): the output
of ``openssl enc -aes-128-ctr -K seed[:16] -iv seed[16:]`` on zeros. Its bytes, read as **little-endian** words of 4 or
8 bytes, are the mask: element ``i`` of a 32-bit mask is bytes ``4i`` to ``4i+3``.

Why AES-128 with a random initial block: it is the fastest (1.3 times AES-256), X25519 gives no more than 128 bits
anyway, and the random start takes away the one discount that a fixed one gives, key search against many seeds at
once. At 2^30 blocks (2^31 coordinates of 8 bytes) a key stream is told from uniform with advantage below 2^-68.
A seed belongs to one vector: adding two vectors' masks from the same seed reveals their difference.

Speed. Vectors are processed in chunks that stay in the second-level cache, with buffers kept per thread, which are
wiped after each stream: with two parties the key stream is what hides a vector, and no thread keeps it. pycryptodome
runs ECB over a block of counters (its own CTR mode is 6 times slower); OpenSSL, when ``cryptography`` is installed,
runs its CTR mode. Both give identical bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from Crypto.Cipher import AES
from numpy.typing import DTypeLike, NDArray

from choral.protocols.errors import SpecError

SEED_BYTES = 32
BLOCK_BYTES = 16
CHUNK_BYTES = 256 * 1024
"""The counters' template, the stream and the piece of the vector together fit a second-level cache of 1 MiB."""

Keystream = Callable[[bytes, int, int], Iterator[NDArray[np.uint8]]]
"""``(seed, first_block, blocks)`` to the stream's pieces of at most CHUNK_BYTES; each is valid until the next."""

_CHUNK_BLOCKS = CHUNK_BYTES // BLOCK_BYTES
_ROW_BLOCKS = 128
_local = threading.local()


def add_mask(accumulator: NDArray[Any], seed: bytes, *, subtract: bool = False, offset: int = 0) -> None:
    """Add the mask of ``seed`` to ``accumulator`` in place, or subtract it, modulo 2^32 or 2^64.

    accumulator: uint32 or uint64, shape (n,), C-contiguous: coordinates ``offset`` to ``offset + n - 1`` of the vector.
    seed: 32 bytes. offset: >= 0, in elements; pieces may be done in any order and on any thread. With many seeds for
        a vector too long for the last cache, go piece by piece (2^20 elements, say) and seed by seed within it.

    Raises: SpecError for another dtype, shape or layout, another seed length, a negative offset.
    """
    _check(accumulator.dtype, seed, offset)
    if accumulator.ndim != 1 or not accumulator.flags.c_contiguous or not accumulator.flags.writeable:
        raise SpecError(f"expected a writeable contiguous vector, got shape {accumulator.shape}")
    combine = np.subtract if subtract else np.add
    done = 0
    for words in _words(seed, offset, accumulator.size, accumulator.dtype):
        piece = accumulator[done : done + words.size]
        combine(piece, words, out=piece)
        done += words.size


def expand(seed: bytes, length: int, dtype: DTypeLike, *, offset: int = 0) -> NDArray[Any]:
    """The mask itself: elements ``offset`` to ``offset + length - 1``, shape (length,), uint32 or uint64.

    Raises: SpecError for another dtype, another seed length, a negative length or offset.
    """
    dtype = np.dtype(dtype)
    _check(dtype, seed, offset)
    if length < 0:
        raise SpecError(f"expected length >= 0, got {length}")
    out = np.empty(length, dtype)
    done = 0
    for words in _words(seed, offset, length, dtype):
        out[done : done + words.size] = words
        done += words.size
    return out


def _check(dtype: np.dtype[Any], seed: bytes, offset: int) -> None:
    if dtype != np.uint32 and dtype != np.uint64:
        raise SpecError(f"expected a uint32 or uint64 vector, got {dtype}")
    if len(seed) != SEED_BYTES:
        raise SpecError(f"expected a mask seed of {SEED_BYTES} bytes, got {len(seed)}")
    if offset < 0:
        raise SpecError(f"expected offset >= 0, got {offset}")


def _words(seed: bytes, offset: int, length: int, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The elements ``offset`` to ``offset + length - 1`` in pieces, each valid until the next is asked for."""
    per_block = BLOCK_BYTES // dtype.itemsize
    first, skip = divmod(offset, per_block)
    blocks = -(-(skip + length) // per_block) if length else 0
    little = dtype.newbyteorder("<")
    for piece in _keystream(seed, first, blocks):
        words = piece.view(little)[skip : skip + length]
        skip = 0
        length -= words.size
        yield words


def _buffer(name: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """This thread's scratch array ``name``: fresh pages for each call would cost more than the cipher. Whoever writes
    secrets into it wipes them."""
    found = getattr(_local, name, None)
    if found is None:
        found = make()
        setattr(_local, name, found)
    return found


def _pycryptodome(seed: bytes, first_block: int, blocks: int) -> Iterator[NDArray[np.uint8]]:
    """ECB, in place, over counters. Chunks are aligned to whole multiples of their size, so that within one only the
    low bits of the counter change and a fixed template, XORed with the rest, gives all of it without a carry."""
    cipher = AES.new(seed[:16], AES.MODE_ECB)
    template = _buffer("template", _template)
    counters = _buffer("counters", lambda: np.empty_like(template))
    stream = counters.reshape(-1).view(np.uint8)
    start = int.from_bytes(seed[16:], "big") + first_block
    stop = start + blocks
    lowest, highest = len(counters), 0
    try:
        while start < stop:
            skip = start % _CHUNK_BLOCKS
            count = min(_CHUNK_BLOCKS - skip, stop - start)
            high = ((start - skip) % 2**128).to_bytes(BLOCK_BYTES, "big")
            rows = slice(skip // _ROW_BLOCKS, -(-(skip + count) // _ROW_BLOCKS))
            lowest, highest = min(lowest, rows.start), max(highest, rows.stop)
            np.bitwise_xor(template[rows], np.frombuffer(high * _ROW_BLOCKS, np.uint64), out=counters[rows])
            piece = stream[skip * BLOCK_BYTES : (skip + count) * BLOCK_BYTES]
            cipher.encrypt(piece.data, output=piece.data)
            start += count
            yield piece
    finally:  # the rows hold key stream, and at its ends counters, which are half of the seed
        counters[lowest:highest] = 0


def _template() -> NDArray[np.uint64]:
    """Counter blocks 0, 1, 2, ... in rows that are long enough for numpy to broadcast at full speed."""
    counters = np.zeros((_CHUNK_BLOCKS, 2), ">u8")
    counters[:, 1] = np.arange(_CHUNK_BLOCKS)
    return counters.view(np.uint64).reshape(-1, 2 * _ROW_BLOCKS)


def _openssl() -> Keystream:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    zeros = bytes(CHUNK_BYTES)

    def keystream(seed: bytes, first_block: int, blocks: int) -> Iterator[NDArray[np.uint8]]:
        start = (int.from_bytes(seed[16:], "big") + first_block) % 2**128
        encryptor = Cipher(algorithms.AES(seed[:16]), modes.CTR(start.to_bytes(BLOCK_BYTES, "big"))).encryptor()
        out = _buffer("out_openssl", lambda: np.empty(CHUNK_BYTES + BLOCK_BYTES, np.uint8))
        try:
            for done in range(0, blocks, _CHUNK_BLOCKS):
                size = min(_CHUNK_BLOCKS, blocks - done) * BLOCK_BYTES
                encryptor.update_into(memoryview(zeros)[:size], out.data)
                yield out[:size]
        finally:
            out[: min(_CHUNK_BLOCKS, blocks) * BLOCK_BYTES + BLOCK_BYTES] = 0

    return keystream


def _backends() -> dict[str, Keystream]:
    """Every backend that can be had here, the preferred one last."""
    found: dict[str, Keystream] = {"pycryptodome": _pycryptodome}
    try:
        found["openssl"] = _openssl()
    except ImportError:
        return found
    return found


BACKENDS = _backends()
_keystream = list(BACKENDS.values())[-1]
