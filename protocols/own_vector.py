"""A party's own vector, checked against what was agreed on before anything is done with it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from choral.protocols.crypto.modular_integers import accumulator_dtype
from choral.protocols.errors import InputError


def is_tensor(vector: object) -> bool:
    """Whether ``vector`` is a torch tensor; torch is not imported for it (nobody has a tensor without)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(vector, torch.Tensor)


def checked(vector: Any, length: int, bound: int, weight_bound: int | None = None) -> Any:
    """``vector`` itself when it is int64, shape (length,), every |value| <= bound: a numpy array or a torch tensor.

    weight_bound: what the last coordinate's absolute value must not pass; None, and it has no bound of its own.

    A tensor on the CPU comes back as the numpy array that shares its memory; one on another device stays there.

    Raises: InputError otherwise. Floats are refused whatever they hold: NaN and infinity have no integer, and how
    the rest are rounded is the caller's to decide.
    """
    if is_tensor(vector):
        vector = _plain_tensor(vector)
    elif isinstance(vector, np.ndarray):
        vector = np.asarray(vector)  # of a subclass, say a masked array, every value counts
        if vector.dtype != np.int64 or not vector.dtype.isnative:
            raise InputError(f"expected a vector of int64, got {vector.dtype}", hint="encode it to integers first")
    else:
        raise InputError(f"expected a numpy array or a torch tensor of int64, got {type(vector).__name__}")
    if tuple(vector.shape) != (length,):
        raise InputError(f"expected a vector of shape ({length},), got {tuple(vector.shape)}")
    low, high = int(vector.min()), int(vector.max())
    if low < -bound or high > bound:
        raise InputError(f"expected every |value| <= {bound}: this vector has one outside")
    if weight_bound is not None and abs(int(vector[-1])) > weight_bound:
        raise InputError(f"expected a last coordinate, the weight, of at most {weight_bound}: this vector's is larger")
    return vector


def checked_floats(vector: Any, length: int, bound: float) -> NDArray[np.float64]:
    """``vector``, contiguous, when it is float64, shape (length,), every |value| <= bound. Raises: InputError."""
    if not isinstance(vector, np.ndarray) or vector.dtype != np.float64 or vector.shape != (length,):
        raise InputError(f"expected a numpy array of float64, shape ({length},)")
    if not bool(np.all(np.abs(vector) <= bound)):
        raise InputError(f"expected every |value| <= {bound}: this vector has one outside, or not a number")
    return np.ascontiguousarray(vector)


def _plain_tensor(vector: Any) -> Any:
    """A dense int64 tensor whose values are what its memory holds; on the CPU as a numpy array. Raises: InputError."""
    torch = sys.modules["torch"]
    if type(vector) not in (torch.Tensor, torch.nn.Parameter):
        raise InputError(f"expected a plain tensor, got a {type(vector).__name__}")
    if vector.layout != torch.strided or vector.is_nested:
        raise InputError(f"expected a dense tensor, got one of layout {vector.layout}")
    if vector.dtype != torch.int64:
        raise InputError(f"expected a vector of int64, got {vector.dtype}", hint="encode it to integers first")
    if vector.device.type == "meta":
        raise InputError("expected a tensor with values, got one on the meta device")
    if vector.is_neg() or vector.is_conj():
        raise InputError("expected a tensor as it is in memory, got a negated view", hint="call resolve_neg() first")
    vector = vector.detach()
    return vector.numpy() if vector.device.type == "cpu" else vector


def words(vector: NDArray[np.int64], bits: int) -> NDArray[Any]:
    """A checked numpy vector modulo 2^bits, in the unsigned type that sums are accumulated in; a new array.

    Bits above ``bits`` are left as they are: packing and lifting look at the low ones only.
    """
    return np.ascontiguousarray(vector).astype(accumulator_dtype(bits))
