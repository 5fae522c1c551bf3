"""Exact sums in BFV: packing against Python integers, noise against its worst case, parameters against SEAL's table."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as sealapi
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.shared import bfv
from choral.protocols.homomorphic.shared.bfv import MARGIN_BITS, RINGS, BfvPlan, choose
from choral.protocols.homomorphic.shared.seal import ERROR_BOUND, RingKey, SealRing, primes_of, ternary

SEED = bytes(range(32))
STANDARD = {1024: 27, 2048: 54, 4096: 109}
"""Homomorphic encryption standard (Albrecht et al. 2018), table 1: ternary secrets, 128 bits, classical."""

GUIDELINES = {1024: 26, 2048: 53, 4096: 106}
"""Bossuat et al. 2024 (eprint 2024/463), the same setting: of a modulus that is encrypted under."""

SIZES = [
    (2, 1, 5),
    (2, 2**19 - 1, 650),
    (10, 127, 25_000_000),
    (10, 2**15 - 1, 25_000_000),
    (10, 2**19 - 1, 25_000_000),
    (1000, 2**15 - 1, 25_000_000),
    (1000, 2**19 - 1, 650),
    (1000, 2**19 - 1, 25_000_000),
    (3, 2**55, 100),
    (2**20, 2**20, 10**6),
]


class Machine:
    """A ring, a key, and what server and parties do with them."""

    def __init__(self, plan: BfvPlan) -> None:
        self.plan = plan
        self.ring = SealRing(plan.parameters)
        self.key = RingKey.from_seed(self.ring, SEED)
        self.encryptor = self.key.encryptor()
        self.decryptor = self.key.decryptor()

    def encrypt(self, values: Any) -> Any:
        plain = self.plan.encode(self.ring, np.asarray(values, np.int64))
        return self.ring.load_fresh(self.ring.dump_fresh(self.encryptor.encrypt_symmetric(plain)))

    def decrypt(self, ciphertext: Any, count: int) -> list[int]:
        plain = sealapi.Plaintext()
        self.decryptor.decrypt(ciphertext, plain)
        return self.plan.decode(self.ring, plain, count).tolist()

    def budget(self, ciphertext: Any) -> int:
        return int(self.decryptor.invariant_noise_budget(ciphertext))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_plans_are_secure_and_have_room(size: tuple[int, int, int]) -> None:
    plan = choose(*size)
    chosen = plan.parameters
    bits = sum(prime.bit_length() for prime in chosen.primes) + chosen.special.bit_length()
    assert bits <= STANDARD[chosen.degree]
    assert chosen.modulus.bit_length() <= GUIDELINES[chosen.degree]
    assert plan.margin_bits >= MARGIN_BITS
    assert chosen.plain_modulus == plan.radix**plan.values_per_slot < 2**60
    assert plan.radix == 2 * plan.parties * plan.bound + 1
    assert 2 * ERROR_BOUND * chosen.plain_modulus * plan.parties * 2**plan.margin_bits < chosen.modulus
    assert plan.bytes_per_value > log2(plan.radix) / 8


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_other_ring_takes_fewer_bytes(size: tuple[int, int, int]) -> None:
    """Brute force over rings and values per slot, each condition written out again."""
    parties, bound, length = size
    best = None
    for degree, bits in RINGS:
        data = primes_of(degree, bits)[: max(1, len(bits) - 1)]
        q = int(np.prod([int(prime) for prime in data], dtype=object))
        size_of_one = 64 + degree * sum(-(-prime.bit_length() // 8) for prime in data)
        for count in range(1, 61):
            t = (2 * parties * bound + 1) ** count
            if t < 2**60 and t * 43 * parties * 2**MARGIN_BITS <= q:
                total = -(-length // (count * degree)) * size_of_one
                best = total if best is None else min(best, total)
    plan = choose(*size)
    assert -(-length // plan.block) * plan.parameters.seeded_bytes == best


def test_the_target_of_20_bit_values_of_a_thousand_parties() -> None:
    plan = choose(1000, 2**19 - 1, 25_000_000)
    assert plan.bytes_per_value <= 5.01
    assert choose(1000, 2**19 - 1, 650).bytes_per_value <= 6.04


@pytest.mark.parametrize(("parties", "bound"), [(2, 2**58), (2**20, 2**40), (1000, 2**50)])
def test_sums_that_fit_no_plain_modulus_are_refused(parties: int, bound: int) -> None:
    with pytest.raises(SpecError, match="plain modulus"):
        choose(parties, bound, 10)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sums_equal_those_of_python_integers(data: st.DataObject) -> None:
    parties = data.draw(st.integers(2, 6))
    bound = data.draw(st.one_of(st.integers(1, 40), st.integers(1, 2**55)))
    plan = choose(parties, bound, data.draw(st.sampled_from([10, 10**6])))
    length = data.draw(st.integers(1, plan.block))
    machine = _machine(plan)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    summing = data.draw(st.integers(1, parties))
    vectors = [rng.integers(-bound, bound + 1, length) for _ in range(summing)]
    for vector in vectors:  # where carries and borrows are largest
        vector[rng.random(length) < 0.3] = data.draw(st.sampled_from([-bound, bound]))
    total = machine.encrypt(vectors[0])
    for vector in vectors[1:]:
        machine.ring.evaluator.add_inplace(total, machine.encrypt(vector))
    expected = [sum(int(vector[place]) for vector in vectors) for place in range(length)]
    assert machine.decrypt(total, length) == expected
    assert machine.budget(total) >= plan.margin_bits


_machines: dict[BfvPlan, Machine] = {}


def _machine(plan: BfvPlan) -> Machine:
    return _machines.setdefault(plan, Machine(plan))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [(2, 2**19 - 1, 10), (60, 2**7, 10), (1000, 2**19 - 1, 10)], ids=str)
def test_the_margin_holds_for_the_worst_errors_of_all_parties(size: tuple[int, int, int], sign: int) -> None:
    """As many ciphertexts as there are parties, each with error +-21 in every coefficient and values at the bound."""
    machine = _machine(choose(*size))
    plan = machine.plan
    values = np.full(plan.block, sign * plan.bound)
    worst = _with_errors(machine, values, sign * ERROR_BOUND)
    total = _times(machine, worst, plan.parties)
    assert machine.decrypt(total, plan.block) == [sign * plan.bound * plan.parties] * plan.block
    assert plan.margin_bits <= machine.budget(total) <= plan.margin_bits + 2
    # where decryption begins to fail is where it is said to, so that the margin counts from the right place
    edge = plan.parameters.modulus // (2 * plan.parameters.plain_modulus)
    assert machine.decrypt(_with_errors(machine, values, sign * (edge * 99 // 100)), plan.block) == values.tolist()
    assert machine.decrypt(_with_errors(machine, values, sign * (edge * 101 // 100)), plan.block) != values.tolist()


def _with_errors(machine: Machine, values: Any, error: int) -> Any:
    """A ciphertext of ``values`` with just this error in each coefficient: one prime only, by convolution."""
    plan, ring = machine.plan, machine.ring
    (prime,), degree = plan.parameters.primes, plan.parameters.degree
    plain = ring.coefficients(plan.encode(ring, values)).astype(object)
    scaled = (plain * prime + plan.parameters.plain_modulus // 2) // plan.parameters.plain_modulus
    a = np.random.default_rng(5).integers(0, prime, degree)
    product = np.zeros(degree, object)
    for shift in (0, 24, 48):
        full = np.convolve(a >> shift & 0xFFFFFF, ternary(SEED, degree))
        product += full[:degree].astype(object) << shift
        product[: degree - 1] -= full[degree:].astype(object) << shift
    c0 = (scaled + error - product) % prime
    width = (prime.bit_length() + 7) // 8
    body = b"".join(int(value).to_bytes(width, "little") for value in [*c0.tolist(), *a.tolist()])
    return ring.load_sum(body)


def _times(machine: Machine, ciphertext: Any, count: int) -> Any:
    total = machine.ring.load_sum(machine.ring.dump_sum(ciphertext))
    for _ in range(count - 1):
        machine.ring.evaluator.add_inplace(total, ciphertext)
    return total


def test_a_thousand_real_ciphertexts_in_the_ring_of_two_primes() -> None:
    machine = _machine(choose(1000, 2**19 - 1, 25_000_000))
    plan = machine.plan
    assert len(plan.parameters.primes) == 2
    values = np.random.default_rng(4).choice([-plan.bound, plan.bound], plan.block)
    pool = [machine.encrypt(values) for _ in range(4)]
    total = machine.encrypt(values)
    for place in range(999):
        machine.ring.evaluator.add_inplace(total, pool[place % 4])
    assert machine.budget(total) >= plan.margin_bits
    assert machine.decrypt(total, plan.block) == (1000 * values).tolist()


def test_plans_are_the_same_for_everybody() -> None:
    first = choose(7, 1000, 5000)
    bfv.choose.cache_clear()
    assert choose(7, 1000, 5000) == first
