"""A party's steps within a round under a shared key; :mod:`.party` says what they protect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tenseal.sealapi as sealapi
from numpy.typing import NDArray

from choral.protocols.crypto.modular_integers import pack, wrap
from choral.protocols.crypto.single_use import Current, Once
from choral.protocols.errors import (
    SERVER,
    FaultyServerError,
    GarbledSumError,
    InputError,
    SpecError,
    TooFewSurvivorsError,
)
from choral.protocols.homomorphic.messages import Ciphertext
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.ckks import CkksPlan
from choral.protocols.homomorphic.shared.seal import RingKey
from choral.protocols.homomorphic.shared.seal_files import CiphertextError
from choral.protocols.homomorphic.shared.setup import Plan, SharedPolicy
from choral.protocols.masking import messages as base
from choral.protocols.own_vector import checked, is_tensor


@dataclass(frozen=True, repr=False)
class Own:
    """What a party knows of itself and of the setup. private: of its X25519 key in this session."""

    setup: wire.KeySetup
    digest: bytes
    index: int
    identity: bytes
    policy: SharedPolicy
    plan: Plan
    private: bytes
    nonce: bytes

    def name(self, party: int) -> str:
        return self.setup.roster[party]

    def signed(self, party: int, message: bytes, signature: bytes) -> bool:
        return self.policy.signatures.valid(self.policy.directory[self.name(party)], message, signature)


@dataclass(frozen=True, repr=False)
class Chain:
    """link: the chain's secret before round ``last`` + 1."""

    own: Own
    session: bytes
    commitment: bytes
    link: bytes
    last: int
    current: Current


@dataclass(frozen=True, repr=False)
class Round:
    chain: Chain
    number: int
    id: bytes
    key: RingKey


class Keyed(Once[Round]):
    """Has the key of a round; waits for this party's vector."""

    def encrypt(self, vector: Any) -> tuple[Encrypted, Iterator[bytes]]:
        """The vector's Ciphertexts, made one by one as they are taken: memory for one piece.

        vector: int64 (BFV; a numpy array or a torch tensor) or float64 (CKKS; a numpy array), shape (length,), every
        |value| within the bound. It must not change before the last piece was taken.

        From here on no sum of an earlier round is opened any more. Raises: InputError for another vector, and the state
        is not spent; StateUsedError when a later round has begun.
        """
        for ready in tuple(self._content):
            vector = _own_vector(vector, ready.chain.own)
        ready = self._take()
        ready.chain.current.enter(ready.number)
        return Encrypted(ready), _ciphertexts(ready, vector)


def _own_vector(vector: Any, own: Own) -> NDArray[Any]:
    setup = own.setup
    if setup.scheme == "bfv":
        vector = checked(vector, setup.length, setup.bound)
        return np.ascontiguousarray(vector.cpu().numpy() if is_tensor(vector) else vector)
    if not isinstance(vector, np.ndarray) or vector.dtype != np.float64 or vector.shape != (setup.length,):
        raise InputError(f"expected a numpy array of float64, shape ({setup.length},)")
    if not bool(np.all(np.abs(vector) <= setup.magnitude)):
        raise InputError(f"expected every |value| <= {setup.magnitude}: this vector has one outside, or not a number")
    return np.ascontiguousarray(vector)


def _ciphertexts(ready: Round, vector: NDArray[Any]) -> Iterator[bytes]:
    own, plan = ready.chain.own, ready.chain.own.plan
    ring, encryptor = ready.key.ring, ready.key.encryptor()
    step = terms.fresh_per_piece(plan) * plan.block
    for index, start in enumerate(range(0, own.setup.length, step)):
        piece = vector[start : start + step]
        body = b"".join(
            ring.dump_fresh(encryptor.encrypt_symmetric(plan.encode(ring, piece[at : at + plan.block])))
            for at in range(0, piece.size, plan.block)
        )
        yield base.encode(Ciphertext(own.setup.session, ready.number, ready.id, index, body))


class Encrypted(Once[Round]):
    """Has sent its vector; may be asked to open the sum, once."""

    def open(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Decrypt the exact sum and report it to the server, as TotalPieces: BFV only.

        Nothing is reported unless the whole sum is readable. Raises: SpecError in CKKS, whose decryptions stay with the
        parties; StateUsedError when a later round has begun; MessageError, FaultyServerError for other pieces than of
        this round and key, or without this party; TooFewSurvivorsError; GarbledSumError.
        """
        for ready in tuple(self._content):
            if ready.chain.own.setup.scheme != "bfv":
                raise SpecError("a sum of floats is for the parties alone: it is never reported to the server")
        ready = self._take()
        total, _ = _decrypted(ready, pieces)
        return _totals(ready.chain.own.setup, ready.number, total)

    def read(self, pieces: Iterable[bytes]) -> tuple[NDArray[Any], tuple[str, ...]]:
        """Decrypt the sum for this party itself: the total, and whose vectors are in it. Raises: see :meth:`open`."""
        return _decrypted(self._take(), pieces)


def modulus_bits(setup: wire.KeySetup) -> int:
    """Of a total in clear: the least b with 2^b >= 2 n bound + 1."""
    return (2 * len(setup.roster) * setup.bound).bit_length()


def _totals(setup: wire.KeySetup, number: int, total: NDArray[np.int64]) -> Iterator[bytes]:
    bits = modulus_bits(setup)
    step = terms.values_per_piece(bits)
    for index, start in enumerate(range(0, setup.length, step)):
        body = pack(wrap(total[start : start + step], bits), bits)
        yield base.encode(wire.TotalPiece(setup.session, number, index, body))


def _decrypted(ready: Round, pieces: Iterable[bytes]) -> tuple[NDArray[Any], tuple[str, ...]]:
    own, plan, ring = ready.chain.own, ready.chain.own.plan, ready.key.ring
    ready.chain.current.check(ready.number)
    setup, size = own.setup, plan.parameters.full_bytes
    n, per_piece = len(setup.roster), terms.sums_per_piece(plan)
    limit = wire.limit(wire.SumPiece) + n // 8 + 17 + per_piece * size
    total = np.empty(setup.length, plan.dtype)
    blocks, done, bitmap = terms.blocks_of(plan, setup.length), 0, b""
    decryptor, plain = ready.key.decryptor(), sealapi.Plaintext()
    survivors: tuple[str, ...] = ()
    for index, raw in enumerate(pieces):
        message = wire.read(wire.SumPiece, raw, sender=SERVER, limit=limit)
        _check_piece(ready, message, index, bitmap)
        if not bitmap:
            bitmap, survivors = message.survivors, _survivors(own, message.survivors)
        count = min(per_piece, blocks - done)
        if len(message.body) != count * size:
            raise FaultyServerError(f"expected {count} ciphertexts in piece {index} of the sum")
        for at in range(0, len(message.body), size):
            start = done * plan.block
            stop = min(start + plan.block, setup.length)
            _decrypt(ready, decryptor, memoryview(message.body)[at : at + size], plain)
            total[start:stop] = plan.decode(ring, plain, stop - start)
            done += 1
    if done != blocks:
        raise FaultyServerError(f"expected {blocks} ciphertexts of the sum, got {done}")
    if isinstance(plan, CkksPlan):
        largest = len(survivors) * setup.magnitude + plan.error_bound
    else:
        largest = len(survivors) * setup.bound
    if not bool(np.all((total >= -largest) & (total <= largest))):
        raise GarbledSumError(f"the sum of {len(survivors)} vectors has a value outside what they can add up to")
    return total, survivors


def _check_piece(ready: Round, message: wire.SumPiece, index: int, bitmap: bytes) -> None:
    setup = ready.chain.own.setup
    if message.session != setup.session or message.round != ready.number:
        raise FaultyServerError(f"a piece of another session's or round's sum, not of round {ready.number}")
    if message.key != ready.id:
        raise FaultyServerError("the sum is under another key than this party's")
    if message.index != index:
        raise FaultyServerError(f"expected piece {index} of the sum, got piece {message.index}")
    if bitmap and message.survivors != bitmap:
        raise FaultyServerError("the pieces of the sum are over different survivors")


def _survivors(own: Own, bitmap: bytes) -> tuple[str, ...]:
    setup = own.setup
    found = base.from_bitmap(bitmap, len(setup.roster))
    if found is None:
        raise FaultyServerError("the survivors are no set of this roster's parties")
    if len(found) < setup.min_survivors:
        raise TooFewSurvivorsError("refused to open a sum", survivors=len(found), needed=setup.min_survivors)
    if own.index not in found:
        raise FaultyServerError("the sum is said not to have this party's vector, which was sent")
    return tuple(setup.roster[party] for party in sorted(found))


def _decrypt(ready: Round, decryptor: Any, body: memoryview, plain: Any) -> None:
    plan = ready.chain.own.plan
    try:
        ciphertext = ready.key.ring.load_sum(body)
    except CiphertextError as error:
        raise FaultyServerError(f"the sum is no ciphertext: {error}") from None
    if plan.margin_bits and int(decryptor.invariant_noise_budget(ciphertext)) < plan.margin_bits:
        raise GarbledSumError("the sum has more noise than its parties can have added: another key or changed bytes")
    decryptor.decrypt(ciphertext, plain)
