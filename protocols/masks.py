"""Masks added where the vector lives: numpy on the CPU, the device stream on a GPU. The bytes are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from choral.protocols.integers import pack
from choral.protocols.stream import add_mask
from choral.protocols.vectors import words


def masked(vector: Any, bits: int, added: Sequence[bytes], subtracted: Sequence[bytes]) -> bytes:
    """``vector`` plus and minus the masks of these 32-byte seeds, mod 2^bits, packed.

    vector: checked (see :mod:`choral.protocols.vectors`).
    """
    total = words(vector, bits)
    for seed in added:
        add_mask(total, seed)
    for seed in subtracted:
        add_mask(total, seed, subtract=True)
    return pack(total, bits)
