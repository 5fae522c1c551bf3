"""The split-key sum through the interface: parties, dropouts, rounds; and a search for keys in all that is sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.protocols import Homomorphic, Identity, SumSpec, in_process
from choral.protocols.crypto.modular_integers import pack
from choral.protocols.errors import (
    FaultyPartyError,
    GarbledSumError,
    InputError,
    LateVectorError,
    PolicyError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.homomorphic.ring import gaussian
from choral.protocols.homomorphic.ring.choose_kernels import kernels
from choral.protocols.homomorphic.ring.gaussian import TAIL
from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels
from choral.protocols.homomorphic.split import decoding
from choral.protocols.homomorphic.split import party_and_server as split
from choral.protocols.homomorphic.split import party_driver as split_party
from choral.protocols.homomorphic.split.in_process import SplitSession
from choral.protocols.homomorphic.split.party_driver import key_spec
from choral.protocols.masking.party_round import Ready
from choral.protocols.masking.policy import Policy

SPEC = SumSpec(parties=("north", "south", "east", "west"), length=5, bound=100)
VECTORS = {
    "north": [1, -2, 100, 0, 7],
    "south": [5, 5, -100, 1, 0],
    "east": [7, 0, 0, 0, 0],
    "west": [-100, 100, 1, 1, 1],
}


def session_of(spec: SumSpec = SPEC, **more: Any) -> SplitSession:
    session = Homomorphic(**more).open(spec)
    assert isinstance(session, SplitSession)
    return session


def run(session: Any, vectors: dict[str, Any]) -> Any:
    summing = session.begin()
    for party, vector in vectors.items():
        summing.submit(party, np.asarray(vector, np.int64))
    return summing.finish()


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_the_sum_is_exact_whatever_is_asked_and_whoever_drops_out(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 8))
    bound = data.draw(st.one_of(st.integers(1, 2**20), st.integers(1, (2**64 - 1) // (2 * n))))
    length = data.draw(st.integers(1, 5000))
    names = tuple(f"party {place}" for place in range(n))
    session = session_of(SumSpec(parties=names, length=length, bound=bound))
    gone = data.draw(st.sets(st.sampled_from(names), max_size=session.statement["dropouts"]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for _ in range(2):
        vectors = {name: generator.integers(-bound, bound, length, endpoint=True) for name in names if name not in gone}
        result = run(session, vectors)
        assert np.array_equal(result.total, sum(vectors.values()))
        assert result.total.dtype == np.int64
        assert result.survivors == tuple(vectors)
        gone = set()


def test_many_parties_on_a_sparse_graph() -> None:
    names = tuple(f"party {place}" for place in range(70))
    session = session_of(SumSpec(parties=names, length=3000, bound=2**16), dropouts=4, corrupt=2)
    vectors = {name: np.random.default_rng(i).integers(-(2**16), 2**16, 3000) for i, name in enumerate(names[3:])}
    result = run(session, vectors)
    assert np.array_equal(result.total, sum(vectors.values()))
    assert result.survivors == names[3:]


def test_tensors_and_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made = TorchKernels()
    for module in (split, decoding, gaussian):
        monkeypatch.setattr(module, "kernels", lambda device="cpu": made)
    summing = session_of().begin()
    for party, vector in VECTORS.items():
        summing.submit(party, torch.tensor(vector))
    assert summing.finish().total.tolist() == np.sum(list(VECTORS.values()), axis=0).tolist()


@pytest.mark.parametrize(
    "vector",
    [
        np.array([1.0, 2, 3, 4, 5]),
        np.array([np.nan, 2, 3, 4, 5]),
        np.array([1, 2, 3, 4, 5], np.int32),
        np.array([1, 2, 3, 4, 101]),
        np.array([1, 2, 3, 4]),
        np.ma.array([1, 2, 3, 4, 101], mask=[False] * 4 + [True]),
        torch.tensor([1, 2, 3, 4, -101]),
        [1, 2, 3, 4, 5],
        None,
    ],
    ids=str,
)
def test_a_wrong_vector_harms_nothing_and_may_be_put_right(vector: Any) -> None:
    summing = session_of().begin()
    with pytest.raises(InputError) as caught:
        summing.submit("north", vector)
    assert "101" not in str(caught.value)
    for party, right in VECTORS.items():
        summing.submit(party, np.array(right))
    assert summing.finish().total.tolist() == [-87, 103, 1, 2, 8]


def test_nothing_is_used_twice() -> None:
    summing = session_of().begin()
    with pytest.raises(SpecError, match="unknown party"):
        summing.submit("centre", np.array(VECTORS["north"]))
    for party in SPEC.parties:
        summing.submit(party, np.array(VECTORS[party]))
        with pytest.raises(StateUsedError):
            summing.submit(party, np.array(VECTORS[party]))
    assert summing.finish().total.tolist() == [-87, 103, 1, 2, 8]
    with pytest.raises(StateUsedError):
        summing.finish()
    with pytest.raises((StateUsedError, LateVectorError)):
        summing.submit("north", np.array(VECTORS["north"]))


def test_a_round_that_is_given_up_stays_so() -> None:
    """Its ciphertexts have arrived, its keys never will: neither for its own parties nor in another round."""
    session = session_of()
    first = session.begin()
    first.submit("north", np.array(VECTORS["north"]))
    first.submit("south", np.array(VECTORS["south"]))
    second = session.begin()
    with pytest.raises(StateUsedError):
        first.submit("east", np.array(VECTORS["east"]))
    with pytest.raises(StateUsedError):
        first.finish()
    for party in SPEC.parties:
        second.submit(party, np.array(VECTORS[party]))
    assert second.finish().total.tolist() == [-87, 103, 1, 2, 8]
    assert run(session, VECTORS).total.tolist() == [-87, 103, 1, 2, 8]


def test_too_few_survivors_open_nothing_and_the_session_goes_on() -> None:
    session = session_of(min_survivors=3)
    with pytest.raises(TooFewSurvivorsError) as caught:
        run(session, {party: VECTORS[party] for party in ("north", "south")})
    assert caught.value.missing == ("east", "west")
    assert run(session, VECTORS).total.tolist() == [-87, 103, 1, 2, 8]


UPLOAD = b"\xa6upload"


def _let_down(monkeypatch: pytest.MonkeyPatch, party: str, kind: bytes = UPLOAD) -> None:
    """The key of ``party`` is lost between it and the masked sum."""
    original = in_process.ByteCounter.up

    def up(self: Any, name: str, raw: bytes) -> bytes:
        if name == party and raw[2:].startswith(kind):
            raise ConnectionError("lost")
        return original(self, name, raw)

    monkeypatch.setattr(in_process.ByteCounter, "up", up)


def test_a_ciphertext_whose_key_never_came_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    summing = session_of().begin()
    _let_down(monkeypatch, "east")
    for party, vector in VECTORS.items():
        if party == "east":
            with pytest.raises(ConnectionError):
                summing.submit(party, np.array(vector))
        else:
            summing.submit(party, np.array(vector))
    result = summing.finish()
    assert result.survivors == ("north", "south", "west")
    assert result.total.tolist() == [-94, 103, 1, 2, 8]
    assert result.bytes_up["east"] > 0


def test_a_ciphertext_that_was_cut_off_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not complete, so its key is not let in, and the party counts as dropped."""
    summing = session_of().begin()

    def cut(self: Any, party: str, raw: bytes) -> bytes:
        if party == "south":
            raise ConnectionError("lost")
        return raw

    with monkeypatch.context() as patch:
        patch.setattr(in_process.ByteCounter, "up", cut)
        with pytest.raises(ConnectionError):
            summing.submit("south", np.array(VECTORS["south"]))
    for party in ("north", "east", "west"):
        summing.submit(party, np.array(VECTORS[party]))
    assert summing.finish().total.tolist() == [-92, 98, 101, 1, 8]


def test_a_cheating_key_garbles_the_sum_and_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A party that gives the masked sum another key than it encrypted under: an error, and no wrong sum."""
    original = Ready.upload

    def upload(self: Any, vector: Any) -> Any:
        changed, (masking, *_) = np.array(vector), tuple(self._content)
        if masking.member.index == SPEC.parties.index("south"):
            changed[100] += 1 if changed[100] < TAIL else -1
        return original(self, changed)

    monkeypatch.setattr(Ready, "upload", upload)
    session = session_of()
    with pytest.raises(GarbledSumError) as caught:
        run(session, VECTORS)
    assert caught.value.hint
    monkeypatch.undo()
    assert run(session, VECTORS).total.tolist() == [-87, 103, 1, 2, 8]


def test_the_server_counts_a_key_only_with_its_ciphertext() -> None:
    """Keys over other parties than the ciphertexts: a key whose ciphertext never came is not let in."""
    session = session_of()
    summing = session.begin()
    for party in ("north", "south", "east"):
        summing.submit(party, np.array(VECTORS[party]))
    *_, key = session.parties["west"].supply(np.array(VECTORS["west"]))
    with pytest.raises(FaultyPartyError, match="west: sent its key before its whole ciphertext"):
        session.send("west", (key,), summing._uploading)
    assert summing.finish().survivors == ("north", "south", "east")


def test_a_tampered_message_is_refused_before_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    summing = session_of().begin()
    sent: list[bytes] = []

    def up(self: Any, party: str, raw: bytes) -> bytes:
        sent.append(raw)
        return raw[:-1]

    with monkeypatch.context() as patch:
        patch.setattr(in_process.ByteCounter, "up", up)
        with pytest.raises(Exception, match="from north"):
            summing.submit("north", np.array(VECTORS["north"]))
    assert len(sent) == 1
    assert not sent[0][2:].startswith(UPLOAD)


@pytest.fixture
def wiretap(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[list[bytes], list[Any], list[bytes]]]:
    """All bytes on the wire, both ways; all keys; all seeds that encryption drew."""
    sent: list[bytes] = []
    keys: list[Any] = []
    seeds: list[bytes] = []
    up, down, encrypt = in_process.ByteCounter.up, in_process.ByteCounter.down, split.encrypt

    def tapped_up(self: Any, party: str, raw: bytes) -> bytes:
        sent.append(bytes(raw))
        return up(self, party, raw)

    def tapped_down(self: Any, party: str, raw: bytes) -> None:
        sent.append(bytes(raw))
        down(self, party, raw)

    def tapped(vector: Any, terms: Any, *, randomness: Callable[[int], bytes]) -> Any:
        def noted(size: int) -> bytes:
            seeds.append(randomness(size))
            return seeds[-1]

        encrypted = encrypt(vector, terms, randomness=noted)
        keys.append(encrypted.key.copy())
        return encrypted

    monkeypatch.setattr(in_process.ByteCounter, "up", tapped_up)
    monkeypatch.setattr(in_process.ByteCounter, "down", tapped_down)
    monkeypatch.setattr(split_party, "encrypt", tapped)
    return lambda: (sent, keys, seeds)


def encodings(key: Any, parameters: Any) -> dict[str, bytes]:
    """A key as one might send it by mistake."""
    bits = (2 * len(parameters.spec.parties) * TAIL).bit_length()
    transformed = kernels().transform(parameters.ring, key.astype(np.float64))
    primes = np.array(parameters.ring.primes)[:, None]
    found: dict[str, bytes] = {
        str(dtype): key.astype(dtype).tobytes() for dtype in ("i1", "<i2", "<i4", "<i8", "<f4", "<f8")
    }
    found["big-endian"] = key.astype(">i4").tobytes()
    found["unsigned, offset"] = (key + TAIL).astype(np.uint8).tobytes()
    found["text"] = ", ".join(map(str, key)).encode()
    found["compact text"] = ",".join(map(str, key)).encode()
    found["masked sum's packing"] = pack(key.astype(np.uint32) & np.uint32((1 << bits) - 1), bits)
    found["8 bits"] = pack(key.astype(np.uint32) & np.uint32(255), 8)
    found["transformed"] = transformed.tobytes()
    found["transformed residues"] = (transformed % primes).astype(np.uint32).tobytes()
    for width in range(7, bits):  # modulo fewer bits, too
        found[f"masked sum's packing, {width} bits"] = pack(key.astype(np.uint32) & np.uint32((1 << width) - 1), width)
    found["packed"] = kernels().pack(
        np.resize((transformed % primes).astype(np.int32).reshape(-1), 2048), parameters.prime_bits
    )
    found["coefficients packed"] = kernels().pack((key % primes[0]).astype(np.int32), parameters.prime_bits)
    return found


def finds(needle: bytes, hay: bytes) -> bool:
    """Whether any of several stretches of 48 bytes is in there, or in hexadecimal or base64 at any alignment."""
    size = min(48, len(needle))
    for start in range(0, max(1, len(needle) - size), max(1, len(needle) // 8)):
        piece = needle[start : start + size]
        if piece in hay or piece.hex().encode() in hay:
            return True
        for skip in range(3):
            if base64.b64encode(piece[skip : skip + 30]) in hay:
                return True
    return False


@pytest.mark.parametrize("length", [5, 20_000])
def test_no_key_or_seed_is_sent_shown_or_kept(length: int, wiretap: Any, caplog: pytest.LogCaptureFixture) -> None:
    spec = SumSpec(parties=SPEC.parties, length=length, bound=100)
    session = session_of(spec)
    summing = session.begin()
    for party in spec.parties[:3]:
        summing.submit(party, np.full(length, 3))
    result = summing.finish()
    sent, keys, seeds = wiretap()
    assert len(keys) == len(seeds) == 3
    assert len(sent) > 20
    shown = [repr(session), repr(summing), repr(result), json.dumps(dict(session.statement)), caplog.text]
    shown += [repr(session.parameters), repr(session.server), *map(repr, session.parties.values())]
    everything = b"\n".join([*sent, *(text.encode() for text in shown)])
    for key, seed in zip(keys, seeds, strict=True):
        for name, needle in encodings(key, session.parameters).items():
            assert not finds(needle, everything), name
            assert finds(needle, everything + needle), name  # the search finds what is there
            assert finds(needle, base64.b64encode(needle) + everything), name
        for needle in (seed, seed[:16], seed[16:], seed[::-1]):
            assert not finds(needle, everything)
            assert finds(needle, everything + needle)
    # What remains in the objects of the round holds no key either: the parties are played and gone.
    kept = [
        value
        for owner in (summing, session, session.server, *session.parties.values())
        for value in vars(owner).values()
    ]
    assert not any(isinstance(value, np.ndarray) and value.shape == keys[0].shape for value in kept)


def test_every_round_has_fresh_keys_and_public_randomness(wiretap: Any) -> None:
    session = session_of()
    run(session, VECTORS)
    run(session, VECTORS)
    again = session_of()
    run(again, VECTORS)
    _, keys, seeds = wiretap()
    assert len(set(seeds)) == len(seeds) == 12
    assert len({key.tobytes() for key in keys}) == 12
    assert session.digest != again.digest


def test_errors_hold_no_secret(monkeypatch: pytest.MonkeyPatch, wiretap: Any) -> None:
    session = session_of()
    summing = session.begin()
    shown = []
    _let_down(monkeypatch, "east")
    for party, vector in VECTORS.items():
        try:
            summing.submit(party, np.array(vector))
        except ConnectionError as error:
            shown.append(repr(error))
    *_, key = summing._answers["east"]
    with pytest.raises(FaultyPartyError) as caught:
        session.send("north", (key,), summing._uploading)
    shown += [str(caught.value), repr(caught.value), caught.value.hint]
    _, keys, seeds = wiretap()
    for text in shown:
        assert not any(seed.hex() in text or repr(seed)[2:-1] in text for seed in seeds)
        assert not any(", ".join(map(str, key[:6])) in text for key in keys)


def test_the_sum_of_keys_is_bound_to_the_terms_of_the_long_vector() -> None:
    """The signatures on the sum of keys are on a setup that names them: a party with other terms does not join."""
    ours = session_of().parameters
    names = [key_spec(ours)]
    for change in ({"length": 6}, {"bound": 101}, {"encoding": "x"}):
        fields = {"parties": SPEC.parties, "length": 5, "bound": 100} | change
        names.append(key_spec(session_of(SumSpec(**fields)).parameters))  # type: ignore[arg-type]
    assert len({spec.encoding for spec in names}) == 4
    assert all(spec.bound == TAIL and spec.length == ours.degree for spec in names[:1])
    session = session_of()
    setup = session.server.setup
    assert setup.encoding == key_spec(session.parameters).encoding
    assert setup.length == session.parameters.degree
    with pytest.raises(PolicyError):
        split_sum_party_with_other_terms(session)


def split_sum_party_with_other_terms(session: SplitSession) -> None:
    """One that would encode in another way is shown this session's setup."""
    import secrets

    from choral.protocols.masking import messages
    from choral.protocols.masking.party import join

    policy: Policy = session._policy
    other = Policy(**{**vars(policy), "encoding": "split-key sum, terms of mine"})
    raw = messages.encode(session.server.setup)
    join(raw, name="north", identity=secrets.token_bytes(32), policy=other, randomness=secrets.token_bytes)


@pytest.mark.parametrize(
    "stricter",
    [
        {"maximum_length": 4},
        {"maximum_bound": 99},
        {"maximum_modulus_bits": 9},
        {"maximum_weight": 99},
        {"encoding": "another"},
        {"wraps_at": 9},
    ],
)
def test_a_party_has_no_driver_for_another_vector_than_its_policy_allows(stricter: dict[str, Any]) -> None:
    """The setup that it signs is of the sum of keys, so that the policy's words on the long vector are held here."""
    identity = Identity(bytes(32))
    policy = replace(Homomorphic()._keys().policy(SPEC), directory={"north": identity.public})
    Homomorphic().party_driver(SPEC, name="north", identity=identity, policy=policy)
    with pytest.raises(PolicyError):
        Homomorphic().party_driver(SPEC, name="north", identity=identity, policy=replace(policy, **stricter))


def test_the_statement_says_what_is_trusted_and_what_was_chosen() -> None:
    session = session_of()
    statement = dict(session.statement)
    assert json.loads(json.dumps(statement)) == statement
    assert statement["key"] == "split"
    assert "Nobody holds a decryption key" in statement["trust"]
    assert "ring-LWE" in statement["trust"]
    assert statement["ring_degree"] == session.parameters.degree
    assert statement["security_bits"] <= 128
    assert statement["noise_margin_bits"] >= 1
    assert statement["min_survivors"] >= statement["corrupt"] + 2


def test_a_submission_that_broke_off_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SumSpec(parties=("north", "south", "east"), length=40, bound=5)
    session = Homomorphic().open(spec)
    summing = session.begin()
    vector = np.arange(40, dtype=np.int64) % 5
    with monkeypatch.context() as broken:
        _let_down(broken, "north")
        with pytest.raises(ConnectionError):
            summing.submit("north", vector)
    for party in spec.parties:
        summing.submit(party, vector)
    assert summing.finish().total.tolist() == (3 * vector).tolist()
