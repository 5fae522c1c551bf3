"""Known answers and forgeries through our own wrappers, once per backend."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import Crypto
import pytest
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF
from Crypto.Signature import eddsa
from hypothesis import assume, given
from hypothesis import strategies as st

from choral.protocols.crypto import keys
from choral.protocols.errors import SpecError

FIELD = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
ALL_BACKENDS = ["pycryptodome", "openssl"]


@pytest.fixture(params=ALL_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in keys.BACKENDS:
        pytest.skip("not installed, or pycryptodome below 4")
    monkeypatch.setattr(keys, "_backend", keys.BACKENDS[request.param])
    return str(request.param)


def wycheproof(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for group in json.loads(path.read_text())["testGroups"]:
        for case in group["tests"]:
            yield group, case


def records(path: Path) -> list[dict[str, str]]:
    """The blank-line-separated ``KEY = value`` records of the RFC files."""
    found: list[dict[str, str]] = [{}]
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            if key.strip() == "COUNT":
                found.append({})
            found[-1][key.strip()] = value.strip()
    return [record for record in found if record]


def ladder(scalar: bytes, u: bytes) -> bytes:
    """RFC 7748, section 5, as printed there."""
    k = int.from_bytes(scalar, "little") & ~(7 | 1 << 255) | 1 << 254
    x1 = int.from_bytes(u, "little") % 2**255
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % FIELD, x1 * (da - cb) ** 2 % FIELD
        x2, z2 = aa * bb % FIELD, e * (aa + 121665 * e) % FIELD
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, FIELD - 2, FIELD) % FIELD).to_bytes(32, "little")


# X25519


def test_wycheproof_x25519(backend: str, vectors: Path) -> None:
    ran = refused = 0
    for _, case in wycheproof(vectors / "wycheproof" / "x25519_test.json"):
        private, public = bytes.fromhex(case["private"]), bytes.fromhex(case["public"])
        if "ZeroSharedSecret" in case["flags"]:
            with pytest.raises(keys.WeakKeyError):
                keys.x25519_shared(private, public)
            refused += 1
        else:  # "valid" and "acceptable" (twist, non-canonical): RFC 7748 defines them all
            assert keys.x25519_shared(private, public).hex() == case["shared"], case["tcId"]
        ran += 1
    assert (ran, refused) == (518, 31)


def test_rfc7748(backend: str, vectors: Path) -> None:
    cases = records(vectors / "rfc-nist" / "asymmetric_X25519_rfc7748.txt")
    assert len(cases) == 3
    for case in cases:
        scalar, u = bytes.fromhex(case["INPUT_SCALAR"]), bytes.fromhex(case["INPUT_U"])
        assert keys.x25519_shared(scalar, u).hex() == case["OUTPUT_U"]


def test_x25519_iterated_a_thousand_times(backend: str) -> None:
    """RFC 7748, 5.2."""
    k = u = (9).to_bytes(32, "little")
    for _ in range(1000):
        k, u = keys.x25519_shared(k, u), k
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


@given(private=st.binary(min_size=32, max_size=32), public=st.binary(min_size=32, max_size=32))
def test_both_backends_are_the_ladder(private: bytes, public: bytes) -> None:
    expected = ladder(private, public)
    assume(any(expected))  # small orders have tests of their own
    for found in keys.BACKENDS.values():
        own, agree = found.x25519(private)
        assert agree(public) == expected
        assert own() == agree((9).to_bytes(32, "little")) == ladder(private, (9).to_bytes(32, "little"))


def small_order_encodings() -> list[bytes]:
    """Every 32-byte string, masked or not, reduced or not, that stands for a point of small order."""
    return [
        (representative | top).to_bytes(32, "little")
        for u in keys._SMALL_ORDER_X
        for representative in (u, u + FIELD)
        if representative < 2**255
        for top in (0, 1 << 255)
    ]


def test_small_order_points_are_refused(backend: str) -> None:
    encodings = small_order_encodings()
    assert len(encodings) == 2 * (5 + 2)  # 0, 1 and their second forms p, p + 1; p - 1 and the two of order 8
    for public in encodings:
        assert ladder(bytes(range(32)), public) == bytes(32)
        with pytest.raises(keys.WeakKeyError):
            keys.x25519_shared(bytes(range(32)), public)
        with pytest.raises(keys.WeakKeyError, match="small order"):
            keys.check_x25519_public(public)


@given(private=st.binary(min_size=32, max_size=32), public=st.binary(min_size=32, max_size=32))
def test_a_key_is_checked_without_an_agreement_as_with_one(private: bytes, public: bytes) -> None:
    if any(ladder(private, public)):
        keys.check_x25519_public(public)
    else:
        with pytest.raises(keys.WeakKeyError, match="small order"):
            keys.check_x25519_public(public)
    with pytest.raises(keys.WeakKeyError, match="32 bytes"):
        keys.check_x25519_public(public[:31])


def test_a_zero_shared_secret_is_refused_however_it_came_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        keys, "_backend", dataclasses.replace(keys._backend, x25519=lambda _: (bytes, lambda _: bytes(32)))
    )
    with pytest.raises(keys.WeakKeyError):
        keys.x25519_shared(bytes(range(32)), bytes(range(32)))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_x25519_lengths(backend: str, length: int) -> None:
    with pytest.raises(keys.WeakKeyError, match=f"32 bytes, got {length}"):
        keys.x25519_shared(bytes(32), bytes(range(1, length + 1)))
    with pytest.raises(SpecError):
        keys.x25519_shared(bytes(length), bytes(range(32)))
    with pytest.raises(SpecError):
        keys.x25519_public(bytes(length))


def test_both_sides_agree(backend: str) -> None:
    north, south = hashlib.sha256(b"north").digest(), hashlib.sha256(b"south").digest()
    shared = keys.x25519_shared(north, keys.x25519_public(south))
    assert shared == keys.x25519_shared(south, keys.x25519_public(north))


# Ed25519


def test_wycheproof_ed25519(backend: str, vectors: Path) -> None:
    ran = rejected = 0
    for group, case in wycheproof(vectors / "wycheproof" / "ed25519_test.json"):
        public = bytes.fromhex(group["publicKey"]["pk"])
        verdict = keys.ed25519_verify(public, bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
        assert verdict == (case["result"] == "valid"), case["tcId"]
        ran += 1
        rejected += not verdict
    assert (ran, rejected) == (151, 63)


def test_djb_sign_input(backend: str, vectors: Path) -> None:
    ran = 0
    with gzip.open(vectors / "rfc-nist" / "Ed25519_sign.input.gz", "rt") as lines:
        for line in lines:
            secret, public, message, signed = (bytes.fromhex(part) for part in line.split(":")[:4])
            signature = signed[:64]
            assert keys.ed25519_public(secret[:32]) == public
            assert keys.ed25519_sign(secret[:32], message) == signature
            if ran % 8 == 0:  # verification is slow in pycryptodome
                assert keys.ed25519_verify(public, message, signature)
                assert not keys.ed25519_verify(public, message + b"x", signature)
            ran += 1
    assert ran == 1024


def test_malleated_and_malformed_signatures(backend: str) -> None:
    seed = bytes(range(32))
    public, signature = keys.ed25519_public(seed), keys.ed25519_sign(seed, b"m")
    assert keys.ed25519_verify(public, b"m", signature)
    s = int.from_bytes(signature[32:], "little")
    for multiple in range(1, (2**256 - s - 1) // ORDER + 1):
        assert not keys.ed25519_verify(public, b"m", signature[:32] + (s + multiple * ORDER).to_bytes(32, "little"))
    for broken in (b"", signature[:63], signature + b"\0", bytes(64), b"\xff" * 64):
        assert keys.ed25519_verify(public, b"m", broken) is False
    for key in (b"", public[:31], public + b"\0", bytes(32), b"\xff" * 32, (2).to_bytes(32, "little")):
        assert keys.ed25519_verify(key, b"m", signature) is False
    assert not keys.ed25519_verify(public, b"other", signature)


def test_every_flipped_bit_is_noticed(backend: str) -> None:
    seed = bytes(range(32))
    public, signature = keys.ed25519_public(seed), keys.ed25519_sign(seed, b"message")
    for bit in range(0, 512, 1 if backend == "openssl" else 7):
        flipped = (int.from_bytes(signature, "little") ^ 1 << bit).to_bytes(64, "little")
        assert not keys.ed25519_verify(public, b"message", flipped)


def _encode(point: Any) -> bytes:
    return (int(point.y) | (int(point.x) & 1) << 255).to_bytes(32, "little")


def _order_eight_point() -> Any:
    point = eddsa.import_public_key(keys._ORDER_EIGHT_Y.to_bytes(32, "little")).pointQ
    assert (point * 8).is_point_at_infinity()
    assert not (point * 4).is_point_at_infinity()
    return point


sound = pytest.mark.skipif("pycryptodome" not in keys.BACKENDS, reason="the oracle is pycryptodome 4")


def test_a_pycryptodome_that_adds_wrongly_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crypto, "version_info", (3, 24, "1"))
    assert list(keys._backends()) == ["openssl"]
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)  # as if it were not installed
    with pytest.raises(ImportError, match="install cryptography beside it, or pycryptodome>=4"):
        keys._backends()
    monkeypatch.setattr(Crypto, "version_info", (4, 0, "0"))
    assert list(keys._backends()) == ["pycryptodome"]


@sound
def test_small_order_list_is_complete() -> None:
    torsion = _order_eight_point()
    assert {int((torsion * i).y) for i in range(8)} == keys._SMALL_ORDER_Y


@sound
def test_keys_of_small_order_are_refused(backend: str) -> None:
    """Under the identity as a key, R = identity and S = 0 verify for every message in a lenient library."""
    torsion = _order_eight_point()
    identity = (1).to_bytes(32, "little")
    signature = identity + bytes(32)
    eddsa.new(eddsa.import_public_key(identity), "rfc8032").verify(b"anything", signature)  # the lenient one
    for i in range(8):
        assert not keys.ed25519_verify(_encode(torsion * i), b"anything", signature)


@sound
def test_no_signer_can_split_cofactored_from_cofactorless_verifiers(backend: str) -> None:
    """R + T with T of order 8: true times the cofactor (pycryptodome's own verifier), false without it (OpenSSL's)."""
    private = eddsa.import_private_key(bytes(range(32)))
    public = private.public_key().export_key(format="raw")
    generator, message = eddsa.import_public_key(keys._GENERATOR).pointQ, b"roster"
    scalar, nonce = int(private.d), 123456789
    point = generator * nonce + _order_eight_point()
    challenge = int.from_bytes(hashlib.sha512(_encode(point) + public + message).digest(), "little") % ORDER
    signature = _encode(point) + ((nonce + challenge * scalar) % ORDER).to_bytes(32, "little")
    eddsa.new(private.public_key(), "rfc8032").verify(message, signature)  # accepts
    assert keys.ed25519_verify(public, message, signature) is False


@pytest.mark.parametrize("y", [FIELD, FIELD + 1, FIELD + 3, 2**255 - 1])
@pytest.mark.parametrize("sign", [0, 1])
def test_non_canonical_keys_are_refused(backend: str, y: int, sign: int) -> None:
    public = (y | sign << 255).to_bytes(32, "little")
    assert not keys._is_acceptable_point(public)
    assert keys.ed25519_verify(public, b"m", keys.ed25519_sign(bytes(32), b"m")) is False


@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(max_size=200))
def test_backends_sign_alike(seed: bytes, message: bytes) -> None:
    assert len({found.ed25519_public(seed) for found in keys.BACKENDS.values()}) == 1
    assert len({found.signer(seed)(message) for found in keys.BACKENDS.values()}) == 1


@pytest.mark.parametrize("kind", [keys.PrivateKey, keys.SigningKey])
def test_a_loaded_key_is_neither_copied_nor_shown(backend: str, kind: type) -> None:
    loaded = kind(bytes(range(32)))
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SpecError, match="never copied"):
            copying(loaded)
    assert repr(loaded) == f"<{kind.__name__}>"


@pytest.mark.parametrize("length", [0, 31, 33])
def test_ed25519_seed_lengths(backend: str, length: int) -> None:
    with pytest.raises(SpecError):
        keys.ed25519_public(bytes(length))
    with pytest.raises(SpecError):
        keys.ed25519_sign(bytes(length), b"")


# HKDF


def test_wycheproof_hkdf(vectors: Path) -> None:
    ran = refused = 0
    for _, case in wycheproof(vectors / "wycheproof" / "hkdf_sha256_test.json"):

        def derive(case: dict[str, Any] = case) -> bytes:
            salt, info = bytes.fromhex(case["salt"]), bytes.fromhex(case["info"])
            return keys.hkdf_sha256(bytes.fromhex(case["ikm"]), salt=salt, info=info, length=case["size"])

        if case["result"] == "valid":
            assert derive().hex() == case["okm"]
        else:
            with pytest.raises(SpecError):
                derive()
            refused += 1
        ran += 1
    assert (ran, refused) == (86, 3)


@pytest.mark.parametrize(("name", "count"), [("KDF_rfc-5869-HKDF-SHA256.txt", 3), ("KDF_hkdf-generated.txt", 1)])
def test_rfc5869(vectors: Path, name: str, count: int) -> None:
    cases = records(vectors / "rfc-nist" / name)
    assert len(cases) == count
    for case in cases:
        secret, salt, info = (bytes.fromhex(case[field]) for field in ("IKM", "salt", "info"))
        assert keys.hkdf_sha256(secret, salt=salt, info=info, length=int(case["L"])).hex() == case["OKM"]


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80), st.integers(1, 200))
def test_hkdf_is_pycryptodomes(secret: bytes, salt: bytes, info: bytes, length: int) -> None:
    ours = keys.hkdf_sha256(secret, salt=salt, info=info, length=length)
    assert ours == HKDF(secret, length, salt, SHA256, 1, info)


@pytest.mark.parametrize("length", [-1, 0, 8161])
def test_hkdf_lengths(length: int) -> None:
    with pytest.raises(SpecError):
        keys.hkdf_sha256(b"s", salt=b"", info=b"", length=length)


# Authenticated encryption


def test_wycheproof_chacha20_poly1305(backend: str, vectors: Path) -> None:
    ran = refused = 0
    for _, case in wycheproof(vectors / "wycheproof" / "chacha20_poly1305_test.json"):
        key, nonce, plaintext, associated_data, text, tag = (
            bytes.fromhex(case[field]) for field in ("key", "iv", "msg", "aad", "ct", "tag")
        )
        if case["result"] == "valid":
            assert keys.seal(key, nonce, plaintext, associated_data) == text + tag
            assert keys.unseal(key, nonce, text + tag, associated_data) == plaintext
        else:
            with pytest.raises((keys.SealError, SpecError)):
                keys.unseal(key, nonce, text + tag, associated_data)
            refused += 1
        ran += 1
    assert (ran, refused) == (325, 69)


def test_rfc8439_example(backend: str) -> None:
    """RFC 8439, 2.8.2."""
    sealed = keys.seal(
        bytes(range(0x80, 0xA0)),
        bytes.fromhex("070000004041424344454647"),
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it.",
        bytes.fromhex("50515253c0c1c2c3c4c5c6c7"),
    )
    assert sealed[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"


@pytest.mark.parametrize(
    "change",
    [
        lambda k, n, s, a: (bytes([k[0] ^ 1]) + k[1:], n, s, a),
        lambda k, n, s, a: (k, bytes([n[0] ^ 1]) + n[1:], s, a),
        lambda k, n, s, a: (k, n, bytes([s[0] ^ 1]) + s[1:], a),
        lambda k, n, s, a: (k, n, s[:-1] + bytes([s[-1] ^ 128]), a),
        lambda k, n, s, a: (k, n, s[:-1], a),
        lambda k, n, s, a: (k, n, s + b"\0", a),
        lambda k, n, s, a: (k, n, s[:15], a),
        lambda k, n, s, a: (k, n, b"", a),
        lambda k, n, s, a: (k, n, s, a + b"\0"),
        lambda k, n, s, a: (k, n, s, b""),
    ],
)
def test_changed_seals_do_not_open(backend: str, change: Callable[..., tuple[bytes, bytes, bytes, bytes]]) -> None:
    key, nonce, associated_data = bytes(range(32)), bytes(range(12)), b"from 1 to 2"
    sealed = keys.seal(key, nonce, b"share", associated_data)
    assert keys.unseal(key, nonce, sealed, associated_data) == b"share"
    with pytest.raises(keys.SealError) as caught:
        keys.unseal(*change(key, nonce, sealed, associated_data))
    assert "share" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_seal_shorter_than_its_tag_never_reaches_a_library(backend: str, length: int) -> None:
    with pytest.raises(keys.SealError, match=f"at least 16 bytes, got {length}"):
        keys.unseal(bytes(32), bytes(12), bytes(length), b"")


@pytest.mark.parametrize(("key", "nonce"), [(31, 12), (33, 12), (16, 12), (32, 11), (32, 13), (32, 8), (32, 24)])
def test_seal_lengths(backend: str, key: int, nonce: int) -> None:
    """pycryptodome would take 8- and 24-byte nonces for other ciphers."""
    with pytest.raises(SpecError):
        keys.seal(bytes(key), bytes(nonce), b"", b"")
    with pytest.raises(SpecError):
        keys.unseal(bytes(key), bytes(nonce), bytes(16), b"")


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_backends_seal_alike(plaintext: bytes, associated_data: bytes) -> None:
    key, nonce = bytes(range(32)), bytes(range(12))
    sealed = {found.seal(key, nonce, plaintext, associated_data) for found in keys.BACKENDS.values()}
    assert len(sealed) == 1
    for found in keys.BACKENDS.values():
        assert found.unseal(key, nonce, next(iter(sealed)), associated_data) == plaintext


@sound
def test_without_cryptography_pycryptodome_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "cryptography":
            monkeypatch.setitem(sys.modules, name, None)
    assert list(keys._backends()) == ["pycryptodome"]


def test_openssl_is_preferred_where_it_is() -> None:
    pytest.importorskip("cryptography")
    assert keys._backend.name == "openssl"
