"""The ring's bulk arithmetic in torch, on any device; :mod:`choral.protocols.homomorphic.ring` says what it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from choral.protocols.homomorphic.ring import REDUCE, Ring

Tensor = torch.Tensor


class TorchKernels:
    """See :class:`choral.protocols.homomorphic.ring.Kernels`. Arrays travel to the device and residues come back."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)

    def encrypt(self, ring: Ring, digits: Any, scales: Any, errors: Any, public: Any, key: Any) -> NDArray[np.uint32]:
        digits, added = self._float(digits), self._float(errors)
        rows = []
        for row, prime in enumerate(ring.primes):
            x = added.clone()
            for digit, scale in zip(digits, scales[row].tolist(), strict=True):
                x += _reduced(digit, prime) * scale
            x = _forward(_reduced(x, prime), self._float(ring.roots[row]), self._float(ring.quotients[row]), prime)
            x += self._float(public[:, row]) * self._float(key[row])
            rows.append(_residues(_reduced(x, prime), prime))
        return np.stack(rows, axis=1)

    def transform(self, ring: Ring, polynomial: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = []
        for row, prime in enumerate(ring.primes):
            x = _reduced(self._float(polynomial)[None], prime)
            x = _forward(x, self._float(ring.roots[row]), self._float(ring.quotients[row]), prime)
            rows.append(_reduced(x, prime)[0].cpu().numpy())
        return np.stack(rows)

    def remove(self, ring: Ring, sums: Any, public: Any, key: Any) -> NDArray[np.uint32]:
        rows = []
        for row, prime in enumerate(ring.primes):
            x = self._float(sums[:, row]) - self._float(public[:, row]) * self._float(key[row])
            roots, quotients = self._float(ring.inverse_roots[row]), self._float(ring.inverse_quotients[row])
            x = _backward(_reduced(x, prime), roots, quotients, prime)
            x = _reduced(_reduced(x, prime) * float(ring.last[row]), prime)
            rows.append(_residues(x, prime))
        return np.stack(rows, axis=1)

    def accept(self, words: NDArray[np.uint32], prime: int, count: int) -> NDArray[np.uint32] | None:
        values = words & np.uint32((1 << prime.bit_length()) - 1)
        accepted = values[values < prime][:count]
        return accepted if accepted.size == count else None

    def magnitudes(self, words: Any, thresholds: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        values = (words >> np.uint64(1)).view(np.int64)
        counts, ties = np.zeros(words.shape, np.int8), np.zeros(words.shape, np.bool_)
        for threshold in thresholds:
            counts += values < threshold
            ties |= values == threshold
        return counts, ties

    def _float(self, array: Any) -> Tensor:
        return torch.as_tensor(array, device=self._device).to(torch.float64)


def _reduced(x: Tensor, prime: int) -> Tensor:
    return x - torch.round(x * (1.0 / prime)) * prime


def _residues(balanced: Tensor, prime: int) -> NDArray[np.uint32]:
    residues: NDArray[np.uint32] = (
        torch.where(balanced < 0, balanced + prime, balanced).int().cpu().numpy().view(np.uint32)
    )
    return residues


def _times(x: Tensor, roots: Tensor, quotients: Tensor, prime: int) -> Tensor:
    return x * roots - torch.round(x * quotients) * prime


def _forward(x: Tensor, roots: Tensor, quotients: Tensor, prime: int) -> Tensor:
    """x: shape (B, N)."""
    degree = x.shape[-1]
    blocks = 1
    stage = 0
    while blocks < degree:
        pairs = x.view(-1, blocks, 2, degree // (2 * blocks))
        stage_roots, stage_quotients = roots[blocks : 2 * blocks, None], quotients[blocks : 2 * blocks, None]
        product = _times(pairs[:, :, 1], stage_roots, stage_quotients, prime)
        x = torch.stack((pairs[:, :, 0] + product, pairs[:, :, 0] - product), dim=2).view(-1, degree)
        blocks *= 2
        stage += 1
        if stage == REDUCE:
            x = _reduced(x, prime)
    return x


def _backward(x: Tensor, roots: Tensor, quotients: Tensor, prime: int) -> Tensor:
    degree = x.shape[-1]
    blocks = degree // 2
    while blocks >= 1:
        pairs = x.view(-1, blocks, 2, degree // (2 * blocks))
        stage_roots, stage_quotients = roots[blocks : 2 * blocks, None], quotients[blocks : 2 * blocks, None]
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        product = _times(low - high, stage_roots, stage_quotients, prime)
        x = torch.stack((_reduced(low + high, prime), product), dim=2).view(-1, degree)
        blocks //= 2
    return x
