"""Microsoft SEAL through ``tenseal.sealapi``: rings, seeded symmetric ciphertexts, and bytes in and out.

A ciphertext is a pair (c0, c1) with c0 + c1 s = message + error. One that is encrypted under the secret key itself has
a uniform c1 = a, so 64 bytes of seed stand for it, and on the wire a fresh ciphertext is

    seed (64) | c0, coefficient by coefficient for each prime, in the whole bytes that a residue needs (little-endian)

and a sum, whose c1 has no seed any more, is c0 | c1. Nothing else travels: no parameters, no compression, no structure.
SEAL's own loader takes more than a party should send (three polynomials for two, no seed, compressed streams); here it
is only given bytes that were laid out by :class:`SealRing`, after their length and the range of every residue were
checked. Files in memory (:mod:`.seal_files`) carry them to SEAL and back.

What SEAL wrote must be, byte for byte in everything but the payload, what this module expects of its format: else
SealFormatError.

Encryption randomness (a and the errors) is SEAL's own: BLAKE2xb, seeded anew for each ciphertext from ``/dev/urandom``.
It cannot be an argument, for SEAL's seeded generator starts over with every ciphertext, and two ciphertexts with one a
and one error show the difference of their messages.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import prod
from typing import Any, Literal

import numpy as np
import tenseal.sealapi as sealapi
from numpy.typing import NDArray

from choral.protocols.crypto.mask_stream import expand
from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.shared.seal_files import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    RAW,
    CiphertextError,
    SealFormatError,
    saved,
    scratch,
    version_of_seal,
)

ERROR_BOUND = 21
"""No coefficient of a fresh error is larger: SEAL draws it as the difference of two binomials of 21 coins each."""

ERROR_VARIANCE = ERROR_BOUND / 2
"""Of a coefficient of a fresh error: 42 coins of variance 1/4 (standard deviation 3.24)."""

SEED_BYTES = 64
KEY_SEED_BYTES = 32

_BLAKE2XB = 1
_CIPHERTEXT = struct.Struct("<32s?QQQdQ")
_PLAINTEXT = struct.Struct("<32sQd")
_COUNT = struct.Struct("<Q")
_SEED = struct.Struct(f"<{HEADER_BYTES}sB{SEED_BYTES}s")

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class RingParameters:
    """R = Z[X] / (X^degree + 1) modulo ``primes``; equal parameters give equal rings on any machine.

    primes: the coefficient modulus of ciphertexts is their product. special: one prime more where there are several,
    which SEAL sets aside for switching keys; no such key is ever made, so nothing is ever encrypted modulo it.
    plain_modulus: of messages in BFV; 0 in CKKS.

    Security: SEAL's 128-bit level of the homomorphic encryption standard (Albrecht et al. 2018, table 1: uniform
    ternary secrets, classical attacks): at most 27, 54, 109 bits for degree 1024, 2048, 4096. Checked when the ring is
    made, over ``special`` too.
    """

    scheme: Literal["bfv", "ckks"]
    degree: int
    primes: tuple[int, ...]
    special: int
    plain_modulus: int

    @classmethod
    def of(cls, scheme: Literal["bfv", "ckks"], degree: int, bits: tuple[int, ...]) -> RingParameters:
        """With SEAL's primes of so many bits, the last of several as the special one, and no plain modulus yet."""
        primes = primes_of(degree, bits)
        return cls(scheme, degree, primes[:-1] or primes, primes[-1] if len(primes) > 1 else 0, 0)

    @property
    def modulus(self) -> int:
        return prod(self.primes)

    @property
    def seeded_bytes(self) -> int:
        """Of a fresh ciphertext on the wire."""
        return SEED_BYTES + self.degree * sum(map(_width, self.primes))

    @property
    def full_bytes(self) -> int:
        """Of a sum of ciphertexts on the wire."""
        return 2 * self.degree * sum(map(_width, self.primes))


@cache
def primes_of(degree: int, bits: tuple[int, ...]) -> tuple[int, ...]:
    """SEAL's primes of so many bits, each 1 modulo 2 degree: the largest ones, so everybody's are the same."""
    return tuple(int(prime.value()) for prime in sealapi.CoeffModulus.Create(degree, list(bits)))


class SealRing:
    """A SEAL context: public parameters, no key. The server has this and nothing more.

    Raises: SpecError for parameters that SEAL refuses or that are below the 128-bit level; SealFormatError.
    """

    def __init__(self, parameters: RingParameters) -> None:
        self.parameters = parameters
        self.context = _context(parameters)
        self.evaluator = sealapi.Evaluator(self.context)
        self._id = struct.pack("<4Q", *self.context.first_parms_id())
        self._version = version_of_seal()

    def load_fresh(self, body: bytes | memoryview) -> Any:
        """The ciphertext of :meth:`RingKey.encrypt`. Raises: CiphertextError for other bytes, before SEAL has them."""
        if len(body) != self.parameters.seeded_bytes:
            raise CiphertextError(f"expected a ciphertext of {self.parameters.seeded_bytes} bytes, got {len(body)}")
        words = self._words(memoryview(body)[SEED_BYTES:], 1)
        seed = _SEED.pack(self._header(_SEED.size), _BLAKE2XB, bytes(body[:SEED_BYTES]))
        return self._load(words, seed)

    def load_sum(self, body: bytes | memoryview) -> Any:
        """The ciphertext of :meth:`dump_sum`. Raises: CiphertextError for other bytes."""
        if len(body) != self.parameters.full_bytes:
            raise CiphertextError(f"expected a sum of {self.parameters.full_bytes} bytes, got {len(body)}")
        return self._load(self._words(memoryview(body), 2), b"")

    def dump_sum(self, ciphertext: Any) -> bytes:
        """c0 | c1, ``full_bytes`` long. Raises: SealFormatError."""
        return self._dump(ciphertext, 2)[0]

    def dump_fresh(self, seeded: Any) -> bytes:
        """seed | c0 of SEAL's seeded form, ``seeded_bytes`` long. Raises: SealFormatError."""
        packed, tail = self._dump(seeded, 1)
        header, kind, seed = _SEED.unpack(tail)
        if header != self._header(_SEED.size) or kind != _BLAKE2XB:
            raise SealFormatError("SEAL did not write the seed of a ciphertext in the form known here")
        return bytes(seed) + packed

    def plaintext(self, coefficients: Words) -> Any:
        """The BFV plaintext with these coefficients, uint64, shape (degree,), each below the plain modulus."""
        inner = self._array(coefficients.size)
        head = _PLAINTEXT.pack(bytes(32), coefficients.size, 1.0)
        outer = self._header(HEADER_BYTES + len(head) + len(inner) + coefficients.nbytes)
        return scratch().load(sealapi.Plaintext(), self.context, outer, head, inner, coefficients)

    def coefficients(self, plaintext: Any) -> Words:
        """Of a BFV plaintext: uint64, shape (degree,)."""
        raw = saved(plaintext, self._version)
        start = _PLAINTEXT.size + HEADER_BYTES + _COUNT.size
        found = np.frombuffer(raw, "<u8", offset=start)
        if raw[_PLAINTEXT.size : start] != self._array(found.size) or found.size > self.parameters.degree:
            raise SealFormatError("SEAL did not write a plaintext in the form known here")
        coefficients = np.zeros(self.parameters.degree, np.uint64)
        coefficients[: found.size] = found
        return coefficients

    def _words(self, packed: memoryview, polynomials: int) -> Words:
        degree, done, parts = self.parameters.degree, 0, []
        for prime in self.parameters.primes * polynomials:
            size = degree * _width(prime)
            words = _widen(packed[done : done + size], prime)
            if int(words.max()) >= prime:
                raise CiphertextError("a ciphertext has a coefficient that is not reduced")
            parts.append(words)
            done += size
        return np.concatenate(parts)

    def _load(self, words: Words, tail: bytes) -> Any:
        head = self._head(words.size)
        outer = self._header(HEADER_BYTES + len(head) + words.nbytes + len(tail))
        ciphertext = scratch().load(sealapi.Ciphertext(self.context), self.context, outer, head, words, tail)
        if ciphertext.size() != 2 or not sealapi.is_valid_for(ciphertext, self.context):
            raise CiphertextError("SEAL does not take these bytes for a ciphertext of this ring")
        return ciphertext

    def _dump(self, saveable: Any, polynomials: int) -> tuple[bytes, bytes]:
        """The packed residues of so many polynomials, and what SEAL wrote after them."""
        raw = saved(saveable, self._version)
        count = polynomials * len(self.parameters.primes) * self.parameters.degree
        head = self._head(count)
        end = len(head) + 8 * count
        tail = _SEED.size if polynomials == 1 else 0
        if len(raw) != end + tail or self._without_scale(raw[: len(head)]) != self._without_scale(head):
            raise SealFormatError("SEAL did not write a ciphertext in the form known here")
        words = np.frombuffer(raw, "<u8", count, len(head)).reshape(-1, self.parameters.degree)
        primes = self.parameters.primes * polynomials
        packed = b"".join(_narrow(row, prime) for row, prime in zip(words, primes, strict=True))
        return packed, raw[end:]

    def _head(self, count: int) -> bytes:
        """What precedes the residues of a ciphertext: parameters, form, sizes, scale, correction factor, count."""
        parameters = self.parameters
        head = _CIPHERTEXT.pack(
            self._id, parameters.scheme == "ckks", 2, parameters.degree, len(parameters.primes), 1.0, 1
        )
        return head + self._array(count)

    @staticmethod
    def _without_scale(head: bytes) -> bytes:
        """CKKS writes its scale there; both sides know it from the parameters."""
        return head[:57] + head[65:]

    def _array(self, count: int) -> bytes:
        return self._header(HEADER_BYTES + _COUNT.size + 8 * count) + _COUNT.pack(count)

    def _header(self, size: int) -> bytes:
        return HEADER.pack(MAGIC, HEADER_BYTES, *self._version, RAW, 0, size)


@lru_cache(maxsize=16)
def ring_of(parameters: RingParameters) -> SealRing:
    """One SEAL context per process and ring, for making one takes longer than a sum in it; it holds no key."""
    return SealRing(parameters)


@dataclass(frozen=True, repr=False)
class RingKey:
    """A secret key, made from a seed of 32 bytes: the same seed gives the same key wherever it is.

    The coefficients are uniform in {-1, 0, 1}, as the security table assumes: bytes of the seed's AES-128 counter
    stream below 255, modulo 3. (SEAL's own sampler goes through ``std::uniform_int_distribution``, which C++ libraries
    implement differently, so that parties on two systems would hold two keys.) SEAL transforms them. The secret cannot
    be copied, pickled or printed, and leaves this object only as SEAL's key in memory.
    """

    ring: SealRing
    _secret: Any = field(repr=False)

    @classmethod
    def from_seed(cls, ring: SealRing, seed: bytes) -> RingKey:
        """Raises: SpecError unless the seed has 32 bytes."""
        if len(seed) != KEY_SEED_BYTES:
            raise SpecError(f"expected a key seed of {KEY_SEED_BYTES} bytes, got {len(seed)}")
        return cls(ring, _secret_key(ring, ternary(seed, ring.parameters.degree)))

    def encryptor(self) -> Any:
        return sealapi.Encryptor(self.ring.context, self._secret)

    def decryptor(self) -> Any:
        return sealapi.Decryptor(self.ring.context, self._secret)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise SpecError("a secret key is never serialised")


def ternary(seed: bytes, count: int) -> NDArray[np.int64]:
    """``count`` coefficients of a secret key, uniform in {-1, 0, 1}: int64, shape (count,)."""
    taken = np.empty(0, np.uint8)
    words = -(-count // 4) + 16  # a byte in 256 is rejected; with this many spare, a second piece is rare
    offset = 0
    while taken.size < count:
        piece = expand(seed, words, np.uint32, offset=offset).astype("<u4", copy=False).view(np.uint8)
        taken = np.concatenate([taken, piece[piece < 255]])
        offset += words
    return (taken[:count] % 3).astype(np.int64) - 1


def _secret_key(ring: SealRing, coefficients: NDArray[np.int64]) -> Any:
    """SEAL's key, in the transform domain modulo every prime, by way of a BFV plaintext with the same coefficients.

    SEAL lifts a plaintext coefficient t - 1 to -1 modulo each prime before it transforms. A CKKS key is the same key
    under another identifier of parameters.
    """
    parameters, modulus = ring.parameters, 3
    plain_ring = ring_of(RingParameters("bfv", parameters.degree, parameters.primes, parameters.special, modulus))
    plain = plain_ring.plaintext(np.where(coefficients < 0, modulus - 1, coefficients).astype(np.uint64))
    plain_ring.evaluator.transform_to_ntt_inplace(plain, plain_ring.context.key_parms_id())
    raw = saved(plain, ring._version)
    identifier = struct.pack("<4Q", *ring.context.key_parms_id())
    outer = ring._header(HEADER_BYTES + len(raw))
    secret = scratch().load(sealapi.SecretKey(), ring.context, outer, identifier, raw[len(identifier) :])
    if not sealapi.is_valid_for(secret, ring.context):
        raise SealFormatError("SEAL does not take the key that was made for it")
    return secret


def _context(parameters: RingParameters) -> Any:
    scheme = sealapi.SCHEME_TYPE.CKKS if parameters.scheme == "ckks" else sealapi.SCHEME_TYPE.BFV
    special = (parameters.special,) if parameters.special else ()
    if bool(special) != (len(parameters.primes) > 1):
        raise SpecError("expected a special prime where there are several primes, and only there")
    try:
        encryption = sealapi.EncryptionParameters(scheme)
        encryption.set_poly_modulus_degree(parameters.degree)
        encryption.set_coeff_modulus([sealapi.Modulus(prime) for prime in (*parameters.primes, *special)])
        if parameters.plain_modulus:
            encryption.set_plain_modulus(parameters.plain_modulus)
        context = sealapi.SEALContext(encryption, True, sealapi.SEC_LEVEL_TYPE.TC128)
    except (RuntimeError, ValueError, TypeError) as error:
        raise SpecError(f"SEAL refuses these parameters: {error}") from None
    if not context.parameters_set():
        raise SpecError(f"SEAL refuses these parameters: {context.parameters_error_message()}")
    return context


def _width(prime: int) -> int:
    """Whole bytes that hold every residue."""
    return -(-(prime - 1).bit_length() // 8)


def _narrow(words: Words, prime: int) -> bytes:
    return words.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, : _width(prime)].tobytes()


def _widen(packed: memoryview, prime: int) -> Words:
    wide = np.zeros((len(packed) // _width(prime), 8), np.uint8)
    wide[:, : _width(prime)] = np.frombuffer(packed, np.uint8).reshape(-1, _width(prime))
    return wide.reshape(-1).view("<u8").astype(np.uint64, copy=False)
