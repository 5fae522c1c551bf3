"""The shared-key sum through the interface: exact, dropouts, refusals, bytes, statement; and the same in floats."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.protocols.errors import InputError, SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.homomorphic.shared import setup as shared_terms
from choral.protocols.homomorphic.shared.float_sum import FloatSpec, FloatSum
from choral.protocols.homomorphic.shared.secure_sum import SharedSession
from choral.protocols.interface import SumSession, SumSpec
from choral.protocols.masking import messages


def names(n: int) -> tuple[str, ...]:
    return tuple(f"p{place}" for place in range(n))


def session(n: int = 4, length: int = 30, bound: int = 1000, min_survivors: int | None = 2) -> SharedSession:
    return SharedSession(SumSpec(parties=names(n), length=length, bound=bound), min_survivors=min_survivors)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_totals_are_exact_whoever_drops_out(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 6))
    bound = data.draw(st.one_of(st.integers(1, 300), st.integers(1, 2**54)))
    length = data.draw(st.one_of(st.integers(1, 40), st.integers(5000, 9000)))
    summing = session(n, length, bound)
    for _ in range(data.draw(st.integers(1, 2))):
        present = data.draw(st.sets(st.sampled_from(names(n)), min_size=2))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        one = summing.begin()
        total = np.zeros(length, np.int64)
        for party in sorted(present):
            vector = rng.integers(-bound, bound + 1, length)
            vector[rng.random(length) < 0.2] = data.draw(st.sampled_from([-bound, bound]))
            one.submit(party, vector)
            total += vector
        result = one.finish()
        assert result.total.dtype == np.int64
        assert np.array_equal(result.total, total)
        assert result.survivors == tuple(party for party in names(n) if party in present)


def test_vectors_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE", 100_000)  # instead of the longest byte string of msgpack
    summing = session(3, 100_000, 2**19 - 1)
    size = shared_terms.blocks_of(summing.plan, 100_000) * summing.plan.parameters.seeded_bytes
    assert 2 * messages.PIECE < size < 5 * messages.PIECE
    vectors = {party: np.random.default_rng(place).integers(-1000, 1000, 100_000) for place, party in enumerate("abc")}
    one = summing.begin()
    for party, vector in zip(names(3), vectors.values(), strict=True):
        one.submit(party, vector)
    assert np.array_equal(one.finish().total, sum(vectors.values()))


def test_tensors_are_taken() -> None:
    one = session(2, 3).begin()
    one.submit("p0", torch.tensor([1, -2, 3]))
    one.submit("p1", torch.tensor([10, 20, -1000]))
    assert one.finish().total.tolist() == [11, 18, -997]


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(3),
        np.zeros(4, np.int64),
        np.zeros((3, 1), np.int64),
        np.array([0, 0, 1001]),
        np.array([0, -1001, 0]),
        np.array([1, 2, 3], np.int32),
        [1, 2, 3],
        torch.tensor([1.0, 2.0, 3.0]),
    ],
    ids=repr,
)
def test_other_vectors_are_refused_and_a_right_one_is_taken_after(vector: Any) -> None:
    one = session(2, 3).begin()
    with pytest.raises(InputError):
        one.submit("p0", vector)
    one.submit("p0", np.array([1, 2, 3]))
    one.submit("p1", np.array([1, 2, 3]))
    assert one.finish().total.tolist() == [2, 4, 6]


def test_rounds_and_submissions_happen_once() -> None:
    summing = session(3, 3)
    one = summing.begin()
    one.submit("p0", np.zeros(3, np.int64))
    with pytest.raises(StateUsedError):
        one.submit("p0", np.zeros(3, np.int64))
    with pytest.raises(SpecError, match="unknown"):
        one.submit("stranger", np.zeros(3, np.int64))
    one.submit("p2", np.ones(3, np.int64))
    assert one.finish().total.tolist() == [1, 1, 1]
    for late in (one.finish, lambda: one.submit("p1", np.zeros(3, np.int64))):
        with pytest.raises(StateUsedError):
            late()
    given_up = summing.begin()
    given_up.submit("p0", np.zeros(3, np.int64))
    after = summing.begin()
    for late in (given_up.finish, lambda: given_up.submit("p1", np.zeros(3, np.int64))):
        with pytest.raises(StateUsedError, match="ended"):
            late()
    for party in names(3):
        after.submit(party, np.ones(3, np.int64))
    assert after.finish().total.tolist() == [3, 3, 3]


def test_too_few_are_not_summed() -> None:
    one = session(5, 3, min_survivors=None).begin()
    for party in ("p0", "p3"):
        one.submit(party, np.zeros(3, np.int64))
    with pytest.raises(TooFewSurvivorsError) as found:
        one.finish()
    assert (found.value.survivors, found.value.needed) == (2, 3)
    assert found.value.missing == ("p1", "p2", "p4")


@pytest.mark.parametrize("wrong", [1, 0, -1, 5, True])
def test_min_survivors_out_of_range_are_refused(wrong: int) -> None:
    with pytest.raises(SpecError, match="min_survivors"):
        session(4, min_survivors=wrong)


def test_sums_without_room_and_names_without_bytes_are_refused() -> None:
    with pytest.raises(SpecError, match="plain modulus"):
        session(2, 3, 2**60)
    with pytest.raises(SpecError, match="255 characters"):
        SharedSession(SumSpec(parties=("a", "b" * 256), length=3, bound=1))


def test_bytes_are_counted() -> None:
    summing = session(3, 50_000, 2**19 - 1)
    plan = summing.plan
    blocks = shared_terms.blocks_of(plan, 50_000)
    results = []
    for _ in range(2):
        one = summing.begin()
        for party in ("p1", "p2"):
            one.submit(party, np.ones(50_000, np.int64))
        results.append(one.finish())
    first, second = results
    sent = blocks * plan.parameters.seeded_bytes
    reported = -(-50_000 * summing.spec.modulus_bits // 8)
    assert 0 <= second.bytes_up["p2"] - sent < 100
    assert 0 <= second.bytes_up["p1"] - sent - reported < 200
    assert 0 <= second.bytes_down["p1"] - blocks * plan.parameters.full_bytes < 300
    assert second.bytes_up["p0"] == 0
    assert 0 < second.bytes_down["p2"] < 140, "a Begin"
    assert 0 < second.bytes_down["p0"] < 700, "and, until it is heard, everybody's confirmations"
    assert first.bytes_up["p0"] > 200  # opening the session


def test_the_statement_says_who_must_be_trusted() -> None:
    summing: SumSession = session(5, 3, min_survivors=3)
    facts = json.loads(json.dumps(summing.statement))
    assert facts["name"] == "homomorphic"
    assert (facts["key"], facts["scheme"], facts["server"], facts["corrupt"]) == ("shared", "bfv", "semi-honest", 0)
    assert (facts["parties"], facts["min_survivors"], facts["security_bits"]) == (5, 3, 128)
    assert "one party that does opens the vectors of all 5" in facts["trust"]
    assert "a surviving party decrypts" in facts["server_learns"]
    plan = session(5, 3).plan
    assert facts["ring_degree"] == plan.parameters.degree
    assert facts["coefficient_modulus_bits"] == plan.parameters.modulus.bit_length()
    assert facts["plaintext_modulus_bits"] == plan.parameters.plain_modulus.bit_length()
    assert facts["noise_margin_bits"] == plan.margin_bits >= 2


def floats(n: int = 4, length: int = 3000, bound: float = 2.0, precision: float = 1e-5) -> Any:
    return FloatSum(min_survivors=2).open(FloatSpec(parties=names(n), length=length, bound=bound, precision=precision))


@pytest.mark.parametrize("present", [("p0", "p1", "p2", "p3"), ("p1", "p3")])
def test_floats_are_within_the_stated_error(present: tuple[str, ...]) -> None:
    summing = floats()
    for _ in range(2):
        one = summing.begin()
        vectors = {party: np.random.default_rng(len(party)).uniform(-2, 2, 3000) for party in present}
        for party, vector in vectors.items():
            one.submit(party, vector)
        result = one.finish()
        assert result.survivors == present
        assert 0 < result.error_bound <= 1e-5
        assert np.abs(result.total - sum(vectors.values())).max() <= result.error_bound
        assert all(result.bytes_down[party] > 20_000 for party in present)


@pytest.mark.parametrize(
    "vector",
    [np.zeros(3), np.zeros(3000, np.float32), np.full(3000, 2.1), np.full(3000, np.nan), np.full(3000, np.inf), [0.0]],
    ids=["short", "float32", "large", "nan", "inf", "list"],
)
def test_other_floats_are_refused_and_a_right_one_is_taken_after(vector: Any) -> None:
    one = floats(2).begin()
    with pytest.raises(InputError):
        one.submit("p0", vector)
    one.submit("p0", np.full(3000, 2.0))
    one.submit("p1", np.full(3000, -2.0))
    assert np.abs(one.finish().total).max() < 1e-5


def test_rounds_of_floats_happen_once_and_need_enough() -> None:
    one = floats().begin()
    one.submit("p0", np.zeros(3000))
    with pytest.raises(StateUsedError):
        one.submit("p0", np.zeros(3000))
    with pytest.raises(SpecError, match="unknown"):
        one.submit("stranger", np.zeros(3000))
    with pytest.raises(TooFewSurvivorsError):
        one.finish()
    with pytest.raises(StateUsedError):
        one.finish()


def test_the_statement_of_floats() -> None:
    facts = json.loads(json.dumps(floats().statement))
    assert facts["scheme"] == "ckks"
    assert facts["error_bound"] <= 1e-5
    assert "must never see a decrypted sum" in facts["trust"]
    assert "no value" in facts["server_learns"]


def test_a_spec_of_floats_is_checked() -> None:
    for wrong in ({"parties": ("a",)}, {"parties": ("a", "a")}, {"length": 0}):
        with pytest.raises(SpecError):
            FloatSpec(**{"parties": ("a", "b"), "length": 3, "bound": 1.0, "precision": 0.1} | wrong)
    for wrong_floats in ({"bound": 0.0}, {"precision": float("nan")}, {"bound": float("inf")}, {"precision": 1e-30}):
        with pytest.raises(SpecError):
            FloatSum().open(
                FloatSpec(**{"parties": ("a", "b"), "length": 3, "bound": 1.0, "precision": 0.1} | wrong_floats)
            )
