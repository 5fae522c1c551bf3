"""Masks added where the vector lives: numpy on the CPU, the device stream on a GPU. The bytes are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from choral.protocols.crypto.mask_stream import add_mask
from choral.protocols.crypto.modular_integers import pack
from choral.protocols.own_vector import is_tensor, words


def masked(vector: Any, bits: int, added: Sequence[bytes], subtracted: Sequence[bytes]) -> bytes:
    """``vector`` plus and minus the masks of these 32-byte seeds, mod 2^bits, packed.

    vector: as :func:`choral.protocols.own_vector.checked` gives it. A tensor is copied and masked on its own device;
    what leaves it is masked already.
    """
    if is_tensor(vector):
        return pack(masked_on_device(vector, bits, added, subtracted), bits)
    total = words(vector, bits)
    for seed in added:
        add_mask(total, seed)
    for seed in subtracted:
        add_mask(total, seed, subtract=True)
    return pack(total, bits)


def masked_on_device(vector: Any, bits: int, added: Sequence[bytes], subtracted: Sequence[bytes]) -> Any:
    """The masked words of a torch tensor, as uint32 (bits <= 32) or uint64 in numpy, not yet reduced mod 2^bits."""
    import torch

    from choral.protocols.crypto.mask_stream_device import add_mask_tensor

    total = vector.detach().to(torch.int32 if bits <= 32 else torch.int64, copy=True).contiguous()
    for seed in added:
        add_mask_tensor(total, seed)
    for seed in subtracted:
        add_mask_tensor(total, seed, subtract=True)
    return total.cpu().numpy().view("u4" if bits <= 32 else "u8")
