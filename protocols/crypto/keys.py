"""Key agreement, signatures, key derivation and authenticated encryption: strict wrappers, bytes in and out.

What is strict here, beyond calling a library:

- X25519 (RFC 7748) refuses the all-zero shared secret, so a peer cannot force a known key with a small-order point.
- Ed25519 verification (RFC 8032, 5.1.7) refuses S >= L, non-canonical encodings of the key and of R, and keys of small
  order, under which one signature fits many messages. It checks the *cofactorless* equation [S]B = R + [k]A in both
  backends: where one party checks with the cofactor and another without, a signer can show them different rosters.
- Nothing raised here holds a key, a plaintext or a shared secret.

Two backends give identical bytes. pycryptodome is always there; OpenSSL, through the ``cryptography`` package, is
used when that is installed (X25519 and Ed25519 verification 4 to 7 times as fast, sealing 10 times:
benchmarks/primitives.py). Before version 4 pycryptodome adds points of small order wrongly, so that a signer might show
two verifiers different rosters: it is then no backend, and without OpenSSL this module does not import.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import Crypto
from Crypto.Cipher import ChaCha20_Poly1305
from Crypto.Signature import eddsa

from choral.errors import ChoralError
from choral.protocols.errors import SpecError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
NONCE_BYTES = 12
TAG_BYTES = 16

_FIELD = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_SIGN_BIT = 1 << 255


class WeakKeyError(ChoralError):
    """A peer's X25519 key is malformed or of small order: the shared secret would be known to everyone."""


class SealError(ChoralError):
    """A sealed message is not what its sender sealed: another key, nonce, associated data, or changed bytes."""


@dataclass(frozen=True)
class Backend:
    """One library's primitives, unchecked: the public functions of this module do the checks for both.

    ``x25519`` loads a private key, for its public key and to agree with others', which may raise ValueError or give 32
    zero bytes on a small-order point. ``signer`` loads an Ed25519 seed, to sign with. ``verify`` is only called with a
    canonical key that is not of small order and with S < L. ``unseal`` raises ValueError when the tag does not fit.
    """

    name: str
    x25519: Callable[[bytes], tuple[Callable[[], bytes], Callable[[bytes], bytes]]]
    ed25519_public: Callable[[bytes], bytes]
    signer: Callable[[bytes], Callable[[bytes], bytes]]
    verify: Callable[[bytes, bytes, bytes], bool]
    seal: Callable[[bytes, bytes, bytes, bytes], bytes]
    unseal: Callable[[bytes, bytes, bytes, bytes], bytes]


class PrivateKey:
    """32 private bytes of X25519 (any will do: RFC 7748 clamps them), loaded once for many agreements.

    Loading costs OpenSSL as much as an agreement, and a party agrees with every neighbour. The loaded key is in this
    object and nowhere else, and is gone with it: nothing of this module keeps a key. Raises: SpecError for another
    length.
    """

    __slots__ = ("_agree", "_public")

    def __init__(self, private: bytes) -> None:
        _expect(private, KEY_BYTES, "an X25519 private key")
        self._public, self._agree = _backend.x25519(private)

    def __repr__(self) -> str:
        return "<PrivateKey>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SpecError("a private key is never copied or serialised")

    def public(self) -> bytes:
        """The 32-byte public key."""
        return self._public()

    def shared(self, public: bytes) -> bytes:
        """The 32-byte shared secret of RFC 7748. It is not uniform: pass it through :func:`hkdf_sha256` before use.

        A public key with its top bit set or not reduced modulo 2^255 - 19 is read as RFC 7748 says: masked, reduced.

        Raises: WeakKeyError when the public key is not 32 bytes, or when the shared secret is zero (the public key is a
        point of small order, on the curve or on its twist).
        """
        check_x25519_public(public)
        shared = self._agree(public)
        if hmac.compare_digest(shared, bytes(KEY_BYTES)):
            raise WeakKeyError("the X25519 shared secret is zero")
        return shared


def check_x25519_public(public: bytes) -> None:
    """Whether an agreement with it would be refused, without one: private keys are multiples of 8, so that the shared
    secret is zero for points of small order, on the curve or on its twist, and for no others.

    Raises: WeakKeyError.
    """
    if not isinstance(public, bytes) or len(public) != KEY_BYTES:
        raise WeakKeyError(f"expected an X25519 public key of {KEY_BYTES} bytes, got {_size(public)}")
    if int.from_bytes(public, "little") % _SIGN_BIT % _FIELD in _SMALL_ORDER_X:
        raise WeakKeyError("the X25519 public key is a point of small order")


def x25519_public(private: bytes) -> bytes:
    """See :meth:`PrivateKey.public`."""
    return PrivateKey(private).public()


def x25519_shared(private: bytes, public: bytes) -> bytes:
    """See :meth:`PrivateKey.shared`."""
    return PrivateKey(private).shared(public)


def ed25519_public(seed: bytes) -> bytes:
    """The 32-byte public key of a 32-byte seed (RFC 8032's private key)."""
    _expect(seed, KEY_BYTES, "an Ed25519 seed")
    return _backend.ed25519_public(seed)


class SigningKey:
    """An Ed25519 seed, loaded once for many signatures: loading costs as much as one. Raises: SpecError for a length
    other than 32 bytes.
    """

    __slots__ = ("sign",)

    sign: Callable[[bytes], bytes]
    """The 64-byte deterministic signature of RFC 8032 (PureEdDSA, no context) of a message."""

    def __init__(self, seed: bytes) -> None:
        _expect(seed, KEY_BYTES, "an Ed25519 seed")
        self.sign = _backend.signer(seed)

    def __repr__(self) -> str:
        return "<SigningKey>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SpecError("a private key is never copied or serialised")


def ed25519_sign(seed: bytes, message: bytes) -> bytes:
    """See :class:`SigningKey`."""
    return SigningKey(seed).sign(message)


def ed25519_verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is ``message``'s under ``public``. False, never an exception, for anything malformed."""
    if not all(isinstance(value, bytes) for value in (public, message, signature)):
        return False
    if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    if int.from_bytes(signature[KEY_BYTES:], "little") >= _ORDER or not _is_acceptable_point(public):
        return False
    return _backend.verify(public, message, signature)


def hkdf_sha256(secret: bytes, *, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 over SHA-256, 1 <= length <= 8160. Raises SpecError outside that.

    On the standard library's HMAC: pycryptodome's HKDF takes 40 us where this takes 4, and gives the same bytes.
    """
    return hkdf_expand(hkdf_extract(secret, salt), info, length)


def hkdf_extract(secret: bytes, salt: bytes) -> bytes:
    """The first step of :func:`hkdf_sha256`, once for all keys that are expanded from one secret: 32 bytes."""
    return hmac.digest(salt, secret, "sha256")  # an empty salt pads to the 32 zero bytes that RFC 5869 asks for


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """The second step, of what the first gave. Raises: SpecError for a length outside 1 to 8160."""
    if not 1 <= length <= 255 * 32:
        raise SpecError(f"expected 1 <= length <= 8160 bytes from HKDF, got {length}")
    if length <= 32:
        return hmac.digest(key, info + b"\x01", "sha256")[:length]
    blocks = [b""]
    for counter in range(1, -(-length // 32) + 1):
        blocks.append(hmac.digest(key, blocks[-1] + info + bytes([counter]), "sha256"))
    return b"".join(blocks)[:length]


def seal(key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
    """ChaCha20-Poly1305 of RFC 8439: the ciphertext, then 16 bytes of tag.

    key: 32 bytes. nonce: 12 bytes, **never twice under one key** (two messages under one nonce reveal their XOR and
    the authentication key). Chosen over AES-256-GCM by measurement: for messages under 1 KB pycryptodome needs 24 us
    against 50 us, OpenSSL 1.9 us against 1.6 us, and it leaks no timing on machines without AES instructions.

    Raises: SpecError when the key or nonce has another length.
    """
    _expect(key, KEY_BYTES, "a sealing key")
    _expect(nonce, NONCE_BYTES, "a nonce")
    return _backend.seal(key, nonce, plaintext, associated_data)


def unseal(key: bytes, nonce: bytes, sealed: bytes, associated_data: bytes) -> bytes:
    """The plaintext of :func:`seal`.

    Raises: SpecError when the key or nonce has another length than 32 or 12 bytes; SealError, and nothing of the
    plaintext, when the tag does not fit.
    """
    _expect(key, KEY_BYTES, "a sealing key")
    _expect(nonce, NONCE_BYTES, "a nonce")
    if len(sealed) < TAG_BYTES:
        raise SealError(f"expected a sealed message of at least {TAG_BYTES} bytes, got {len(sealed)}")
    try:
        return _backend.unseal(key, nonce, sealed, associated_data)
    except ValueError:
        raise SealError(
            "a sealed message does not open: wrong key, nonce or associated data, or changed bytes"
        ) from None


def _expect(value: bytes, length: int, what: str) -> None:
    if not isinstance(value, bytes) or len(value) != length:
        raise SpecError(f"expected {what} of {length} bytes, got {_size(value)}")


def _size(value: object) -> str:
    return str(len(value)) if isinstance(value, bytes) else f"a {type(value).__name__}"


# The u-coordinates of the points of order 1, 2, 4 and 8 on Curve25519 and its twist (https://cr.yp.to/ecdh.html).
_SMALL_ORDER_X = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)
# The y-coordinates of the eight points of Ed25519 whose order divides 8.
_ORDER_EIGHT_Y = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_SMALL_ORDER_Y = frozenset({0, 1, _FIELD - 1, _ORDER_EIGHT_Y, _FIELD - _ORDER_EIGHT_Y})
_GENERATOR = bytes([0x58]) + bytes([0x66]) * 31  # of Ed25519, as its public key: y = 4/5 (RFC 8032, 5.1)
_BASE_POINT = (9).to_bytes(KEY_BYTES, "little")


def _is_acceptable_point(encoded: bytes) -> bool:
    """Canonical (y < p; x = 0 has no sign, and belongs to y = 1 or -1 only) and not of small order."""
    y = int.from_bytes(encoded, "little") % _SIGN_BIT
    return y < _FIELD and y not in _SMALL_ORDER_Y


def _pycryptodome() -> Backend:
    from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key

    def x25519(private: bytes) -> tuple[Callable[[], bytes], Callable[[bytes], bytes]]:
        scalar = import_x25519_private_key(private).d

        def agree(public: bytes) -> bytes:
            point = import_x25519_public_key(public).pointQ * scalar
            return int(point.x).to_bytes(KEY_BYTES, "little")

        return lambda: agree(_BASE_POINT), agree

    def verify(public: bytes, message: bytes, signature: bytes) -> bool:
        # pycryptodome's own verifier multiplies by the cofactor; see the module's docstring for why that will not do.
        try:
            key = eddsa.import_public_key(public)
        except ValueError:
            return False
        digest = hashlib.sha512(signature[:KEY_BYTES] + public + message).digest()
        challenge = int.from_bytes(digest, "little") % _ORDER
        scalar = int.from_bytes(signature[KEY_BYTES:], "little")
        point = generator * scalar + (-key.pointQ) * challenge
        encoded = int(point.y) | (int(point.x) & 1) << 255
        return encoded.to_bytes(KEY_BYTES, "little") == signature[:KEY_BYTES]

    def seal(key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
        cipher = ChaCha20_Poly1305.new(key=key, nonce=nonce)
        cipher.update(associated_data)
        return b"".join(cipher.encrypt_and_digest(plaintext))

    def unseal(key: bytes, nonce: bytes, sealed: bytes, associated_data: bytes) -> bytes:
        cipher = ChaCha20_Poly1305.new(key=key, nonce=nonce)
        cipher.update(associated_data)
        return bytes(cipher.decrypt_and_verify(sealed[:-TAG_BYTES], sealed[-TAG_BYTES:]))

    def signer(seed: bytes) -> Callable[[bytes], bytes]:
        key = eddsa.import_private_key(seed)
        return lambda message: bytes(eddsa.new(key, "rfc8032").sign(message))

    generator = eddsa.import_public_key(_GENERATOR).pointQ
    return Backend(
        name="pycryptodome",
        x25519=x25519,
        ed25519_public=lambda seed: bytes(eddsa.import_private_key(seed).public_key().export_key(format="raw")),
        signer=signer,
        verify=verify,
        seal=seal,
        unseal=unseal,
    )


def _openssl() -> Backend:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    # Loaded public keys: pinned ones come back in every round, and those of a round to each party of this process.
    ed25519_key = lru_cache(maxsize=_LOADED)(Ed25519PublicKey.from_public_bytes)
    x25519_key = lru_cache(maxsize=_LOADED)(X25519PublicKey.from_public_bytes)

    def verify(public: bytes, message: bytes, signature: bytes) -> bool:
        try:
            ed25519_key(public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def unseal(key: bytes, nonce: bytes, sealed: bytes, associated_data: bytes) -> bytes:
        try:
            return ChaCha20Poly1305(key).decrypt(nonce, sealed, associated_data)
        except InvalidTag:
            raise ValueError("tag") from None

    def x25519(private: bytes) -> tuple[Callable[[], bytes], Callable[[bytes], bytes]]:
        key = X25519PrivateKey.from_private_bytes(private)  # which computes the public key, too
        public_key = key.public_key().public_bytes_raw
        return public_key, lambda public: key.exchange(x25519_key(public))

    return Backend(
        name="openssl",
        x25519=x25519,
        ed25519_public=lambda seed: Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw(),
        signer=lambda seed: Ed25519PrivateKey.from_private_bytes(seed).sign,
        verify=verify,
        seal=lambda key, nonce, text, associated_data: ChaCha20Poly1305(key).encrypt(nonce, text, associated_data),
        unseal=unseal,
    )


def _backends() -> dict[str, Backend]:
    """Every backend that can be had here, the preferred one last."""
    found = {"pycryptodome": _pycryptodome()} if Crypto.version_info[0] >= _SOUND else {}
    try:
        found["openssl"] = _openssl()
    except ImportError:
        if not found:
            raise ImportError(
                f"pycryptodome {Crypto.__version__} adds points of small order wrongly, and there is no other"
                f" library for signatures: install cryptography beside it, or pycryptodome>={_SOUND}"
            ) from None
    return found


_LOADED = 1 << 7  # public keys that are kept loaded, of each kind
_SOUND = 4  # the first version of pycryptodome with right sums of points of small order
BACKENDS = _backends()
_backend = list(BACKENDS.values())[-1]
