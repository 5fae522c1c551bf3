"""Sums under keys that nobody holds: each party encrypts under its own, the server learns only the sum of the keys.

The construction is ACORN's (Bell, Gascon, Lepoint, Li, Meiklejohn, Raykova and Yun 2022, eprint 2022/1461, section
3.2): ring-LWE masks that add up with their keys, whose sum comes from a secure sum, and Hint-RLWE for what that shows.

One round of party u, in the ring R_q = Z_q[X]/(X^N + 1) (Brakerski, Fan and Vercauteren's encryption, symmetric):

    key        s_u             N coefficients from the discrete Gaussian of width sigma, fresh for this round
    block k    c_uk = a_k s_u + e_uk + Delta m_uk,   e_uk from the same distribution, a_k public, the same for all
    server     C_k = sum of c_uk over the survivors;  S = sum of s_u, through the *masked* sum of N small integers
               C_k - a_k S = sum of e_uk + Delta sum of m_uk

The long vector costs a party the same whatever the number of its neighbours, and the server the same whatever drops
out: a dropped party's c_uk is left out of C_k, as its key is left out of S by the masked protocol.

**Threat model.** As :class:`choral.protocols.Masked`: the server and up to ``corrupt`` parties do whatever they like.

**Guarantee** (unit: one vector of one round). Let H be the honest parties, V the survivors that the masked sum was
opened for; the masked protocol gives at least corrupt + 2 in V, hence two honest ones. Whatever the coalition sees
(all c_uk of all parties, its own keys, errors and values, the sum of keys over V) says of the honest vectors only
their sum over V.

**Argument.** (1) Of the honest keys the coalition learns T = sum of s_u over V and H, by the guarantee of the masked
sum, and then, subtracting, the sums E_k of their errors and of their vectors. It has nobody to ask for more: no key
exists that opens anything, so there is no decryption to abuse, and a ciphertext that it makes up itself gains it
nothing.
(2) Two assignments of values to V and H with the same sum are joined by |V and H| - 1 exchanges between two parties i
and j (one gains what the other loses). Give the coalition all other honest keys and errors as well. What is hidden
from it then is s_i with T' = s_i + s_j known, and e_ik likewise. The product of two discrete Gaussian densities of
width sigma at x and T' - x is one of width sigma / sqrt 2 around T'/2: **exactly** s_i ~ D(sigma / sqrt 2, T'/2), and
so e_ik. If a_k s_i + e_ik with these looks uniform, so does c_ik, which hides m_ik, and c_jk = a_k T' + E'_k + Delta
(m_ik + m_jk) - c_ik tells no more.
(3) It does look uniform: a ring-LWE sample whose secret and errors are centred and of width sigma / 2 becomes such a
sample when one adds, oneself, a secret and errors of width sigma / 2 around T'/2. For widths of at least sqrt 2 times
the smoothing parameter of Z the sum of the two is D(sigma / sqrt 2, T'/2) (Peikert 2010, theorem 3.1; Micciancio and
Peikert 2013, theorem 3.3): at sigma / 2 = 3.2 to within 2^-140 per coefficient. This is Hint-RLWE (Kim, Lee, Seo and
Song 2023, theorem 1: 1 / sigma_0^2 = 2 (1 / sigma^2 + 1 / sigma^2)) with the other party as the hint's mask.
(4) Of an honest party outside V nothing but its c_uk is ever known: plain ring-LWE at width 6.4.
So: the guarantee holds if ring-LWE with secrets and errors of width 3.2 is hard at (N, q), and the masked sum is
secure. Each exchange costs that assumption twice (c_i to uniform and back), in as many samples as there are blocks, and
the distances of (3) and of the sampler (2^-120) for every coefficient: below 2^-80 in all for the longest vector.

**Who chooses the survivors.** The exchange of (2) holds for a V that the server picks after seeing the ciphertexts, as
long as i and j are both in V or both out. The whole statement, over several exchanges, is for a V that does not depend
on the ciphertexts' contents (whoever drops out, drops out for its own reasons); if it does, the argument loses a
factor of as many sets as the server could pick. No attack is known; a proof would need ciphertexts that a simulator
can open later.

**Why fresh keys and public randomness.** Two vectors under one key and one a_k subtract to Delta (m - m') plus small
errors. A key is drawn here, inside :func:`encrypt`, and never an argument; a_k is derived from the session's digest,
which every party has put a nonce into after all were committed, and the round's number. (Who shows its nonce last can
stop an opening and have another: a choice among a few uniform a_k, not a choice of a_k.)

**Parameters.** sigma = 6.4, so that the assumption is at width 3.2, that of the homomorphic encryption standard
(8 / sqrt 2 pi = 3.19); N and log2 q within its table for secrets from the error distribution, at 128 bits
(:data:`~choral.protocols.homomorphic.split.parameters.MODULUS_LIMIT`); a_k from AES-128 in counter mode under a public
seed, taken as random (as FrodoKEM does), by rejection, hence exactly uniform. "128 bits" is in the cost model of that
standard, and in gates; by core-SVP the same rings have 100 to 106
(tests/protocols/homomorphic/split/test_lattice_security.py), and 88 to 94 against quantum sieves (ChaLoy21). All
parties of a round share the a_k, so that one lattice reduction may serve against all n keys.

**What it does not do.** A corrupt party can send any vector, or garble the sum: that is found, but not whose it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from choral.protocols.crypto.mask_stream import expand
from choral.protocols.crypto.modular_integers import pack, unpack
from choral.protocols.crypto.single_use import check_process
from choral.protocols.errors import FaultyPartyError, GarbledSumError, LateVectorError, SpecError, StateUsedError
from choral.protocols.homomorphic.messages import Ciphertext, read_ciphertext
from choral.protocols.homomorphic.ring.arithmetic import Kernels, balanced
from choral.protocols.homomorphic.ring.choose_kernels import kernels
from choral.protocols.homomorphic.ring.gaussian import sample
from choral.protocols.homomorphic.split.decoding import decode
from choral.protocols.homomorphic.split.parameters import BATCH, SplitParameters
from choral.protocols.interface import IntVector
from choral.protocols.masking import messages
from choral.protocols.masking.signing import SESSION_BYTES, digest
from choral.protocols.own_vector import checked, is_tensor


@dataclass(frozen=True, kw_only=True)
class SplitRound:
    """What all parties and the server know of one round; nothing of it is secret.

    session: 32 bytes, the digest that fixes the session. number: the round, from 1.
    """

    parameters: SplitParameters
    session: bytes
    number: int

    @property
    def id(self) -> bytes:
        return self.session[:SESSION_BYTES]

    @property
    def key(self) -> bytes:
        """Names the sum of keys that opens this round's sum: 16 bytes, in every ciphertext."""
        return digest("split/key", self.session, self.number, self.parameters.terms().encode())[:16]

    @property
    def public_seed(self) -> bytes:
        """All a_k are drawn from it."""
        return digest("split/public", self.session, self.number)

    def public(self, batch: int) -> NDArray[np.int32]:
        """a_k for the blocks of a batch, transformed: residues, shape (L, N lanes)."""
        chosen = self.parameters
        count = chosen.degree * chosen.lanes(batch)
        words, region = chosen.words(count), chosen.words(chosen.degree * BATCH)
        out = np.empty((chosen.prime_count, count), np.int32)
        for row, prime in enumerate(chosen.ring.primes):
            stream = expand(self.public_seed, words, np.uint32, offset=(batch * chosen.prime_count + row) * region)
            residues = kernels().accept(stream, prime, count)
            if residues is None:  # once in 2^100
                raise GarbledSumError(f"the public randomness of round {self.number} ran out; go on with the next")
            out[row] = residues
        return out

    def batches(self, index: int) -> range:
        """The batches in message ``index``."""
        each = self.parameters.message_blocks // BATCH
        return range(index * each, min((index + 1) * each, self.parameters.batches))


class Encrypted(NamedTuple):
    """key: int64, shape (N,), secret, for the masked sum of keys and nothing else. messages: to the server, in
    order."""

    key: IntVector
    messages: Iterator[bytes]

    def __repr__(self) -> str:
        return "<Encrypted: a key and messages>"


def encrypt(vector: Any, terms: SplitRound, *, randomness: Callable[[int], bytes]) -> Encrypted:
    """Encrypt ``vector`` under a key that is drawn here.

    vector: int64, shape (length,), |value| <= bound; numpy, or a torch tensor (on a GPU it is encrypted there).
    The messages are made as they are asked for, each of some 4 MB; the vector must not change meanwhile. The party
    sends its key into the masked sum after the last of them.
    Raises: InputError, before anything is drawn.
    """
    spec = terms.parameters.spec
    vector = checked(vector, spec.length, spec.bound, spec.weight_bound)
    seed = randomness(32)
    key = sample(seed, terms.parameters.degree).astype(np.int64)
    return Encrypted(key, _messages(vector, terms, key, seed, os.getpid()))


def without_key(vector: IntVector, terms: SplitRound) -> Iterator[NDArray[np.int32]]:
    """The residues of ``vector``'s ciphertext if its key were zero, and some errors: shape (L, N lanes), by batch.

    For an auditor who knows the vector and holds ciphertexts against it. **Never to be sent.**
    """
    key = np.zeros(terms.parameters.degree, np.int64)
    for index, raw in enumerate(_messages(vector, terms, key, bytes(32), os.getpid())):
        yield from residues(read_ciphertext(raw, sender="", body=len(raw)).body, index, terms)


def residues(body: bytes, index: int, terms: SplitRound) -> Iterator[NDArray[np.int32]]:
    """What message ``index`` of a ciphertext holds: the residues that travel, shape (L, M), by batch."""
    chosen, bulk = terms.parameters, kernels()
    nothing = bulk.transform(chosen.ring, np.zeros(chosen.degree))
    primes = np.array(chosen.ring.primes, np.uint32)[:, None]
    for batch, packed in parts(body, index, terms):
        sums = np.zeros((chosen.prime_count, chosen.coefficients(batch)), np.uint32)
        _add(packed, sums, batch, chosen)
        if chosen.is_cut(batch):
            yield (sums % primes).view(np.int32)
        else:
            yield bulk.remove(chosen.ring, sums.view(np.int32), terms.public(batch), nothing, lanes=chosen.lanes(batch))


def parts(body: bytes, index: int, terms: SplitRound) -> Iterator[tuple[int, memoryview]]:
    """The batches of a message of the right length, packed."""
    done = 0
    for batch in terms.batches(index):
        size = terms.parameters.coefficients(batch) * terms.parameters.modulus_bits // 8
        yield batch, memoryview(body)[done : done + size]
        done += size


def _pack(residues: NDArray[np.int32], batch: int, chosen: SplitParameters, bulk: Kernels) -> bytes:
    """A batch as it travels, prime after prime."""
    rows = zip(residues, chosen.widths, strict=True)
    if chosen.is_cut(batch):
        return b"".join(pack(np.ascontiguousarray(row).view(np.uint32), bits) for row, bits in rows)
    return b"".join(bulk.pack(row, bits) for row, bits in rows)


def _add(packed: memoryview, sums: NDArray[np.uint32], batch: int, chosen: SplitParameters) -> None:
    """Add a batch as :func:`_pack` packed it to ``sums``, shape (L, M), in place, mod 2^32."""
    done, bulk = 0, kernels()
    for row, bits in zip(sums, chosen.widths, strict=True):
        piece = packed[done : done + row.size * bits // 8]
        done += len(piece)
        if chosen.is_cut(batch):
            row += unpack(bytes(piece), row.size, bits)
        else:
            bulk.add(np.frombuffer(piece, "<u4"), bits, row)


def _messages(vector: Any, terms: SplitRound, key: IntVector, seed: bytes, process: int) -> Iterator[bytes]:
    """process: which may ask for them. From two processes, a vector that changed in one of them would be encrypted
    twice under one key and the same errors, and the difference would show.
    """
    chosen = terms.parameters
    bulk = kernels(str(vector.device) if is_tensor(vector) else "cpu")
    scales = _scales(chosen)
    transformed = bulk.transform(chosen.ring, key.astype(np.float64))
    for index in range(chosen.messages):
        check_process(process, "a ciphertext's key")
        packed = []
        for batch in terms.batches(index):
            lanes, before = chosen.lanes(batch), chosen.before(batch)
            count = chosen.degree * lanes
            errors = sample(seed, count, offset=chosen.degree * (1 + before))  # of the stream the first N are the key
            # Value j N lanes + z of the batch lies in slot j of coefficient z. Beyond the vector's end is 0.
            start = before * chosen.block_values
            piece = vector[start : start + count * chosen.slots]
            if chosen.is_cut(batch):
                piece = _spread(piece, chosen)
            digits = bulk.digits(piece, count, chosen.digits, chosen.slot_bits)
            residues = bulk.encrypt(chosen.ring, digits, scales, errors, terms.public(batch), transformed, lanes=lanes)
            if chosen.is_cut(batch):  # back to coefficients, and of those the first
                zeros = np.zeros_like(residues)
                residues = bulk.remove(chosen.ring, residues, zeros, zeros, lanes=1)[:, : chosen.tail]
            packed.append(_pack(residues, batch, chosen, bulk))
        yield messages.encode(Ciphertext(terms.id, terms.number, terms.key, index, b"".join(packed)))


def _spread(piece: Any, chosen: SplitParameters) -> Any:
    """The last values as they lie in a block of which only ``tail`` coefficients are used."""
    shape = (chosen.slots, chosen.degree)
    rows = piece.new_zeros(shape) if is_tensor(piece) else np.zeros(shape, np.int64)
    for j in range(chosen.slots):
        values = piece[j * chosen.tail : (j + 1) * chosen.tail]
        rows[j, : len(values)] = values
    return rows.reshape(-1)


def _scales(chosen: SplitParameters) -> NDArray[np.float64]:
    """What each digit counts for: Delta 2^(slot_bits first), and 2^32 for the higher half; balanced, shape (L, G)."""
    powers = [
        chosen.scale_bits + chosen.slot_bits * digit.first + 32 * (digit.half == "high") for digit in chosen.digits
    ]
    return np.array([[balanced(1 << power, prime) for power in powers] for prime in chosen.ring.primes], np.float64)


class Collector:
    """The server's side of one round. It holds no key, and opens nothing but the one sum that S belongs to.

    Memory: the sum, 4 bytes per residue, and what each party that is sending has sent so far, until ``include``.
    """

    def __init__(self, terms: SplitRound, parties: Sequence[str]) -> None:
        chosen = terms.parameters
        self._terms = terms
        self._arriving: dict[str, list[bytes]] = {party: [] for party in parties}
        self._included: set[str] = set()
        self._sums = np.zeros(chosen.prime_count * (chosen.whole * chosen.degree + chosen.tail), np.uint32)
        self._most = (1 << 32 - max(chosen.widths)) - 1
        self._pending = 0
        self._opened = False

    def receive(self, party: str, raw: bytes) -> None:
        """Take the next message of a party.

        Residues are not checked to be below their primes: any bits are residues, and what a party sends is its own.

        Raises: LateVectorError once the sum is open; MessageError; FaultyPartyError for one of another session, round
        or key, out of order, of another length, or after the last.
        """
        chosen, terms = self._terms.parameters, self._terms
        if self._opened:
            raise LateVectorError(party)
        if party not in self._arriving:
            raise FaultyPartyError(party, "it has sent its whole ciphertext, or is no party of this round")
        message = read_ciphertext(raw, sender=party, body=chosen.message_blocks * chosen.block_bytes)
        arrived = self._arriving[party]
        if message.session != terms.id or message.round != terms.number:
            raise FaultyPartyError(party, "its ciphertext is of another session or round")
        if message.key != terms.key:
            raise FaultyPartyError(party, "its ciphertext is for another sum of keys, or has other parameters")
        if message.index != len(arrived) or message.index >= chosen.messages:
            raise FaultyPartyError(
                party, f"expected piece {len(arrived)} of {chosen.messages} of its ciphertext, got {message.index}"
            )
        count = sum(chosen.coefficients(batch) for batch in terms.batches(message.index))
        size = count * chosen.modulus_bits // 8
        if len(message.body) != size:
            raise FaultyPartyError(
                party, f"expected {size} bytes in piece {message.index} of its ciphertext, got {len(message.body)}"
            )
        arrived.append(message.body)

    def repeats(self, party: str, raw: bytes) -> bool:
        """Whether a message that was refused is one of this party's that is there already. Raises: MessageError."""
        chosen, arrived = self._terms.parameters, self._arriving.get(party, [])
        message = read_ciphertext(raw, sender=party, body=chosen.message_blocks * chosen.block_bytes)
        return message.index < len(arrived) and message.body == arrived[message.index]

    def complete(self, party: str) -> bool:
        """Whether all of its messages are there: only then its key may be let into the masked sum."""
        return party in self._arriving and len(self._arriving[party]) == self._terms.parameters.messages

    def include(self, party: str) -> None:
        """Add a party's ciphertext, its key having been let into the sum of keys.

        Raises: StateUsedError once the sum is open; FaultyPartyError when something of it is missing.
        """
        if self._opened:
            raise StateUsedError("this round is finished")
        if not self.complete(party):
            raise FaultyPartyError(party, "its ciphertext is not complete")
        if self._pending == self._most:
            self._settle()
        for index, body in enumerate(self._arriving.pop(party)):
            for batch, packed in parts(body, index, self._terms):
                _add(packed, self._sum_of(batch), batch, self._terms.parameters)
        self._included.add(party)
        self._pending += 1

    def open(self, keys: IntVector, survivors: Sequence[str]) -> IntVector:
        """The sum over ``survivors``, whose keys add up to ``keys`` (int64, shape (N,)): int64, shape (length,).

        Raises: StateUsedError the second time, or when others than the survivors are in the sum; SpecError for keys of
        another shape; GarbledSumError.
        """
        if self._opened:
            raise StateUsedError("this round is finished")
        if keys.shape != (self._terms.parameters.degree,):
            raise SpecError(f"expected {self._terms.parameters.degree} numbers as the sum of keys, got {keys.shape}")
        if set(survivors) != self._included:
            raise StateUsedError("the keys are summed over other parties than the ciphertexts")
        self._opened = True
        self._settle()
        terms, chosen = self._terms, self._terms.parameters
        bulk = kernels()
        transformed = bulk.transform(chosen.ring, keys.astype(np.float64))
        total = np.empty(chosen.spec.length, np.int64)
        for batch in range(chosen.batches):
            lanes, start = chosen.lanes(batch), chosen.before(batch) * chosen.block_values
            sums, public = self._sum_of(batch), terms.public(batch)
            if chosen.is_cut(batch):  # C - NTT^-1(a S), in coefficients
                masks = bulk.remove(chosen.ring, np.zeros_like(public), public, transformed, lanes=1)
                sums = sums + masks[:, : chosen.tail].view(np.uint32)
                opened = (sums % np.array(chosen.ring.primes, np.uint32)[:, None]).view(np.int32)
            else:
                opened = bulk.remove(chosen.ring, sums.view(np.int32), public, transformed, lanes=lanes)
            values = decode(opened, chosen, len(survivors)).reshape(-1)
            total[start : start + values.size] = values[: chosen.spec.length - start]
        self._sums = np.zeros(0, np.uint32)
        return total

    def _sum_of(self, batch: int) -> NDArray[np.uint32]:
        """Shape (L, M), a view."""
        chosen = self._terms.parameters
        start = chosen.prime_count * chosen.degree * chosen.before(batch)
        size = chosen.prime_count * chosen.coefficients(batch)
        return self._sums[start : start + size].reshape(chosen.prime_count, -1)

    def _settle(self) -> None:
        """Reduce the sums, before they pass 32 bits."""
        chosen = self._terms.parameters
        for batch in range(chosen.batches):
            rows = self._sum_of(batch)
            rows %= np.array(chosen.ring.primes, np.uint32)[:, None]
        self._pending = 1
