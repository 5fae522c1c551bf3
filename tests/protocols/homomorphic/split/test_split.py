"""Encryption and the server's sum, without the masked sum around them: exactness, noise, freshness, formats."""

from __future__ import annotations

import copy
import pickle
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from choral.protocols.errors import GarbledSumError, InputError, SpecError
from choral.protocols.homomorphic.messages import Ciphertext, read_ciphertext
from choral.protocols.homomorphic.ring.arithmetic import Kernels
from choral.protocols.homomorphic.ring.choose_kernels import kernels
from choral.protocols.homomorphic.ring.gaussian import TAIL, sample
from choral.protocols.homomorphic.ring.kernels_numba import NumbaKernels
from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels
from choral.protocols.homomorphic.split import decoding
from choral.protocols.homomorphic.split import parameters as split_parameters
from choral.protocols.homomorphic.split import party_and_server as split
from choral.protocols.homomorphic.split.parameters import BATCH, choose
from choral.protocols.homomorphic.split.party_and_server import Collector, SplitRound, encrypt
from choral.protocols.interface import SumSpec
from choral.protocols.masking import messages

SESSION = bytes(range(32))


def counter(name: str) -> Callable[[int], bytes]:
    """Reproducible randomness; every call gives other bytes."""
    generator = np.random.default_rng(list(name.encode()))
    return generator.bytes


def terms_of(parties: int = 3, length: int = 50, bound: int = 1000, number: int = 1, **more: Any) -> SplitRound:
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(parties)), length=length, bound=bound, **more)
    return SplitRound(parameters=choose(spec), session=SESSION, number=number)


def total(terms: SplitRound, vectors: Mapping[str, Any], randomness: Callable[[int], bytes]) -> Any:
    """One round of encrypting, collecting and opening with the true sum of keys."""
    collector = Collector(terms, terms.parameters.spec.parties)
    keys = np.zeros(terms.parameters.degree, np.int64)
    for party, vector in vectors.items():
        encrypted = encrypt(vector, terms, randomness=randomness)
        for raw in encrypted.messages:
            assert not collector.complete(party)
            collector.receive(party, raw)
        assert collector.complete(party)
        collector.include(party)
        keys += encrypted.key
    return collector.open(keys, list(vectors))


def residues_of(raws: Iterable[bytes], terms: SplitRound) -> list[Any]:
    """The residues in a party's messages: for each batch an array of shape (L, N lanes)."""
    chosen = terms.parameters
    out = []
    for index, raw in enumerate(raws):
        body = read_ciphertext(raw, sender="test", body=1 << 24).body
        done = 0
        for batch in terms.batches(index):
            size = chosen.lanes(batch) * chosen.block_bytes
            words = np.frombuffer(body[done : done + size], "<u4")
            rows = np.zeros(chosen.prime_count * chosen.degree * chosen.lanes(batch), np.uint32)
            kernels().add(words, chosen.prime_bits, rows)
            out.append(rows.reshape(chosen.prime_count, -1).astype(np.int32))
            done += size
        assert done == len(body)
    return out


def opened(residues: Sequence[Any], terms: SplitRound, key: Any) -> list[Any]:
    """c - a s for each batch: residues of errors and message, shape (L, N lanes)."""
    chosen = terms.parameters
    transformed = kernels().transform(chosen.ring, key.astype(np.float64))
    return [
        kernels().remove(chosen.ring, rows, terms.public(batch), transformed, lanes=chosen.lanes(batch))
        for batch, rows in enumerate(residues)
    ]


def whole(residues: Any, terms: SplitRound) -> list[int]:
    """Centred coefficients, by the Chinese remainder theorem in Python's integers."""
    q = terms.parameters.ring.modulus
    weights = [q // p * pow(q // p, -1, p) for p in terms.parameters.ring.primes]
    numbers = sum(row.astype(object) * weight for row, weight in zip(residues, weights, strict=True)) % q
    return [int(n) - q if n > q // 2 else int(n) for n in numbers]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_sum_is_exact(data: st.DataObject) -> None:
    parties = data.draw(st.integers(2, 12))
    bound = data.draw(st.one_of(st.integers(1, 2**20), st.integers(1, (2**64 - 1) // (2 * parties))))
    length = data.draw(st.one_of(st.integers(1, 300), st.sampled_from([2047, 2048, 2049, 9000])))
    terms = terms_of(parties, length, bound)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    present = data.draw(st.sets(st.sampled_from(terms.parameters.spec.parties), min_size=1))
    vectors = {}
    for party in sorted(present):
        vector = generator.integers(-bound, bound, length, endpoint=True)
        if data.draw(st.booleans()):
            vector[generator.integers(0, length, 5)] = data.draw(st.sampled_from([bound, -bound]))
        vectors[party] = vector
    found = total(terms, vectors, generator.bytes)
    assert found.dtype == np.int64
    assert np.array_equal(found, sum(vectors.values()))


@pytest.mark.parametrize("bound", [1, 7, 2**20, 2**50, 2**51, 2**61])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_of_the_range_are_exact(bound: int, sign: int) -> None:
    terms = terms_of(2, 4099, bound)
    vectors = {"p0": np.full(4099, sign * bound), "p1": np.full(4099, sign * bound)}
    assert (total(terms, vectors, counter("ends")) == 2 * sign * bound).all()


@pytest.fixture(params=["numba", "torch", "both"])
def which(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parties by one kind of kernels, the server by the same, or each by another."""
    made: Mapping[str, Kernels] = {"numba": NumbaKernels(), "torch": TorchKernels()}
    first = made["torch" if request.param == "both" else request.param]
    second = made["numba" if request.param == "both" else request.param]
    monkeypatch.setattr(split, "kernels", lambda device="cpu": first)
    monkeypatch.setattr(decoding, "kernels", lambda device="cpu": second)


@pytest.mark.usefixtures("which")
@pytest.mark.parametrize("bound", [5, 2**20, 2**60])
def test_all_kernels_give_the_same_sum(bound: int) -> None:
    terms = terms_of(3, 2500, bound)
    generator = np.random.default_rng(bound % 1000)
    vectors = {party: generator.integers(-bound, bound + 1, 2500) for party in terms.parameters.spec.parties}
    assert np.array_equal(total(terms, vectors, counter("kernels")), sum(vectors.values()))


def test_all_kernels_write_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = terms_of(3, 30_000, 2**20)
    vector = np.random.default_rng(1).integers(-(2**20), 2**20, 30_000)
    written = []
    for made in (NumbaKernels(), TorchKernels()):
        monkeypatch.setattr(split, "kernels", lambda device="cpu", made=made: made)
        encrypted = encrypt(vector, terms, randomness=lambda size: bytes(range(size)))
        written.append((encrypted.key.tolist(), list(encrypted.messages)))
    assert written[0] == written[1]


def test_torch_tensors_and_strided_vectors_are_summed_as_they_are() -> None:
    terms = terms_of(3, 5000, 10)
    vectors = np.random.default_rng(2).integers(-10, 11, (3, 5000))
    given = {
        "p0": torch.from_numpy(vectors[0]),
        "p1": torch.from_numpy(np.repeat(vectors[1], 2))[::2],
        "p2": np.repeat(vectors[2], 3)[::3],
    }
    assert np.array_equal(total(terms, given, counter("tensors")), vectors.sum(axis=0))


@pytest.mark.parametrize(
    ("length", "blocks"), [(1, 1), (2048, 1), (2049, 2), (8 * 2048, 8), (8 * 2048 + 1, 9), (40_000, 20)]
)
def test_long_vectors_travel_in_pieces(length: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With messages of one batch each, so that a short vector has several."""
    monkeypatch.setattr(split_parameters, "MESSAGE_BYTES", 1)
    terms = terms_of(2, length, 2**20)
    slim = replace(terms.parameters, degree=2048, slots=1, prime_bits=20, prime_count=2)
    terms = replace(terms, parameters=slim)
    assert slim.blocks == blocks
    assert slim.messages == -(-blocks // BATCH)
    generator = np.random.default_rng(length)
    vectors = {party: generator.integers(-(2**20), 2**20, length) for party in ("p0", "p1")}
    assert np.array_equal(total(terms, vectors, generator.bytes), sum(vectors.values()))


@pytest.mark.parametrize(("length", "bound"), [(50, 1000), (30_000, 3), (5000, 2**60)])
def test_a_ciphertext_is_what_the_page_says(length: int, bound: int) -> None:
    """c_k - a_k s is e_k + Delta m_k, with the stated slots, and the errors are the stream's after the key."""
    terms = terms_of(3, length, bound)
    chosen = terms.parameters
    vector = np.random.default_rng(5).integers(-bound, bound + 1, length)
    encrypted = encrypt(vector, terms, randomness=lambda size: bytes(range(size)))
    residues = residues_of(encrypted.messages, terms)
    assert len(residues) == chosen.batches
    stream = sample(bytes(range(32)), chosen.degree * (1 + chosen.blocks))
    assert np.array_equal(encrypted.key, stream[: chosen.degree])
    at, seen = 0, chosen.degree
    for batch, rows in enumerate(opened(residues, terms, encrypted.key)):
        size = chosen.degree * chosen.lanes(batch)
        values = np.zeros(size * chosen.slots, np.int64)
        piece = vector[at : at + values.size]
        values[: piece.size] = piece
        slots = values.reshape(chosen.slots, size)
        expected = [
            int(stream[seen + z])
            + sum(int(slots[j, z]) << chosen.scale_bits + j * chosen.slot_bits for j in range(chosen.slots))
            for z in range(size)
        ]
        assert whole(rows, terms) == expected
        at, seen = at + values.size, seen + size


def test_an_auditor_reads_each_batch_of_a_message_as_the_parties_key_does() -> None:
    """Over three batches in one message: what is left of them without a key."""
    terms = terms_of(3, 40_000, 2**20)
    slim = replace(terms.parameters, degree=2048, slots=1, prime_bits=20, prime_count=2)
    terms = replace(terms, parameters=slim)
    assert (slim.batches, slim.messages) == (3, 1)
    encrypted = encrypt(np.arange(40_000), terms, randomness=lambda size: bytes(range(size)))
    (raw,) = encrypted.messages
    found = list(split.residues(read_ciphertext(raw, sender="test", body=1 << 24).body, 0, terms))
    expected = opened(residues_of([raw], terms), terms, np.zeros(slim.degree))
    assert len(found) == len(expected) == 3
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_batch_has_errors_of_its_own() -> None:
    """Over three batches: the errors are the stream's, place after place, and no block's are another's."""
    terms = terms_of(3, 40_000, 2**20)
    slim = replace(terms.parameters, degree=2048, slots=1, prime_bits=20, prime_count=2)
    terms = replace(terms, parameters=slim)
    assert slim.batches == 3
    encrypted = encrypt(np.zeros(40_000, np.int64), terms, randomness=lambda size: bytes(range(size)))
    batches = opened(residues_of(encrypted.messages, terms), terms, encrypted.key)
    errors = [error for rows in batches for error in whole(rows, terms)]
    assert errors == sample(bytes(range(32)), slim.degree * (1 + slim.blocks))[slim.degree :].tolist()


def test_keys_and_errors_are_fresh_for_every_ciphertext() -> None:
    """Of the same vector in the same round: no coefficient stream is shared, and with the same seed it would be."""
    import secrets

    terms = terms_of(3, 5000, 2**20)
    vector = np.zeros(5000, np.int64)

    def drawn(randomness: Callable[[int], bytes]) -> Any:
        encrypted = encrypt(vector, terms, randomness=randomness)
        errors = opened(residues_of(encrypted.messages, terms), terms, encrypted.key)
        return np.concatenate([encrypted.key, *(whole(rows, terms) for rows in errors)])

    one, other = drawn(secrets.token_bytes), drawn(secrets.token_bytes)
    size = terms.parameters.degree
    assert one.size == size * (1 + terms.parameters.blocks)
    for piece, another in combinations([*np.split(one, one.size // size), *np.split(other, other.size // size)], 2):
        agreed = int((piece == another).sum())
        assert agreed < size * 0.15  # two samples agree with probability 0.044: 90 of 2048, 6 sigma is 146
        assert abs(float(np.corrcoef(piece, another)[0, 1])) < 0.16  # 7 standard errors
    fixed = [drawn(lambda size: bytes(size)) for _ in range(2)]
    assert np.array_equal(*fixed)


def test_a_key_is_never_an_argument_and_one_call_draws_one_seed() -> None:
    asked: list[int] = []

    def randomness(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    terms = terms_of(3, 50_000, 2**20)
    encrypted = encrypt(np.zeros(50_000, np.int64), terms, randomness=randomness)
    assert list(encrypted.messages)
    assert asked == [32]
    assert list(encrypted.messages) == []  # a generator: it cannot be read again with another vector in its place
    assert encrypted.key.dtype == np.int64
    assert np.abs(encrypted.key).max() <= TAIL


def test_public_randomness_differs_between_blocks_rounds_sessions_and_terms() -> None:
    terms = terms_of(3, 3_000_000, 3)
    assert terms.parameters.batches > 1
    others = [
        terms,
        replace(terms, number=2),
        replace(terms, session=bytes(32)),
    ]
    rows = [row for one in others for batch in range(2) for row in np.array(one.public(batch))]
    for one, other in combinations(rows, 2):
        size = min(one.size, other.size)
        assert int((one[:size] == other[:size]).sum()) < 10
    assert len({one.key for one in (*others, terms_of(3, 3_000_000, 2), terms_of(3, 2_999_999, 3))}) == 5
    assert len({one.public_seed for one in others}) == 3


def test_public_randomness_is_uniform() -> None:
    """Of each prime, in 1024 cells: chi-square at 1e-9; and random access gives the same as another party gets."""
    terms = terms_of(3, 10**6, 2**20)
    chosen = terms.parameters
    assert chosen.prime_count > 1
    pieces = [np.array(terms.public(batch)) for batch in range(min(chosen.batches, 3))]
    assert np.array_equal(replace(terms).public(1), pieces[1])
    for row, prime in enumerate(chosen.ring.primes):
        values = np.concatenate([piece[row] for piece in pieces])
        assert values.min() >= 0
        assert values.max() < prime
        cells = np.bincount(values.astype(np.int64) * 1024 // prime, minlength=1024)
        expected = values.size / 1024
        assert float(((cells - expected) ** 2 / expected).sum()) < chi2.isf(1e-9, 1023)


def test_public_randomness_that_runs_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "expand", lambda seed, length, dtype, offset: np.full(length, 0xFFFFFFFF, np.uint32))
    with pytest.raises(GarbledSumError, match="ran out"):
        terms_of().public(0)


@pytest.mark.parametrize("parties", [100, 1000])
def test_the_errors_of_many_parties_stay_within_their_bound(parties: int) -> None:
    """Really encrypted and added: more than fit 32-bit sums without reducing. The largest of 2048 sums of errors lies
    near 3.5 sigma sqrt(n); above 6.5 in one of 2^22 runs."""
    terms = terms_of(parties, 2048, 2**20)
    chosen = terms.parameters
    generator = np.random.default_rng(parties)
    names = chosen.spec.parties
    collector = Collector(terms, names)
    assert chosen.prime_bits > 20
    keys, vectors = np.zeros(chosen.degree, np.int64), np.zeros(2048, np.int64)
    settled = 0
    original = collector._settle

    def settle() -> None:
        nonlocal settled
        settled += 1
        original()

    collector._settle = settle  # type: ignore[method-assign]
    for name in names:
        vector = generator.integers(-(2**20), 2**20 + 1, 2048)
        encrypted = encrypt(vector, terms, randomness=generator.bytes)
        for raw in encrypted.messages:
            collector.receive(name, raw)
        collector.include(name)
        keys += encrypted.key
        vectors += vector
    sums = collector._sums.reshape(chosen.prime_count, -1) % np.array(chosen.ring.primes, np.uint32)[:, None]
    numbers = np.array(whole(opened([sums.astype(np.int32)], terms, keys)[0], terms), object)
    low = 1 << chosen.scale_bits
    errors = (numbers + low // 2) % low - low // 2
    largest = max(abs(int(error)) for error in errors)
    assert 2.5 * 6.4 * parties**0.5 < largest < 6.5 * 6.4 * parties**0.5 < chosen.error_bound(parties)
    assert largest << split_parameters.MARGIN_BITS < low // 2
    spread = float(np.std(errors.astype(np.float64)))
    assert abs(spread / (6.4 * parties**0.5) - 1) < 0.1  # 6 standard errors
    assert np.array_equal(collector.open(keys, names), vectors)
    assert settled >= parties // collector._most


@pytest.mark.parametrize("prime_bits", [20, 23, 26])
def test_the_largest_residues_of_the_most_parties_do_not_overflow(prime_bits: int) -> None:
    """Every bit set in every message: residues that are not even below their primes are added mod p all the same."""
    terms = terms_of(200, 3, 1)
    chosen = replace(terms.parameters, prime_bits=prime_bits)
    terms = replace(terms, parameters=chosen)
    collector = Collector(terms, chosen.spec.parties)
    body = b"\xff" * (chosen.blocks * chosen.block_bytes)
    names = chosen.spec.parties[: min(200, 3 * collector._most + 2)]
    for name in names:
        collector.receive(name, messages.encode(Ciphertext(terms.id, terms.number, terms.key, 0, body)))
        collector.include(name)
    prime = chosen.ring.primes[0]
    assert (collector._sums % prime == (((1 << prime_bits) - 1) * len(names)) % prime).all()


def crafted(terms: SplitRound, errors: Any, key: Any) -> list[bytes]:
    """A ciphertext of zeros under a key and errors of one's choice; one block."""
    chosen = terms.parameters
    assert chosen.blocks == 1
    bulk = kernels()
    residues = bulk.encrypt(
        chosen.ring,
        np.zeros((len(chosen.digits), chosen.degree)),
        split._scales(chosen),
        errors.astype(np.int8),
        terms.public(0),
        bulk.transform(chosen.ring, key.astype(np.float64)),
        lanes=1,
    )
    body = bulk.pack(residues.reshape(-1), chosen.prime_bits)
    return [messages.encode(Ciphertext(terms.id, terms.number, terms.key, 0, body))]


@pytest.mark.parametrize("sign", [1, -1])
def test_errors_at_their_bound_open_and_beyond_it_do_not(sign: int) -> None:
    terms = terms_of(2, 100, 1000)
    bound = terms.parameters.error_bound(2)
    assert bound == 105
    key = np.arange(terms.parameters.degree) % 7 - 3
    for first, fits in ((52, True), (53, False)):
        collector = Collector(terms, ("p0", "p1"))
        for name, error in (("p0", 53), ("p1", first)):
            errors = np.zeros(terms.parameters.degree, np.int64)
            errors[17] = sign * error
            collector.receive(name, crafted(terms, errors, key)[0])
            collector.include(name)
        if fits:
            assert not collector.open(2 * key, ["p0", "p1"]).any()
        else:
            with pytest.raises(GarbledSumError):
                collector.open(2 * key, ["p0", "p1"])


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(50),
        np.full(50, np.nan),
        np.zeros(50, np.int32),
        np.zeros(49, np.int64),
        np.zeros((50, 1), np.int64),
        np.full(50, 1001),
        np.full(50, -1001),
        np.full(50, np.iinfo(np.int64).min),
        torch.zeros(50),
        torch.full((50,), 1001),
        [0] * 50,
        None,
    ],
    ids=lambda vector: repr(vector)[:30],
)
def test_a_wrong_vector_is_refused_before_anything_is_drawn(vector: Any) -> None:
    def randomness(size: int) -> bytes:
        raise AssertionError("randomness was drawn")

    with pytest.raises(InputError) as caught:
        encrypt(vector, terms_of(), randomness=randomness)
    assert "1001" not in str(caught.value)


def test_what_holds_the_key_does_not_show_it() -> None:
    terms = terms_of()
    encrypted = encrypt(np.zeros(50, np.int64), terms, randomness=counter("repr"))
    for shown in (repr(encrypted), str(encrypted), f"{encrypted}"):
        assert shown == "<Encrypted: a key and messages>"
    with pytest.raises(TypeError):
        pickle.dumps(encrypted)
    with pytest.raises(TypeError):
        copy.deepcopy(encrypted)
    assert "key" not in repr(Collector(terms, ("a", "b")))


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(SpecError):
        encrypt(np.zeros(50, np.int64), terms_of(), randomness=lambda size: b"short")


def test_no_two_blocks_have_the_same_errors_nor_the_key_for_errors() -> None:
    """Two blocks with one error give the difference of their values away to whoever knows a_k - a_l and one of them."""
    spec = SumSpec(parties=("north", "south"), length=1, bound=1)
    smallest = choose(spec)
    parameters = replace(smallest, spec=replace(spec, length=20 * smallest.block_values))
    assert parameters.batches > 2
    terms = SplitRound(parameters=parameters, session=secrets.token_bytes(32), number=1)
    made = encrypt(np.zeros(parameters.spec.length, np.int64), terms, randomness=secrets.token_bytes)
    bodies = [read_ciphertext(raw, sender="north", body=len(raw)).body for raw in made.messages]
    words = np.frombuffer(b"".join(bodies), "<u4")
    bulk, ring = kernels(), parameters.ring
    key = bulk.transform(ring, made.key.astype(np.float64))
    seen, done = [made.key], 0
    for batch in range(parameters.batches):
        lanes = parameters.lanes(batch)
        residues = np.zeros(parameters.prime_count * parameters.degree * lanes, np.uint32)
        size = lanes * parameters.block_bytes // 4
        bulk.add(words[done : done + size], parameters.prime_bits, residues)
        done += size
        sums = residues.view(np.int32).reshape(parameters.prime_count, -1)
        left = bulk.remove(ring, sums, terms.public(batch), key, lanes=lanes)[0].astype(np.int64)
        errors = np.where(left > ring.primes[0] // 2, left - ring.primes[0], left)
        assert np.abs(errors).max() <= TAIL
        seen += list(errors.reshape(-1, lanes).T)
    assert len({one.tobytes() for one in seen}) == parameters.blocks + 1
