"""From residues to the values in a coefficient, with a check that it holds a sum and not garbage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from choral.protocols.errors import GarbledSumError
from choral.protocols.homomorphic.ring.arithmetic import LIMB
from choral.protocols.homomorphic.ring.choose_kernels import kernels
from choral.protocols.homomorphic.split.parameters import SplitParameters


def decode(residues: NDArray[np.int32], chosen: SplitParameters, parties: int) -> NDArray[np.int64]:
    """Each coefficient, sum of errors + sum over j of 2^(scale_bits + slot_bits j) value_j mod q, as its values.

    residues: shape (L, M). parties: how many are in the sum. The result: int64, shape (slots, M).

    Raises: GarbledSumError unless every sum of errors is within its bound and every value within parties * bound; a
    coefficient that is uniform modulo q passes with probability of about 2^-MARGIN_BITS or less, a block of them never.
    """
    # Half of each field's range is added, so that none is negative.
    half = (1 << chosen.scale_bits - 1) + sum(
        1 << chosen.scale_bits + chosen.slot_bits * (j + 1) - 1 for j in range(chosen.slots)
    )
    limbs = kernels().limbs(chosen.ring, residues, half)
    error = _bits(limbs, 0, chosen.scale_bits) - (1 << chosen.scale_bits - 1)
    used = chosen.scale_bits + chosen.slots * chosen.slot_bits
    beyond = _bits(limbs, used, min(62, len(limbs) * LIMB - used))
    if beyond.any() or int(np.abs(error).max()) > chosen.error_bound(parties):
        raise GarbledSumError("the sum of ciphertexts does not open under the sum of keys")
    values = np.empty((chosen.slots, residues.shape[1]), np.int64)
    largest = parties * chosen.spec.bound
    for j in range(chosen.slots):
        slot = _bits(limbs, chosen.scale_bits + j * chosen.slot_bits, chosen.slot_bits)
        if chosen.slot_bits == 64:
            slot ^= np.int64(-(1 << 63))
        else:
            slot -= 1 << chosen.slot_bits - 1
        if int(slot.max()) > largest or int(slot.min()) < -largest:
            raise GarbledSumError("a sum of values is larger than its parties' bounds allow")
        values[j] = slot
    return values


def _bits(limbs: NDArray[np.int64], first: int, count: int) -> NDArray[np.int64]:
    """Bits ``first`` to ``first + count - 1``, count <= 64, of the numbers; a new array."""
    out = np.zeros(limbs[0].shape, np.uint64)
    done = 0
    while done < count and (first + done) // LIMB < len(limbs):
        place, shift = divmod(first + done, LIMB)
        size = min(LIMB - shift, count - done)
        out |= (limbs[place].view(np.uint64) >> np.uint64(shift) & np.uint64((1 << size) - 1)) << np.uint64(done)
        done += size
    return out.view(np.int64)
