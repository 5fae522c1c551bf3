"""The mask stream of :mod:`choral.protocols.crypto.mask_stream` on the device where the updates live, byte for byte the
same.

AES-128-CTR in plain torch operations. A block's state is 4 int32 words, or 16 bytes through a view; a round is one
gather from a table of 4 x 256 words that holds SubBytes, ShiftRows and MixColumns (Daemen and Rijmen, *AES Proposal*,
5.2.1), and four XORs. torch's signed addition wraps, so int32 and int64 serve as integers modulo 2^32 and 2^64.

Cost by design; **no GPU timing has been measured yet**. Eager torch writes every intermediate: per block of 16 bytes
and round 32 B to permute, 80 B to widen the indices, 128 B to gather, 192 B to XOR, so 10 rounds move 4.3 KB, 270 bytes
per byte of mask. At the 4.8 TB/s of an H200 that bounds it to about 18 GB/s, and the 90 launches per chunk of 16 MiB
(about 5 us each) to about 37 GB/s: three times one CPU core, without the trip over the bus. ``compiled=True`` hands the
rounds to torch.compile, which fuses them into one kernel that moves 16 bytes per block each way and is bound by its
160 gathers from a table of 4 KiB. Memory: at most about 200 MiB beside the accumulator.

Table lookups take a time that depends on the key. Do not use a device that an adversary can run on at the same time;
CPU tensors go to the hardware AES of :mod:`choral.protocols.crypto.mask_stream` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from choral.protocols.crypto import mask_stream as stream
from choral.protocols.errors import SpecError

_CHUNK_BLOCKS = 1 << 20
_MASK64 = 2**64 - 1

Rounds = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def add_mask_tensor(
    accumulator: Tensor, seed: bytes, *, subtract: bool = False, offset: int = 0, compiled: bool = False
) -> None:
    """Add the mask of ``seed`` to ``accumulator`` in place, or subtract it, modulo 2^32 or 2^64.

    accumulator: int32 or int64, shape (n,), contiguous, on any device: coordinates ``offset`` to ``offset + n - 1``.
    seed: 32 bytes, as for :func:`choral.protocols.crypto.mask_stream.add_mask`. offset: >= 0, in elements.
    compiled: fuse the cipher with torch.compile; compiles once per process, for about a minute. Ignored on a CPU.

    Raises: SpecError for another dtype, shape or layout, another seed length, a negative offset.
    """
    if accumulator.dtype not in (torch.int32, torch.int64):
        raise SpecError(f"expected an int32 or int64 tensor, got {accumulator.dtype}")
    if accumulator.ndim != 1 or not accumulator.is_contiguous():
        raise SpecError(f"expected a contiguous vector, got shape {tuple(accumulator.shape)}")
    if len(seed) != stream.SEED_BYTES:
        raise SpecError(f"expected a mask seed of {stream.SEED_BYTES} bytes, got {len(seed)}")
    if offset < 0:
        raise SpecError(f"expected offset >= 0, got {offset}")
    target = accumulator.detach()
    if target.device.type == "cpu":
        unsigned = target.numpy().view("u4" if target.dtype == torch.int32 else "u8")
        stream.add_mask(unsigned, seed, subtract=subtract, offset=offset)
    else:
        _add_with_torch(target, seed, subtract, offset, _compiled() if compiled else _rounds)


def _add_with_torch(target: Tensor, seed: bytes, subtract: bool, offset: int, rounds: Rounds) -> None:
    per_block = stream.BLOCK_BYTES // target.element_size()
    first, skip = divmod(offset, per_block)
    start = int.from_bytes(seed[16:], "big") + first
    blocks = -(-(skip + target.numel()) // per_block)
    keys = _int32(_round_keys(seed[:16]), target.device).view(11, 4)
    tables = _tables(target.device)
    done = 0
    for chunk in range(0, blocks, _CHUNK_BLOCKS):
        counters = _counters(start + chunk, min(_CHUNK_BLOCKS, blocks - chunk), target.device)
        words = rounds(counters, keys, *tables).view(target.dtype).view(-1)[skip : skip + target.numel() - done]
        skip = 0
        piece = target[done : done + words.numel()]
        if subtract:
            piece.sub_(words)
        else:
            piece.add_(words)
        done += words.numel()


def _counters(start: int, count: int, device: torch.device) -> Tensor:
    """Big-endian counter blocks ``start`` to ``start + count - 1`` modulo 2^128: int32, shape (count, 4)."""
    high, low = start >> 64 & _MASK64, start & _MASK64
    halves = torch.empty((count, 2), dtype=torch.int64, device=device)
    halves[:, 0] = _signed(high)
    halves[:, 1] = torch.arange(count, dtype=torch.int64, device=device) + _signed(low)  # wraps
    if low + count > 2**64:
        halves[2**64 - low :, 0] = _signed(high + 1 & _MASK64)
    return halves.view(torch.uint8).view(count, 2, 8).flip(2).reshape(count, 16).view(torch.int32)


def _rounds(state: Tensor, keys: Tensor, table: Tensor, sbox: Tensor, shift_rows: Tensor) -> Tensor:
    """AES-128 of each block. state: int32 (n, 4); keys: int32 (11, 4). Returns int32 (n, 4).

    shift_rows: int64 (16,), the byte that moves to each place; place p is looked up in part p % 4 of ``table``.
    """
    parts = torch.arange(4, dtype=torch.int32, device=state.device).mul(256).repeat(4)
    state = state ^ keys[0]
    for number in range(1, 10):
        indices = state.view(torch.uint8)[:, shift_rows] + parts
        mixed = table.index_select(0, indices.view(-1)).view(-1, 4, 4)
        state = mixed[:, :, 0] ^ mixed[:, :, 1] ^ mixed[:, :, 2] ^ mixed[:, :, 3] ^ keys[number]
    indices = state.view(torch.uint8)[:, shift_rows].to(torch.int32)
    last = sbox.index_select(0, indices.view(-1)).view(-1, 16).view(torch.int32)
    return last ^ keys[10]


@cache
def _compiled() -> Rounds:
    return torch.compile(_rounds, fullgraph=True, dynamic=True)


@cache
def _sbox() -> list[int]:
    """FIPS 197, 5.1.1: the inverse in GF(2^8), then an affine map."""
    powers = [1]
    for _ in range(254):
        powers.append(powers[-1] ^ _double(powers[-1]))  # powers of the generator 3
    box = []
    for value in range(256):
        inverse = powers[-powers.index(value) % 255] if value else 0
        spread = inverse ^ inverse << 1 ^ inverse << 2 ^ inverse << 3 ^ inverse << 4
        box.append((spread ^ spread >> 8) & 0xFF ^ 0x63)
    return box


def _double(value: int) -> int:
    return value << 1 ^ (0x11B if value & 0x80 else 0)


def _round_keys(key: bytes) -> list[int]:
    """FIPS 197, 5.2: the 44 words of the schedule, little-endian."""
    box = _sbox()
    words = [key[place : place + 4] for place in range(0, 16, 4)]
    constant = 1
    for number in range(4, 44):
        word = words[-1]
        if number % 4 == 0:
            word = bytes([box[word[1]] ^ constant, box[word[2]], box[word[3]], box[word[0]]])
            constant = _double(constant)
        words.append(bytes(a ^ b for a, b in zip(words[-4], word, strict=True)))
    return [int.from_bytes(word, "little") for word in words]


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The 1024 words of the four round tables, the S-box, and ShiftRows as a permutation of byte places."""
    first = [
        int.from_bytes(bytes([_double(s), s, s, _double(s) ^ s]), "little")  # one column of MixColumns
        for s in _sbox()
    ]
    table = [(word << 8 * row | word >> 32 - 8 * row) & 0xFFFFFFFF for row in range(4) for word in first]
    shift_rows = [4 * ((column + row) % 4) + row for column in range(4) for row in range(4)]
    return (
        _int32(table, device),
        torch.tensor(_sbox(), dtype=torch.uint8, device=device),
        torch.tensor(shift_rows, device=device),
    )


def _int32(words: list[int], device: torch.device) -> Tensor:
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32, device=device)


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)
