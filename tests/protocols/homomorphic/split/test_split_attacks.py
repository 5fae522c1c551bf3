"""Attacks on the split-key sum: forged raws, cheating coalitions, and an experiment in telling two inputs apart.

The experiment. A coalition of the server and all parties but i and j names two vectors; i encrypts one of them and j
the other, by a coin. The coalition holds both ciphertexts, all public randomness, T = s_i + s_j and the sums of their
errors, and guesses the coin. A guess is right half the time against the real scheme, and always against variants that
are broken on purpose: then some relation among what it holds leaves a *small* element for the right guess. What is
tried are all relations without lattice reduction; that those with it are too expensive is test_lattice_security.py's
matter, and at the end of this page a toy ring shows that they are what hides the coin.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product as all_of
from typing import Any

import numpy as np
import pytest

from choral.protocols import SumSpec
from choral.protocols.errors import (
    FaultyPartyError,
    GarbledSumError,
    LateVectorError,
    MessageError,
    ProtocolError,
    StateUsedError,
)
from choral.protocols.homomorphic.messages import Ciphertext, read_ciphertext
from choral.protocols.homomorphic.ring import gaussian
from choral.protocols.homomorphic.ring.choose_kernels import kernels
from choral.protocols.homomorphic.split import party_and_server as split
from choral.protocols.homomorphic.split.parameters import choose
from choral.protocols.homomorphic.split.party_and_server import Collector, Encrypted, SplitRound, encrypt
from choral.protocols.masking import messages

SESSION = bytes(range(32))
PARTIES = ("a", "b", "c", "d")


def terms_of(length: int = 50, bound: int = 1000, number: int = 1, session: bytes = SESSION) -> SplitRound:
    spec = SumSpec(parties=PARTIES, length=length, bound=bound)
    return SplitRound(parameters=choose(spec), session=session, number=number)


def filled(terms: SplitRound) -> SplitRound:
    """The same for a vector that fills its block, which is then not cut."""
    chosen = terms.parameters
    return replace(terms, parameters=replace(chosen, spec=replace(chosen.spec, length=chosen.block_values)))


def encrypted(terms: SplitRound, value: int = 1) -> tuple[Any, list[bytes]]:
    made = encrypt(np.full(terms.parameters.spec.length, value), terms, randomness=secrets.token_bytes)
    return made.key, list(made.messages)


@dataclass
class Server:
    """A collector with honest parties' ciphertexts in it."""

    terms: SplitRound
    collector: Collector = field(init=False)
    keys: dict[str, Any] = field(default_factory=dict)
    sent: dict[str, list[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.collector = Collector(self.terms, PARTIES)

    def take(self, *parties: str) -> Server:
        for party in parties:
            self.keys[party], self.sent[party] = encrypted(self.terms)
            for raw in self.sent[party]:
                self.collector.receive(party, raw)
            self.collector.include(party)
        return self

    def open(self) -> Any:
        return self.collector.open(sum(self.keys.values()), list(self.keys))


def parsed(raw: bytes) -> Ciphertext:
    return read_ciphertext(raw, sender="test", body=1 << 24)


def changed(raw: bytes, **fields: Any) -> bytes:
    message = parsed(raw)
    names = ("session", "round", "key", "index", "body")
    return messages.encode(Ciphertext(**({name: getattr(message, name) for name in names} | fields)))


Forgery = Callable[[bytes], bytes]
FORGERIES: dict[str, tuple[Forgery, str]] = {
    "another session": (lambda raw: changed(raw, session=bytes(16)), "another session or round"),
    "another round": (lambda raw: changed(raw, round=2), "another session or round"),
    "another key": (lambda raw: changed(raw, key=bytes(16)), "another sum of keys"),
    "a later piece": (lambda raw: changed(raw, index=1), "expected piece 0 of 1"),
    "a huge index": (lambda raw: changed(raw, index=(1 << 32) - 1), "expected piece 0 of 1"),
    "a short body": (lambda raw: changed(raw, body=parsed(raw).body[:-4]), "expected [0-9]+ bytes"),
    "a single byte": (lambda raw: changed(raw, body=b"x"), "expected [0-9]+ bytes"),
    "a truncated message": (lambda raw: raw[:-1], "are no message"),
    "a longer message": (lambda raw: raw + b"x", "are no message"),
    "nothing": (lambda raw: b"", "protocol version"),
    "another version": (lambda raw: bytes([raw[0] + 1]) + raw[1:], "protocol version"),
    "another kind": (lambda raw: messages.encode(messages.Survivors(bytes(16), 1, b"x")), "are no message"),
    "a huge message": (lambda raw: raw + bytes(1 << 24), "at most"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_message_is_refused_and_the_right_one_still_taken(name: str) -> None:
    forge, match = FORGERIES[name]
    server = Server(terms_of()).take("a", "b")
    key, raws = encrypted(server.terms)
    with pytest.raises((FaultyPartyError, MessageError), match=match) as caught:
        server.collector.receive("c", forge(raws[0]))
    assert caught.value.blame == "c"
    assert not server.collector.complete("c")
    with pytest.raises(FaultyPartyError, match="not complete"):
        server.collector.include("c")
    server.collector.receive("c", raws[0])
    server.collector.include("c")
    server.keys["c"] = key
    assert (server.open() == 3).all()


def test_a_body_longer_than_any_is_refused() -> None:
    """Longer than this piece, though within the limit of a message: the last of several is shorter than the rest."""
    terms = terms_of(length=3_000_000, bound=2**20)
    chosen = terms.parameters
    assert chosen.messages > 1
    _, raws = encrypted(terms)
    assert len(raws) == chosen.messages
    collector = Collector(terms, PARTIES)
    for raw in raws[:-1]:
        collector.receive("a", raw)
    with pytest.raises(FaultyPartyError, match=r"expected [0-9]+ bytes"):
        collector.receive("a", changed(raws[-1], body=parsed(raws[0]).body))
    with pytest.raises(FaultyPartyError, match="expected piece"):
        collector.receive("a", raws[0])
    assert not collector.complete("a")
    collector.receive("a", raws[-1])
    assert collector.complete("a")
    with pytest.raises(FaultyPartyError, match="expected piece"):
        collector.receive("a", changed(raws[-1], index=chosen.messages))


def test_a_message_is_taken_once_and_from_a_party_of_the_round_only() -> None:
    server = Server(terms_of())
    _, raws = encrypted(server.terms)
    server.collector.receive("a", raws[0])
    with pytest.raises(FaultyPartyError, match="expected piece 1 of 1"):
        server.collector.receive("a", raws[0])
    server.collector.include("a")
    with pytest.raises(FaultyPartyError, match="whole ciphertext"):
        server.collector.receive("a", raws[0])
    with pytest.raises(FaultyPartyError, match="not complete"):
        server.collector.include("a")
    with pytest.raises(FaultyPartyError, match="no party of this round"):
        server.collector.receive("e", raws[0])
    with pytest.raises(FaultyPartyError, match="not complete"):
        server.collector.include("e")


def test_nothing_is_taken_or_opened_after_the_sum_is_open() -> None:
    server = Server(terms_of()).take("a", "b")
    _, raws = encrypted(server.terms)
    server.collector.receive("d", raws[0])
    assert (server.open() == 2).all()
    with pytest.raises(LateVectorError):
        server.collector.receive("c", raws[0])
    with pytest.raises(StateUsedError):
        server.collector.include("d")
    with pytest.raises(StateUsedError):
        server.open()


def test_keys_over_other_parties_open_nothing_and_spend_nothing() -> None:
    server = Server(terms_of()).take("a", "b", "c")
    for survivors in (("a", "b"), ("a", "b", "d"), ("a", "b", "c", "d"), ()):
        with pytest.raises(StateUsedError, match="other parties"):
            server.collector.open(sum(server.keys.values()), survivors)
    assert (server.open() == 3).all()


def other_keys(server: Server) -> Iterator[tuple[str, Any]]:
    true = sum(server.keys.values())
    yield "zero", np.zeros_like(true)
    yield "all but one party's", true - server.keys["a"]
    yield "one party's twice", true + server.keys["a"]
    yield "one party's alone", server.keys["a"]
    one = true.copy()
    one[5] += 1
    yield "off by one in one place", one
    yield "rotated", np.roll(true, 1)
    yield "negated", -true
    yield "of another round", sum(encrypted(server.terms)[0] for _ in server.keys)


def test_a_wrong_sum_of_keys_opens_nothing() -> None:
    for place in range(len(list(other_keys(Server(terms_of()).take("a", "b"))))):
        server = Server(terms_of()).take("a", "b", "c")
        name, keys = list(other_keys(server))[place]
        with pytest.raises(GarbledSumError):
            pytest.fail(f"opened with {name}: {server.collector.open(keys, ['a', 'b', 'c'])}")


def test_a_tampered_body_opens_nothing() -> None:
    """A bit anywhere in a whole block changes every coefficient of it; one in a block that is cut changes one."""
    for place in (0, 1000, -1):
        server = Server(filled(terms_of())).take("a", "b")
        key, raws = encrypted(server.terms)
        body = bytearray(parsed(raws[0]).body)
        body[place] ^= 4
        server.collector.receive("c", changed(raws[0], body=bytes(body)))
        server.collector.include("c")
        server.keys["c"] = key
        with pytest.raises(GarbledSumError):
            server.open()


@pytest.mark.parametrize(
    "other",
    [terms_of(number=2), terms_of(session=bytes(32)), terms_of(bound=1001), terms_of(length=51)],
    ids=["round", "session", "bound", "length"],
)
def test_a_replayed_ciphertext_is_refused_and_garbles_if_it_is_forced_in(other: SplitRound) -> None:
    """Of another round, session or other parameters; also when the server relabels it, as a malicious one would."""
    assert other.key != terms_of().key
    server = Server(terms_of()).take("a", "b")
    key, raws = encrypted(other)
    with pytest.raises(FaultyPartyError):
        server.collector.receive("c", raws[0])
    fields = {"session": server.terms.id, "round": 1, "key": server.terms.key}
    server.collector.receive("c", changed(raws[0], **fields))
    server.collector.include("c")
    server.keys["c"] = key
    if other.public_seed != server.terms.public_seed:
        with pytest.raises(GarbledSumError):
            server.open()


def test_parties_under_different_public_randomness_garble_the_sum() -> None:
    """A server that shows two parties two sessions: their keys' signatures would not fit, and this would not open."""
    server = Server(terms_of()).take("a", "b")
    mine = terms_of(session=b"another session, another digest.")
    assert mine.public_seed != server.terms.public_seed
    key, raws = encrypted(mine)
    relabelled = changed(raws[0], session=server.terms.id, key=server.terms.key)
    server.collector.receive("c", relabelled)
    server.collector.include("c")
    server.keys["c"] = key
    with pytest.raises(GarbledSumError):
        server.open()


def negated(terms: SplitRound, raw: bytes) -> bytes:
    """The ciphertext of minus the vector, under minus the key: anybody can make it."""
    chosen = terms.parameters
    sums = np.zeros((chosen.prime_count, chosen.coefficients(0)), np.uint32)
    split._add(memoryview(parsed(raw).body), sums, 0, chosen)
    minus = (-sums.astype(np.int64) % np.array(chosen.ring.primes)[:, None]).astype(np.int32)
    return changed(raw, body=split._pack(minus, 0, chosen, kernels()))


def test_a_corrupt_party_that_cancels_an_honest_one_gains_nothing() -> None:
    """It sends minus a's ciphertext, so that the sum is b's alone; but then its key has to be minus a's, which it does
    not know. With that key it would work, so this test tries the right thing."""
    for key_is_known in (False, True):
        server = Server(terms_of()).take("a", "b")
        server.collector.receive("c", negated(server.terms, server.sent["a"][0]))
        server.collector.include("c")
        server.keys["c"] = -server.keys["a"] if key_is_known else encrypted(server.terms)[0]
        if key_is_known:
            assert (server.open() == 1).all()
        else:
            with pytest.raises(GarbledSumError):
                server.open()


def test_a_copied_ciphertext_gains_nothing() -> None:
    """The same with a copy of a's, which would count a's vector twice."""
    for key_is_known in (False, True):
        server = Server(terms_of()).take("a", "b")
        server.collector.receive("c", server.sent["a"][0])
        server.collector.include("c")
        server.keys["c"] = server.keys["a"] if key_is_known else np.zeros_like(server.keys["a"])
        if key_is_known:
            assert (server.open() == 3).all()
        else:
            with pytest.raises(GarbledSumError):
                server.open()


def test_errors_name_no_residue_and_no_key() -> None:
    server = Server(terms_of()).take("a", "b")
    _, raws = encrypted(server.terms)
    for forge, _ in FORGERIES.values():
        with pytest.raises(ProtocolError) as caught:
            server.collector.receive("c", forge(raws[0]))
        assert parsed(raws[0]).body[:6].hex() not in str(caught.value)
        assert len(str(caught.value)) < 200


# The experiment


def transformed_residues(raws: Sequence[bytes], terms: SplitRound) -> Any:
    """A party's ciphertext, one prime: shape (blocks, N), residues of the transform."""
    chosen = terms.parameters
    assert chosen.prime_count == 1
    assert chosen.batches == 1
    packed = np.frombuffer(b"".join(parsed(raw).body for raw in raws), "<u4")
    out = np.zeros(chosen.degree * chosen.blocks, np.uint32)
    kernels().add(packed, chosen.prime_bits, out)
    return out.reshape(chosen.degree, chosen.blocks).T.astype(np.int64)


def forward(polynomials: Any, terms: SplitRound) -> Any:
    ring = terms.parameters.ring
    return np.stack([kernels().transform(ring, row.astype(np.float64))[0] % ring.primes[0] for row in polynomials])


def size_of(element: Any, terms: SplitRound) -> float:
    """The mean magnitude of an element's coefficients over that of a uniform one: 1 if it looks uniform."""
    ring, prime = terms.parameters.ring, terms.parameters.ring.primes[0]
    nothing = np.zeros((1, ring.degree), np.int32)
    rows = (element % prime).astype(np.int32)[None]
    back = kernels().remove(ring, rows, nothing, nothing, lanes=1)[0].astype(np.int64)
    return float(np.abs(np.where(back > prime // 2, back - prime, back)).mean() / (prime / 4))


def inverse(element: Any, prime: int) -> Any:
    """Place by place; 0 stays 0."""
    out, power, exponent = np.ones_like(element), element % prime, prime - 2
    while exponent:
        if exponent & 1:
            out = out * power % prime
        power, exponent = power * power % prime, exponent >> 1
    return out


@dataclass
class View:
    """What the coalition holds, transformed: for both parties their ciphertexts in one or two rounds, shape (blocks, N)
    each; the public randomness of each round; T and the sums of errors; and, where a key leaked, that."""

    terms: SplitRound
    first: list[Any]
    second: list[Any]
    public: list[Any]
    keys: Any
    errors: Any
    leaked: Any = None

    def residuals(self, ciphertexts: Sequence[Any], guess: Any) -> list[Any]:
        """What is left of a party's ciphertexts when it is guessed to have encrypted ``guess``, the same each round."""
        chosen = self.terms.parameters
        blocks = guess.reshape(chosen.degree, chosen.blocks).T << chosen.scale_bits
        message = forward(blocks, self.terms)
        return [(rows - message) % chosen.ring.primes[0] for rows in ciphertexts]

    def smallest(self, ciphertexts: Sequence[Any], guess: Any) -> float:
        """Of everything that public relations make of those residuals."""
        prime, a = self.terms.parameters.ring.primes[0], self.public[0]
        rounds = self.residuals(ciphertexts, guess)
        r = rounds[0]
        over = [row * inverse(one, prime) % prime for row, one in zip(r, a, strict=True)]
        tried = [*r, *over]
        tried += [r[0] - r[1], over[0] - over[1], r[0] * a[1] - r[1] * a[0]]
        tried += [2 * row - one * self.keys for row, one in zip(r, a, strict=True)]
        tried += [2 * row - one * self.keys - e for row, one, e in zip(r, a, self.errors, strict=True)]
        tried += [(row - one * self.keys - e) for row, one, e in zip(r, a, self.errors, strict=True)]
        tried += [2 * one - self.keys for one in over]
        tried += [later - row for again in rounds[1:] for later, row in zip(again, r, strict=True)]
        if self.leaked is not None:
            tried += [row - one * self.leaked for row, one in zip(r, a, strict=True)]
        return min(size_of(element, self.terms) for element in tried)

    def guess(self, one: Any, other: Any) -> bool:
        """Whether the first party is taken to have encrypted ``one`` (and the second ``other``)."""
        right = min(self.smallest(self.first, one), self.smallest(self.second, other))
        wrong = min(self.smallest(self.first, other), self.smallest(self.second, one))
        return right < wrong


TOY = replace(
    choose(SumSpec(parties=PARTIES, length=2 * 2048, bound=7)),
    degree=2048,
    prime_count=1,
    prime_bits=20,
    wide=0,
    slots=1,
)
"""The real ring of dimension 2048 and scheme, with one value a coefficient, in two blocks."""


def play(
    encryption: Callable[..., Encrypted], generator: Any, *, rounds: int = 1, same: bool = False, leak: bool = False
) -> bool:
    """One game; whether the coalition guessed right. same: the rounds' public randomness is one."""
    session, coin = generator.bytes(32), bool(generator.integers(2))
    one, other = generator.integers(-7, 8, (2, 4096))
    vectors = (one, other) if coin else (other, one)
    views: tuple[list[Any], list[Any]] = ([], [])
    public, keys, errors = [], [], []
    for number in range(1, rounds + 1):
        terms = SplitRound(parameters=TOY, session=session, number=1 if same else number)
        a = split.SplitRound.public(terms, 0)[0].reshape(2048, 2).T.astype(np.int64)
        public.append(a)
        shares, noise = [], []
        for place, vector in enumerate(vectors):
            made = encryption(vector, terms, place)
            hidden = transformed_residues(list(made.messages), terms)
            views[place].append(hidden)
            shares.append(forward(made.key[None], terms)[0])
            message = forward(vector.reshape(2048, 2).T << TOY.scale_bits, terms)
            noise.append(hidden - a * shares[-1] - message)
        keys.append(sum(shares))
        errors.append(sum(noise))
    view = View(terms, *views, public, keys[0], errors[0], shares[0] if leak and rounds == 1 else None)
    return view.guess(one, other) == coin


def real(vector: Any, terms: SplitRound, place: int) -> Encrypted:
    return encrypt(vector, terms, randomness=secrets.token_bytes)


def test_the_coalition_has_no_advantage_against_the_scheme() -> None:
    """200 games of one round and 100 of two: right guesses are binomial around a half; false alarm 2e-9 at 6 sigma."""
    generator = np.random.default_rng(21)
    right = sum(play(real, generator) for _ in range(200)) + sum(play(real, generator, rounds=2) for _ in range(100))
    assert abs(right - 150) < 6 * (300 / 4) ** 0.5


def test_it_wins_when_a_key_and_its_errors_are_used_in_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a for both, and errors from one place of the stream: the difference of the blocks is that of the values."""
    original, drawn = SplitRound.public, gaussian.sample

    def public(self: SplitRound, batch: int) -> Any:
        rows = original(self, batch).reshape(1, 2048, 2)
        return np.repeat(rows[:, :, :1], 2, axis=2).reshape(1, -1)

    def sample(seed: bytes, count: int, *, offset: int = 0) -> Any:
        return drawn(seed, count, offset=offset) if offset == 0 else np.repeat(drawn(seed, 2048, offset=offset), 2)

    monkeypatch.setattr(SplitRound, "public", public)
    monkeypatch.setattr(split, "sample", sample)
    generator = np.random.default_rng(22)
    assert all(play(real, generator) for _ in range(30))
    # With fresh errors it is the same: one a for two blocks is enough.
    monkeypatch.setattr(split, "sample", drawn)
    assert all(play(real, generator) for _ in range(30))


def test_it_wins_when_a_key_is_used_in_two_rounds_with_one_public_randomness() -> None:
    """The party encrypts its values and then their negatives: the difference is twice the values. With a fresh key for
    the second round, or with other public randomness under the same key, nothing small is left."""
    generator = np.random.default_rng(23)
    for _ in range(30):
        seed = generator.bytes(32)
        first = SplitRound(parameters=TOY, session=generator.bytes(32), number=1)
        one, other = generator.integers(-7, 8, (2, 4096))
        for later, again, wins in (
            (first, seed, True),
            (first, generator.bytes(32), False),
            (replace(first, number=2), seed, False),
        ):
            made = [
                transformed_residues(list(encrypt(v, t, randomness=lambda size, k=k: k).messages), t)
                for v, t, k in ((one, first, seed), (-one, later, again))
            ]
            sizes = [
                size_of(
                    (made[0] - made[1] - forward((2 * guess).reshape(2048, 2).T << TOY.scale_bits, first))[0], first
                )
                for guess in (one, other)
            ]
            assert (sizes[0] < 0.001) == wins
            assert wins or min(sizes) > 0.9


def test_fresh_keys_with_one_public_randomness_do_not_help_it() -> None:
    """A submission that is repeated after a failure: the same a_k and vector, another key."""
    generator = np.random.default_rng(24)
    right = sum(play(real, generator, rounds=2, same=True) for _ in range(100))
    assert abs(right - 50) < 30


def test_it_wins_when_there_are_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = gaussian.sample
    monkeypatch.setattr(
        split,
        "sample",
        lambda seed, count, *, offset=0: drawn(seed, count) if offset == 0 else np.zeros(count, np.int8),
    )
    generator = np.random.default_rng(25)
    assert all(play(real, generator) for _ in range(30))


def test_it_wins_when_one_key_leaks() -> None:
    generator = np.random.default_rng(26)
    assert all(play(real, generator, leak=True) for _ in range(30))


# A toy ring, where lattices are small: dimension 8, modulus 257. Nothing of it is secure, that is what it shows.


def toy_product(one: Any, other: Any) -> Any:
    full = np.convolve(one, other)
    out = np.zeros(8, np.int64)
    out += full[:8]
    out[:7] -= full[8:]
    return out % 257


@pytest.mark.parametrize("hidden", [False, True])
def test_in_a_toy_ring_the_coin_is_found_by_trying_all_keys(hidden: bool) -> None:
    """Secrets and errors from {-1, 0, 1}, eight blocks, T given: of 3^8 keys exactly the right one leaves small errors
    under the right guess. With uniform errors (hidden) the same search finds nothing: it is the ring that is small."""
    generator = np.random.default_rng(27)
    candidates = np.array(list(all_of((-1, 0, 1), repeat=8)))
    right = 0
    for _ in range(20):
        coin = int(generator.integers(2))
        public = generator.integers(0, 257, (8, 8))
        key = generator.integers(-1, 2, 8)
        raws = generator.integers(-3, 4, (2, 8, 8)) * 16
        errors = generator.integers(-128, 129, (8, 8)) if hidden else generator.integers(-1, 2, (8, 8))
        ciphertext = np.array([toy_product(a, key) for a in public]) + errors + raws[coin]
        matrices = np.array([[toy_product(a, np.eye(8, dtype=np.int64)[i]) for i in range(8)] for a in public])
        products = np.einsum("ki,bij->kbj", candidates, matrices)
        sizes = []
        for message in raws:
            left = (ciphertext - message - products) % 257
            sizes.append(np.abs(np.where(left > 128, left - 257, left)).max(axis=(1, 2)).min())
        right += int(np.argmin(sizes)) == coin
        if not hidden:
            assert sizes[coin] <= 1 < sizes[1 - coin]
    assert right == 20 if not hidden else 1 <= right <= 19
