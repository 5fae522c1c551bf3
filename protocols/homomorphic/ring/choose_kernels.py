"""Which code does the ring's bulk arithmetic: compiled for the CPU where numba is installed, else torch's."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from choral.protocols.homomorphic.ring.arithmetic import Kernels


@lru_cache(maxsize=4)
def kernels(device: str = "cpu") -> Kernels:
    """The fastest kernels for a device: numba's on the CPU if it is installed, else torch's."""
    if device == "cpu" and find_spec("numba") is not None:
        from choral.protocols.homomorphic.ring import kernels_numba as ring_numba

        return ring_numba.NumbaKernels()
    from choral.protocols.homomorphic.ring import kernels_torch as ring_torch

    return ring_torch.TorchKernels(device)
