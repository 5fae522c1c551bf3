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

from choral.protocols.crypto.modular_integers import unpack
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
from choral.protocols.homomorphic.split.parameters import choose
from choral.protocols.homomorphic.split.party_and_server import Collector, SplitRound, encrypt
from choral.protocols.homomorphic.split.party_driver import key_spec
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


def filled(terms: SplitRound, blocks: int) -> SplitRound:
    """The same ring and packing for a vector that fills so many blocks, of which none is cut."""
    chosen = replace(terms.parameters)
    chosen = replace(chosen, spec=replace(chosen.spec, length=blocks * chosen.block_values))
    assert (chosen.blocks, chosen.tail) == (blocks, 0)
    return replace(terms, parameters=chosen)


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
    """The residues in a party's messages: for each batch an array of shape (L, N lanes), of the cut one (L, tail)."""
    chosen = terms.parameters
    out = []
    for index, raw in enumerate(raws):
        body = read_ciphertext(raw, sender="test", body=1 << 24).body
        done = 0
        for batch in terms.batches(index):
            rows = np.zeros((chosen.prime_count, chosen.coefficients(batch)), np.uint32)
            for row, bits in zip(rows, chosen.widths, strict=True):
                piece = body[done : done + row.size * bits // 8]
                done += len(piece)
                if chosen.is_cut(batch):
                    row += unpack(piece, row.size, bits)
                else:
                    kernels().add(np.frombuffer(piece, "<u4"), bits, row)
            out.append(rows.astype(np.int32))
        assert done == len(body)
    return out


def opened(residues: Sequence[Any], terms: SplitRound, key: Any) -> list[Any]:
    """c - a s for each batch: residues of errors and message, shape (L, N lanes), of the cut one (L, tail)."""
    chosen = terms.parameters
    transformed = kernels().transform(chosen.ring, key.astype(np.float64))
    out = []
    for batch, rows in enumerate(residues):
        cut, public = chosen.is_cut(batch), terms.public(batch)
        sums = np.zeros_like(public) if cut else rows
        found = kernels().remove(chosen.ring, sums, public, transformed, lanes=chosen.lanes(batch))
        primes = np.array(chosen.ring.primes)[:, None]
        out.append((rows + found[:, : chosen.tail]) % primes if cut else found)
    return out


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
    ("length", "blocks", "pieces"),
    [(1, 1, 1), (2048, 1, 1), (2049, 2, 2), (8 * 2048, 8, 1), (8 * 2048 + 1, 9, 2), (40_000, 20, 4), (40_960, 20, 3)],
)
def test_long_vectors_travel_in_pieces(length: int, blocks: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With messages of one batch each, so that a short vector has several."""
    monkeypatch.setattr(split_parameters, "MESSAGE_BYTES", 1)
    terms = terms_of(2, length, 2**20)
    slim = replace(terms.parameters, degree=2048, slots=1, prime_bits=20, prime_count=2, wide=0)
    terms = replace(terms, parameters=slim)
    assert slim.blocks == blocks
    assert slim.messages == pieces
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
        size = chosen.coefficients(batch)
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
    """Over four batches in one message, of which the last is cut: what is left of them without a key."""
    terms = terms_of(3, 40_000, 2**20)
    slim = replace(terms.parameters, degree=2048, slots=1, prime_bits=20, prime_count=2, wide=0)
    terms = replace(terms, parameters=slim)
    assert (slim.batches, slim.messages, slim.tail) == (4, 1, 1088)
    encrypted = encrypt(np.arange(40_000), terms, randomness=lambda size: bytes(range(size)))
    (raw,) = encrypted.messages
    found = list(split.residues(read_ciphertext(raw, sender="test", body=1 << 24).body, 0, terms))
    expected = opened(residues_of([raw], terms), terms, np.zeros(slim.degree))
    assert len(found) == len(expected) == 4
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_batch_has_errors_of_its_own() -> None:
    """Over four batches: the errors are the stream's, place after place, and no block's are another's."""
    terms = terms_of(3, 40_000, 2**20)
    slim = replace(terms.parameters, degree=2048, slots=1, prime_bits=20, prime_count=2, wide=0)
    terms = replace(terms, parameters=slim)
    assert (slim.batches, slim.tail) == (4, 1088)
    encrypted = encrypt(np.zeros(40_000, np.int64), terms, randomness=lambda size: bytes(range(size)))
    batches = opened(residues_of(encrypted.messages, terms), terms, encrypted.key)
    errors = [error for rows in batches for error in whole(rows, terms)]
    stream = sample(bytes(range(32)), slim.degree * (1 + slim.blocks))[slim.degree :].tolist()
    assert errors == stream[: slim.whole * slim.degree + slim.tail]


def test_keys_and_errors_are_fresh_for_every_ciphertext() -> None:
    """Of the same vector in the same round: no coefficient stream is shared, and with the same seed it would be."""
    import secrets

    terms = filled(terms_of(3, 5000, 2**20), 2)
    vector = np.zeros(terms.parameters.spec.length, np.int64)

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
    terms = filled(terms_of(parties, 2048, 2**20), 1)
    chosen, length = terms.parameters, terms.parameters.spec.length
    generator = np.random.default_rng(parties)
    names = chosen.spec.parties
    collector = Collector(terms, names)
    assert max(chosen.widths) > 20
    keys, vectors = np.zeros(chosen.degree, np.int64), np.zeros(length, np.int64)
    settled = 0
    original = collector._settle

    def settle() -> None:
        nonlocal settled
        settled += 1
        original()

    collector._settle = settle  # type: ignore[method-assign]
    for name in names:
        vector = generator.integers(-(2**20), 2**20 + 1, length)
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
    chosen = replace(terms.parameters, prime_bits=prime_bits, wide=0)
    terms = replace(terms, parameters=chosen)
    collector = Collector(terms, chosen.spec.parties)
    body = b"\xff" * chosen.ciphertext_bytes
    names = chosen.spec.parties[: min(200, 3 * collector._most + 2)]
    for name in names:
        collector.receive(name, messages.encode(Ciphertext(terms.id, terms.number, terms.key, 0, body)))
        collector.include(name)
    prime = chosen.ring.primes[0]
    assert (collector._sums % prime == (((1 << prime_bits) - 1) * len(names)) % prime).all()


def crafted(terms: SplitRound, errors: Any, key: Any) -> list[bytes]:
    """A ciphertext of zeros under a key and errors of one's choice; one block, cut or whole."""
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
    if chosen.is_cut(0):
        nothing = np.zeros_like(residues)
        residues = bulk.remove(chosen.ring, residues, nothing, nothing, lanes=1)[:, : chosen.tail]
    body = split._pack(residues, 0, chosen, bulk)
    return [messages.encode(Ciphertext(terms.id, terms.number, terms.key, 0, body))]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cut", [True, False])
def test_errors_at_their_bound_open_and_beyond_it_do_not(sign: int, cut: bool) -> None:
    terms = terms_of(2, 100, 1000)
    terms = terms if cut else filled(terms, 1)
    assert (terms.parameters.tail > 0) == cut
    bound = terms.parameters.error_bound(2)
    assert bound == 94
    key = np.arange(terms.parameters.degree) % 7 - 3
    for first, fits in ((47, True), (48, False)):
        collector = Collector(terms, ("p0", "p1"))
        for name, error in (("p0", 47), ("p1", first)):
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
    ring = parameters.ring
    seen = [made.key]
    for batch, rows in enumerate(opened(residues_of(made.messages, terms), terms, made.key)):
        lanes, left = parameters.lanes(batch), rows[0].astype(np.int64)
        errors = np.where(left > ring.primes[0] // 2, left - ring.primes[0], left)
        assert np.abs(errors).max() <= TAIL
        seen += list(errors.reshape(-1, lanes).T)
    assert len({one.tobytes() for one in seen}) == parameters.blocks + 1


CUT = [(3, 1, 1000), (3, 8192 * 9 + 1, 2**15), (2, 10_000, 2**60), (50, 100_000, 2**15), (5, 40_000, 3)]


@pytest.mark.parametrize(("parties", "length", "bound"), CUT)
def test_of_the_last_block_no_more_travels_than_holds_values(parties: int, length: int, bound: int) -> None:
    """By the page's formula, and what travels is the beginning of what a whole block would have been."""
    terms = terms_of(parties, length, bound)
    chosen = terms.parameters
    used = -(-(length - chosen.whole * chosen.block_values) // chosen.slots)
    assert chosen.tail == max(64, -(-used // 8) * 8) < chosen.degree
    vector = np.random.default_rng(3).integers(-bound, bound, length, endpoint=True)
    made = encrypt(vector, terms, randomness=lambda size: bytes(range(size)))
    raws = list(made.messages)
    bodies = [read_ciphertext(raw, sender="test", body=1 << 24).body for raw in raws]
    bits = chosen.modulus_bits
    assert sum(map(len, bodies)) == chosen.ciphertext_bytes
    assert chosen.ciphertext_bytes == chosen.whole * chosen.degree * bits // 8 + chosen.tail * bits // 8
    # The block as it would be whole: the same values in the same slots, the rest zero, under the same key and errors.
    bulk, block = kernels(), np.zeros((chosen.slots, chosen.degree), np.int64)
    rest = vector[chosen.whole * chosen.block_values :]
    for j in range(chosen.slots):
        part = rest[j * chosen.tail : (j + 1) * chosen.tail]
        block[j, : part.size] = part
    last = chosen.batches - 1
    full = bulk.encrypt(
        chosen.ring,
        bulk.digits(block.reshape(-1), chosen.degree, chosen.digits, chosen.slot_bits),
        split._scales(chosen),
        sample(bytes(range(32)), chosen.degree, offset=chosen.degree * (1 + chosen.whole)),
        terms.public(last),
        bulk.transform(chosen.ring, made.key.astype(np.float64)),
        lanes=1,
    )
    nothing = np.zeros_like(full)
    coefficients = bulk.remove(chosen.ring, full, nothing, nothing, lanes=1)
    assert np.array_equal(residues_of(raws, terms)[last], coefficients[:, : chosen.tail])


def test_a_tensor_is_spread_over_a_block_that_is_cut_as_an_array_is() -> None:
    chosen = terms_of(3, 50_000, 2**10).parameters
    assert 0 < chosen.tail < chosen.degree
    rest = np.arange(1, 50_000 - chosen.whole * chosen.block_values + 1)
    spread = split._spread(rest, chosen)
    assert np.array_equal(split._spread(torch.from_numpy(rest), chosen).numpy(), spread)
    rows = spread.reshape(chosen.slots, chosen.degree)
    assert not rows[:, chosen.tail :].any()
    assert np.array_equal(rows[:, : chosen.tail].reshape(-1)[: rest.size], rest)


def test_garbage_in_a_block_that_is_cut_shows() -> None:
    """Uniform residues in its 64 coefficients: none of 200 such sums opens. One of them alone may pass for a sum."""
    terms = terms_of(2, 5, 1000)
    assert (terms.parameters.blocks, terms.parameters.tail) == (1, 64)
    generator = np.random.default_rng(4)
    for _ in range(200):
        collector = Collector(terms, ("p0", "p1"))
        body = generator.bytes(terms.parameters.ciphertext_bytes)
        collector.receive("p0", messages.encode(Ciphertext(terms.id, terms.number, terms.key, 0, body)))
        collector.include("p0")
        with pytest.raises(GarbledSumError):
            collector.open(np.zeros(terms.parameters.degree, np.int64), ["p0"])


@pytest.mark.parametrize("parties", [2, 10, 50, 1000])
def test_the_sum_of_keys_travels_in_as_many_bits_as_its_bound_needs(parties: int) -> None:
    chosen = terms_of(parties, 5, 1).parameters
    bound, bits = chosen.error_bound(parties), chosen.key_bits
    assert -(1 << bits - 1) <= -bound < bound < 1 << bits - 1
    assert bound >= 1 << bits - 2  # and with one bit less it would not fit
    assert key_spec(chosen).modulus_bits == bits <= (2 * parties * TAIL).bit_length()
    assert key_spec(chosen) is key_spec(replace(chosen))  # of all parties' names, and so once for all in a process
