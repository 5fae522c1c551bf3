"""Masks on any device, and that a session of many rounds leaves nothing behind."""

from __future__ import annotations

import gc
import secrets
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from choral.protocols import Masked, SumSpec
from choral.protocols.crypto.keys import ed25519_public, hkdf_sha256
from choral.protocols.crypto.mask_stream import expand
from choral.protocols.masking import signing
from choral.protocols.masking.mask_addition import masked, masked_on_device
from choral.protocols.own_vector import checked


@pytest.mark.parametrize("bits", [1, 5, 31, 32, 33, 64])
def test_masking_is_addition_modulo_a_power_of_two(bits: int) -> None:
    bound = (1 << bits - 1) - 1
    vector = np.random.default_rng(bits).integers(-bound, bound, 1000, endpoint=True)
    seeds = [secrets.token_bytes(32) for _ in range(5)]
    packed = masked(vector, bits, seeds[:2], seeds[2:])
    width = np.uint32 if bits <= 32 else np.uint64
    streams = [expand(seed, 1000, width).astype(object) for seed in seeds]
    expected = (vector.astype(object) + sum(streams[:2]) - sum(streams[2:])) % (1 << bits)
    as_integer = int.from_bytes(packed, "little")
    assert [as_integer >> place * bits & (1 << bits) - 1 for place in range(1000)] == expected.tolist()


@pytest.mark.parametrize("bits", [17, 32, 40, 64])
def test_the_device_path_gives_the_same_words(bits: int) -> None:
    bound = min(1 << bits - 2, 1 << 62)
    vector = torch.tensor([0, 1, -1, bound, -bound, 5], dtype=torch.int64)
    before = vector.clone()
    seeds = [secrets.token_bytes(32) for _ in range(3)]
    words = masked_on_device(vector, bits, seeds[:1], seeds[1:])
    assert torch.equal(vector, before)  # a copy is masked, not the caller's own
    from choral.protocols.crypto.modular_integers import pack

    assert pack(words, bits) == masked(vector.numpy(), bits, seeds[:1], seeds[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_tensor_is_masked_where_it_lives() -> None:
    vector = torch.arange(-500, 500, device="cuda")
    seeds = [secrets.token_bytes(32) for _ in range(3)]
    assert checked(vector, 1000, 500).is_cuda
    assert masked(vector, 20, seeds[:1], seeds[1:]) == masked(vector.cpu().numpy(), 20, seeds[:1], seeds[1:])
    session = Masked().open(SumSpec(parties=("a", "b", "c"), length=1000, bound=500))
    summing = session.begin()
    for party in ("a", "b", "c"):
        summing.submit(party, vector)  # type: ignore[arg-type]
    assert summing.finish().total.tolist() == (3 * vector).tolist()


def test_a_cpu_tensor_is_not_copied_before_it_is_masked() -> None:
    vector = torch.arange(10)
    assert np.shares_memory(checked(vector, 10, 10), vector.numpy())


def run(session: Any, spec: SumSpec, vector: Any, dropped: int) -> None:
    summing = session.begin()
    for party in spec.parties[dropped:]:
        summing.submit(party, vector)
    result = summing.finish()
    assert (result.total == (len(spec.parties) - dropped) * vector).all()


def test_the_server_holds_one_vector_not_one_per_party() -> None:
    length = 400_000
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(12)), length=length, bound=1000)
    session = Masked().open(spec)
    vector = np.arange(length) % 1000
    run(session, spec, vector, 0)  # buffers of the stream are made once
    tracemalloc.start()
    run(session, spec, vector, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # int64 in and out, one uint32 sum, one uint32 being masked or unpacked, its packed bytes and the message with them.
    assert peak < 8 * 4 * length
    assert peak < 12 * 4 * length / 1.4  # twelve uint32 vectors would be far over


def test_fresh_secrets_each_round_and_nothing_kept() -> None:
    spec = SumSpec(parties=("a", "b", "c", "d"), length=2, bound=9)
    session = Masked().open(spec)
    tracemalloc.start()
    sizes = []
    for number in range(60):
        run(session, spec, np.array([number % 9, -3]), number % 2)
        if number % 20 == 19:
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[2] - sizes[1] < 20_000


@pytest.mark.parametrize(("n", "least"), [(4, 3), (7, 4), (10, 6), (64, 33), (65, 33)])
def test_a_sum_is_over_a_majority_unless_asked_otherwise(n: int, least: int) -> None:
    """A server that follows the protocol leaves room for a lower threshold; a smaller sum must still be asked for."""
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(n)), length=1, bound=1)
    terms = Masked(server="semi-honest", corrupt=1, dropouts=1).setup(spec, session=bytes(16))
    assert (terms.min_survivors, terms.threshold < least) == (least, True)


def test_each_signature_of_a_round_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all parties together, which share one memory here; keys in the round that they came with, and not again."""
    verified: list[bytes] = []
    honest = signing.ed25519_verify

    def counted(public: bytes, message: bytes, signature: bytes) -> bool:
        verified.append(signature)
        return honest(public, message, signature)

    monkeypatch.setattr(signing, "ed25519_verify", counted)
    names = ("a", "b", "c", "d")
    session = Masked(corrupt=1, dropouts=0).open(SumSpec(parties=names, length=3, bound=5))
    for number in range(4):
        verified.clear()
        summing = session.begin()
        for name in names:
            summing.submit(name, np.ones(3, dtype=np.int64))
        assert summing.finish().total.tolist() == [4, 4, 4]
        assert len(verified) == len(set(verified)) == (12 if number == 0 else 8)  # at first the first keys, too


def test_what_was_accepted_two_rounds_ago_is_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    public, signature = ed25519_public(bytes(range(32))), signing.sign(bytes(range(32)), b"x")
    accepted = signing.Signatures()
    assert accepted.valid(public, b"x", signature)
    assert not accepted.valid(public, b"y", signature)
    monkeypatch.setattr(signing, "ed25519_verify", lambda *_: False)
    accepted.forget()
    assert accepted.valid(public, b"x", signature)
    assert not accepted.valid(public, b"y", signature)
    accepted.forget()
    assert not accepted.valid(public, b"x", signature)


def test_what_is_hashed_for_every_pair_is_hashed_as_the_page_says() -> None:
    """Written without a loop, it is the one digest of its label and parts, and the one HKDF of its secret."""
    s, a, b = (bytes([letter]) * 32 for letter in b"sab")
    number, one, other = 7, 3, 12
    assert signing.advertise(s, number, one, a, b) == signing.digest("advertise", s, number, one, a, b)
    assert signing.seal_data(s, number, one, other, a, b) == signing.digest("packet", s, number, one, other, a, b)
    hashed = signing.share_hash(s, number, "key", one, other, a + b"!")
    assert hashed == signing.digest("share/key", s, number, one, other, a + b"!")
    info = signing.digest("seal", number, one, other, b)
    sealed = signing.seal_key(signing.channel(a, s), number, one, other, b)
    assert sealed == hkdf_sha256(a, salt=s, info=info, length=32)
    for first, second in ((one, other), (other, one)):
        info = signing.digest("mask", number, one, other, b)
        assert signing.pair_seed(a, s, number, first, second, b) == hkdf_sha256(a, salt=s, info=info, length=32)
