"""From residues to values: against Python's integers, and everything that must be refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.protocols.errors import GarbledSumError
from choral.protocols.homomorphic.ring.arithmetic import Kernels
from choral.protocols.homomorphic.ring.kernels_numba import NumbaKernels
from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels
from choral.protocols.homomorphic.split import decoding
from choral.protocols.homomorphic.split.decoding import decode
from choral.protocols.homomorphic.split.parameters import SplitParameters, choose
from choral.protocols.interface import SumSpec

SPECS = [
    SumSpec(parties=("a", "b"), length=9, bound=1),
    SumSpec(parties=("a", "b"), length=9, bound=2**61),
    SumSpec(parties=("a", "b", "c"), length=9, bound=(2**64 - 1) // 6),
    SumSpec(parties=tuple(map(str, range(190))), length=10**6, bound=2**20),
    SumSpec(parties=tuple(map(str, range(1000))), length=25_600_000, bound=2**20),
    SumSpec(parties=tuple(map(str, range(9))), length=25_600_000, bound=1),
]
EACH = pytest.mark.parametrize("chosen", [choose(spec) for spec in SPECS], ids=lambda chosen: chosen.terms()[:60])


def residues(numbers: Any, chosen: SplitParameters) -> Any:
    return np.array([[int(n) % prime for n in numbers] for prime in chosen.ring.primes], np.int32)


def coefficient(error: int, values: Any, chosen: SplitParameters) -> int:
    return error + sum(int(v) << chosen.scale_bits + chosen.slot_bits * j for j, v in enumerate(values))


def corners(chosen: SplitParameters, parties: int) -> tuple[list[int], Any]:
    """Coefficients at every extreme, and their values, shape (slots, M)."""
    error, value = chosen.error_bound(parties), parties * chosen.spec.bound
    generator = np.random.default_rng(7)
    numbers, expected = [], []
    for e in (0, 1, -1, error, -error):
        for pattern in range(6):
            values = [
                (
                    0,
                    value,
                    -value,
                    value * (-1) ** j,
                    int(generator.integers(-min(value, 2**62), min(value, 2**62))),
                    -1,
                )[pattern]
                for j in range(chosen.slots)
            ]
            numbers.append(coefficient(e, values, chosen))
            expected.append(values)
    return numbers, np.array(expected).T


@EACH
@pytest.mark.parametrize("kernels", [NumbaKernels(), TorchKernels()], ids=["numba", "torch"])
def test_every_extreme_comes_back(chosen: SplitParameters, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "kernels", lambda: kernels)
    for parties in (2, len(chosen.spec.parties)):
        numbers, expected = corners(chosen, parties)
        found = decode(residues(numbers, chosen), chosen, parties)
        assert found.dtype == np.int64
        assert np.array_equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sum_comes_back(data: st.DataObject) -> None:
    chosen = choose(data.draw(st.sampled_from(SPECS)))
    parties = data.draw(st.integers(2, len(chosen.spec.parties)))
    value, error = parties * chosen.spec.bound, chosen.error_bound(parties)
    rows = data.draw(
        st.lists(
            st.tuples(
                st.integers(-error, error),
                st.lists(st.integers(-value, value), min_size=chosen.slots, max_size=chosen.slots),
            ),
            min_size=1,
            max_size=5,
        )
    )
    numbers = [coefficient(e, values, chosen) for e, values in rows]
    assert decode(residues(numbers, chosen), chosen, parties).T.tolist() == [values for _, values in rows]


@EACH
@pytest.mark.parametrize("sign", [1, -1])
def test_an_error_just_beyond_its_bound_is_refused(chosen: SplitParameters, sign: int) -> None:
    parties = len(chosen.spec.parties)
    bound = chosen.error_bound(parties)
    zeros = [0] * chosen.slots
    numbers = [coefficient(3, zeros, chosen)] * 20
    numbers[11] = coefficient(sign * bound, zeros, chosen)
    decode(residues(numbers, chosen), chosen, parties)
    numbers[11] = coefficient(sign * (bound + 1), zeros, chosen)
    with pytest.raises(GarbledSumError):
        decode(residues(numbers, chosen), chosen, parties)
    if parties > 2:  # and the bound is that of who is in the sum, not of all
        numbers[11] = coefficient(sign * (chosen.error_bound(2) + 1), zeros, chosen)
        with pytest.raises(GarbledSumError):
            decode(residues(numbers, chosen), chosen, 2)


@EACH
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_just_beyond_its_bound_is_refused(chosen: SplitParameters, sign: int) -> None:
    """Where the slot has room for more than all parties' bounds together."""
    parties = len(chosen.spec.parties)
    for count in (parties, 2):
        value = count * chosen.spec.bound
        for slot in range(chosen.slots):
            values = [0] * chosen.slots
            values[slot] = sign * value
            decode(residues([0, coefficient(0, values, chosen)], chosen), chosen, count)
            values[slot] = sign * (value + 1)
            if value + 1 < 1 << chosen.slot_bits - 1:
                with pytest.raises(GarbledSumError):
                    decode(residues([0, coefficient(0, values, chosen)], chosen), chosen, count)


@EACH
def test_what_lies_beyond_the_highest_slot_is_refused(chosen: SplitParameters) -> None:
    """q has room above the slots; a number there has right slots and errors, and is still garbage."""
    top = chosen.scale_bits + chosen.slots * chosen.slot_bits
    q = chosen.ring.modulus
    for number in {1 << top, (q >> top) // 2 << top, (q - 1 >> top) - 1 << top}:
        if 1 << top <= number < q - (1 << top - 1):
            with pytest.raises(GarbledSumError):
                decode(residues([number], chosen), chosen, len(chosen.spec.parties))


@EACH
def test_uniform_coefficients_are_refused(chosen: SplitParameters) -> None:
    """Each passes with probability about 1/2 at most: 200 of them with 2^-200. And nearly none passes alone."""
    generator = np.random.default_rng(3)
    parties = len(chosen.spec.parties)
    q, passed = chosen.ring.modulus, 0
    numbers = [int.from_bytes(generator.bytes(40), "big") % q for _ in range(400)]
    with pytest.raises(GarbledSumError):
        decode(residues(numbers[:200], chosen), chosen, parties)
    for number in numbers:
        try:
            decode(residues([number], chosen), chosen, parties)
            passed += 1
        except GarbledSumError:
            continue
    assert passed < 200 + 60  # mean at most 200 (margin of 1 bit), 6 standard deviations


@EACH
def test_one_wrong_residue_is_refused(chosen: SplitParameters) -> None:
    """Where there are several primes: the numbers that agree modulo the others lie about q/p apart."""
    numbers = [coefficient(5, [1] * chosen.slots, chosen)] * 64
    right = residues(numbers, chosen)
    decode(right, chosen, 2)
    if chosen.prime_count == 1:
        return
    for row, prime in enumerate(chosen.ring.primes):
        wrong = right.copy()
        wrong[row] = (wrong[row] + np.arange(1, 65)) % prime
        with pytest.raises(GarbledSumError):
            decode(wrong, chosen, 2)


def test_the_error_names_no_value() -> None:
    chosen = choose(SPECS[3])
    with pytest.raises(GarbledSumError) as caught:
        decode(residues([123_456_789_123_456], chosen), chosen, 2)
    assert not any(character.isdigit() for character in str(caught.value))
    assert caught.value.blame == "a party in the sum"
