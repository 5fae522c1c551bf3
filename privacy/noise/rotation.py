"""Random rotation: a vector's mass spread evenly over its coordinates, so that few bits hold each of them.

x -> H S x / sqrt(D): pad with zeros to D = 2^k coordinates, flip signs by S (one fair bit each, from a seed that all
parties share), then the Walsh-Hadamard transform (Ailon and Chazelle 2006; Suresh et al. 2017, section 3). It is
orthogonal, so norms and sums are kept; each coordinate of the image is sub-Gaussian with deviation |x| / sqrt(D).
The seed is public. Nothing about privacy rests on it, nor on the rounding of floats here: the sensitivity that is
paid for is that of the integer vector, which is measured after the rotation
(:mod:`choral.privacy.client_level.client_noise_shares`).

The transform of size 2^k is the Kronecker product of transforms of size at most 32, each one matrix product
(Sylvester's construction: H_mn = H_m (x) H_n), 2 * 32 operations per coordinate in each of ceil(k / 5) passes at the
speed of matrix multiplication, on a CPU or a GPU. Numpy arrays stay numpy, torch tensors stay on their device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from Crypto.Cipher import AES

from choral.errors import ConfigError
from choral.privacy.errors import EncodingError

if TYPE_CHECKING:
    import torch

Vector = TypeVar("Vector", npt.NDArray[Any], "torch.Tensor")

SEED_BYTES = 32
_FACTOR = 5  # log2 of the largest transform done as one matrix product


def padded_length(length: int) -> int:
    """The least power of two >= `length` >= 1."""
    if length < 1:
        raise ConfigError(f"length is {length}, expected >= 1")
    return 1 << (length - 1).bit_length()


def hadamard(vector: Vector) -> Vector:
    """Return the normalised Walsh-Hadamard transform of `vector`, shape (2^k,), floating point; its own inverse.

    Natural (Sylvester) order: entry (i, j) of the matrix is (-1)^popcount(i & j) / sqrt(2^k). Same type, dtype and
    device. Raises: EncodingError for another shape or type.
    """
    size = _checked_size(vector)
    bits = size.bit_length() - 1
    result: Any = vector  # transformed from the last bits of the index to the first
    done = 0
    while done < bits:
        step = min(_FACTOR, bits - done)
        matrix = _matrix(step, result)
        if done == 0:
            result = vector.reshape(-1, 1 << step) @ matrix
        else:
            result = matrix @ result.reshape(-1, 1 << step, 1 << done)
        done += step
    transformed: Vector = result.reshape(size)
    return transformed


def rotate(vector: Vector, signs: Vector) -> Vector:
    """Return H S x for x of shape (d,): shape (D,).

    signs: S, shape (D,), D = padded_length(d), from :func:`random_signs`; numpy, or a tensor where `vector` is one.
    Raises: EncodingError for another shape or type.
    """
    if vector.ndim != 1 or len(signs) != padded_length(max(len(vector), 1)):
        raise EncodingError(f"vector has shape {tuple(vector.shape)}, expected one that pads to {len(signs)}")
    padded: Any = np.zeros(len(signs), vector.dtype) if isinstance(vector, np.ndarray) else vector.new_zeros(len(signs))
    padded[: len(vector)] = vector
    padded *= signs
    rotated: Vector = hadamard(padded)
    return rotated


def unrotate(rotated: Vector, signs: Vector, length: int) -> Vector:
    """Return S H y, its first `length` coordinates: the inverse of :func:`rotate` up to rounding."""
    result: Vector = (hadamard(rotated) * signs)[:length]
    return result


def random_signs(seed: bytes, size: int) -> npt.NDArray[np.float32]:
    """Return `size` signs, +1 or -1, float32: bits of the AES-256-CTR key stream of `seed`, 32 bytes, least bit first.

    The same for every party with the seed, which is public. Raises: ConfigError for a seed of another length.
    """
    if len(seed) != SEED_BYTES or size < 0:
        raise ConfigError(f"seed has {len(seed)} bytes and size is {size}, expected {SEED_BYTES} bytes and size >= 0")
    stream = AES.new(seed, AES.MODE_CTR, nonce=b"").encrypt(bytes(-(-size // 8)))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=size, bitorder="little")
    signs = bits.astype(np.float32)
    signs *= -2.0
    signs += 1.0
    return signs


def _checked_size(vector: Any) -> int:
    size = len(vector) if vector.ndim == 1 else 0
    if size < 1 or size & (size - 1):
        raise EncodingError(f"vector has shape {tuple(vector.shape)}, expected one whose length is a power of two")
    floating = vector.dtype.kind == "f" if isinstance(vector, np.ndarray) else vector.is_floating_point()
    if not floating:
        raise EncodingError(f"vector has type {vector.dtype}, expected floating point")
    return size


def _matrix(bits: int, like: Any) -> Any:
    matrix = _sylvester(bits, "float64" if "64" in str(like.dtype) else "float32")
    if isinstance(like, np.ndarray):
        return matrix.astype(like.dtype, copy=False)
    import torch

    return torch.from_numpy(matrix).to(device=like.device, dtype=like.dtype)


@lru_cache(maxsize=32)
def _sylvester(bits: int, dtype: str) -> npt.NDArray[Any]:
    matrix = np.ones((1, 1), dtype)
    for _ in range(bits):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix * np.asarray(2.0 ** (-bits / 2.0), dtype))
