"""The ring's bulk arithmetic in torch, on any device; :mod:`choral.protocols.homomorphic.ring.arithmetic` says what it
does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from choral.protocols.crypto.modular_integers import pack, unpack
from choral.protocols.homomorphic.ring.arithmetic import LIMB, REDUCE, WIDTH, Ring

Tensor = torch.Tensor


class TorchKernels:
    """See :class:`choral.protocols.homomorphic.ring.arithmetic.Kernels`. Arrays travel to the device and residues come
    back."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)

    def encrypt(
        self, ring: Ring, digits: Any, scales: Any, errors: Any, public: Any, key: Any, *, lanes: int
    ) -> NDArray[np.int32]:
        digits, added = self._float(digits), self._float(errors)
        rows = []
        for row, prime in enumerate(ring.primes):
            x = added.clone()
            for digit, scale in zip(digits, scales[row].tolist(), strict=True):
                x += _reduced(digit, prime) * scale
            roots, quotients = self._float(ring.roots[row]), self._float(ring.quotients[row])
            x = _forward(_reduced(x, prime).view(-1, lanes), roots, quotients, prime)
            # c = a s + NTT(e + sum_g scale_g digit_g)
            x += self._float(public[row]).view(-1, lanes) * self._float(key[row])[:, None]
            rows.append(_residues(_reduced(x, prime), prime))
        return np.stack(rows)

    def transform(self, ring: Ring, polynomial: NDArray[np.float64]) -> NDArray[np.int32]:
        rows = []
        for row, prime in enumerate(ring.primes):
            x = _reduced(self._float(polynomial)[:, None], prime)
            x = _forward(x, self._float(ring.roots[row]), self._float(ring.quotients[row]), prime)
            rows.append(_reduced(x, prime).reshape(-1).int().cpu().numpy())
        return np.stack(rows)

    def remove(self, ring: Ring, sums: Any, public: Any, key: Any, *, lanes: int) -> NDArray[np.int32]:
        rows = []
        for row, prime in enumerate(ring.primes):
            x = self._float(public[row]).view(-1, lanes) * self._float(key[row])[:, None]
            x = _reduced(self._float(sums[row]).view(-1, lanes) - x, prime)  # c - a s
            x = _backward(x, self._float(ring.inverse_roots[row]), self._float(ring.inverse_quotients[row]), prime)
            x = _reduced(_reduced(x, prime) * float(ring.last[row]), prime)  # N^-1 of the inverse transform
            rows.append(_residues(x, prime))
        return np.stack(rows)

    def accept(self, words: NDArray[np.uint32], prime: int, count: int) -> NDArray[np.int32] | None:
        values = words.view(np.int32) & np.int32((1 << prime.bit_length()) - 1)
        accepted = values[values < prime][:count]
        return accepted if accepted.size == count else None

    def magnitudes(self, words: Any, thresholds: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        values = (words >> np.uint64(1)).view(np.int64)
        counts, ties = np.zeros(words.shape, np.int8), np.zeros(words.shape, np.bool_)
        for threshold in thresholds:
            counts += values < threshold  # the magnitude is #{k: u < P(|x| >= k)}
            ties |= values == threshold
        return counts, ties

    def digits(self, vector: Any, count: int, layout: Sequence[Any], bits: int) -> Any:
        slots = layout[-1].first + layout[-1].count
        values = torch.zeros(slots * count, dtype=torch.int64, device=self._device)
        values[: len(vector)] = torch.as_tensor(vector, device=self._device)
        values = values.view(slots, count)
        out = torch.zeros((len(layout), count), dtype=torch.float64, device=self._device)
        for row, digit in zip(out, layout, strict=True):
            if digit.half == "low":
                row += values[digit.first] & 0xFFFFFFFF
            elif digit.half == "high":
                row += values[digit.first] >> 32
            else:
                for j in reversed(range(digit.first, digit.first + digit.count)):
                    row *= 2.0**bits
                    row += values[j]
        return out

    def pack(self, residues: NDArray[np.int32], bits: int) -> bytes:
        strings = residues.view(np.uint32).reshape(-1, 32, WIDTH).transpose(0, 2, 1)
        words = np.frombuffer(pack(strings.reshape(-1), bits), "<u4").reshape(-1, WIDTH, bits)
        return words.transpose(0, 2, 1).tobytes()

    def add(self, packed: NDArray[np.uint32], bits: int, sums: NDArray[np.uint32]) -> None:
        sums += _unpack(packed, bits)

    def limbs(self, ring: Ring, residues: Any, offset: int) -> NDArray[np.int64]:
        # Garner's algorithm (Handbook of Applied Cryptography, 14.71), by digits in the mixed radix p_0, p_0 p_1, ...
        digits: list[NDArray[np.int64]] = []
        for row, prime in enumerate(ring.primes):
            digit = (residues[row].astype(np.int64) + offset % prime) % prime
            # d_i = (...((x_i - d_0) p_0^-1 - d_1) p_1^-1 - ...) mod p_i
            for earlier, other in zip(digits, ring.primes, strict=False):
                digit = (digit - earlier) * pow(other, -1, prime) % prime
            digits.append(digit)
        limbs = np.zeros((-(-ring.modulus.bit_length() // LIMB) + 1, residues.shape[1]), np.int64)
        # Horner: x = d_0 + p_0 (d_1 + p_1 (d_2 + ...))
        for carry, prime in zip(reversed(digits), reversed(ring.primes), strict=True):
            for limb in limbs:
                value = limb * prime + carry
                limb[:] = value & (1 << LIMB) - 1
                carry = value >> LIMB
        return limbs

    def _float(self, array: Any) -> Tensor:
        return torch.as_tensor(array, device=self._device).to(torch.float64)


def _unpack(packed: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    words = packed.reshape(-1, bits, WIDTH).transpose(0, 2, 1).astype("<u4")
    strings = unpack(words.tobytes(), packed.size * 32 // bits, bits).reshape(-1, WIDTH, 32)
    residues: NDArray[np.uint32] = strings.transpose(0, 2, 1).reshape(-1)
    return residues


def _reduced(x: Tensor, prime: int) -> Tensor:
    return x - torch.round(x * (1.0 / prime)) * prime  # x - round(x / p) p


def _residues(balanced: Tensor, prime: int) -> NDArray[np.int32]:
    """Flat, in [0, p)."""
    residues: NDArray[np.int32] = torch.where(balanced < 0, balanced + prime, balanced).reshape(-1).int().cpu().numpy()
    return residues


def _times(x: Tensor, roots: Tensor, quotients: Tensor, prime: int) -> Tensor:
    return x * roots - torch.round(x * quotients) * prime


def _forward(x: Tensor, roots: Tensor, quotients: Tensor, prime: int) -> Tensor:
    """x: shape (N, lanes). Longa and Naehrig 2016, algorithm 1, all blocks of a stage at once."""
    degree, lanes = x.shape
    blocks = 1
    stage = 0
    while blocks < degree:
        low, high, factors = _pairs(x, blocks, roots, quotients)
        product = _times(high, *factors, prime)  # Cooley and Tukey's butterfly: (U, V) -> (U + S V, U - S V)
        x = torch.stack((low + product, low - product), dim=1).view(degree, lanes)
        blocks *= 2
        stage += 1
        if stage == REDUCE:  # (k + 1) 2^50 + 2^30 < 2^53 only for k <= 6: see "Magnitudes" in arithmetic.py
            x = _reduced(x, prime)
    return x


def _backward(x: Tensor, roots: Tensor, quotients: Tensor, prime: int) -> Tensor:
    """Without the division by N. Longa and Naehrig 2016, algorithm 2, all blocks of a stage at once."""
    degree, lanes = x.shape
    blocks = degree // 2
    while blocks >= 1:
        low, high, factors = _pairs(x, blocks, roots, quotients)
        # Gentleman and Sande's butterfly: (U, V) -> (U + V, (U - V) S)
        x = torch.stack((_reduced(low + high, prime), _times(low - high, *factors, prime)), dim=1).view(degree, lanes)
        blocks //= 2
    return x


def _pairs(x: Tensor, blocks: int, roots: Tensor, quotients: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The two halves of each block of a stage, shape (blocks, half, lanes), with its root and quotient."""
    pairs = x.view(blocks, 2, -1, x.shape[1])
    stage = slice(blocks, 2 * blocks)  # S = Psi_rev[m + i] for i below m
    return pairs[:, 0], pairs[:, 1], (roots[stage, None, None], quotients[stage, None, None])
