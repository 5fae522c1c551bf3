"""The ring's arithmetic against schoolbook multiplication and SEAL; all kernels against each other, bit by bit."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from choral.protocols.crypto.modular_integers import pack as packed_values
from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.ring import arithmetic as rings
from choral.protocols.homomorphic.ring import kernels_torch as ring_torch
from choral.protocols.homomorphic.ring.arithmetic import (
    DEGREES,
    GROUP,
    LIMB,
    MAX_PRIME_BITS,
    REDUCE,
    largest_primes,
    ring,
)
from choral.protocols.homomorphic.ring.kernels_numba import NumbaKernels
from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels
from choral.protocols.homomorphic.shared import seal
from choral.protocols.homomorphic.split.parameters import MIN_PRIME_BITS, MODULUS_LIMIT, Digit

KERNELS = pytest.mark.parametrize("kernels", [NumbaKernels(), TorchKernels()], ids=["numba", "torch"])
EVERY_SIZE = [
    (degree, bits)
    for degree in DEGREES
    for bits in range(MIN_PRIME_BITS, MAX_PRIME_BITS + 1)
    if not (degree == 8192 and bits < 21)
]


def random(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def in_use(degree: int, bits: int) -> tuple[int, ...]:
    """All primes of these bits that some parameters use, or as many as there are."""
    for count in range(MODULUS_LIMIT[degree] // bits, 0, -1):
        try:
            return largest_primes(bits, degree, count)
        except SpecError:
            continue
    return ()


def schoolbook(one: Any, other: Any, prime: int) -> Any:
    """Modulo X^N + 1 and the prime, in Python's integers."""
    degree = len(one)
    full = np.convolve(np.array(one, object), np.array(other, object))
    out = full[:degree].copy()
    out[: degree - 1] -= full[degree:]
    return out % prime


def product(kernels: Any, r: Any, one: Any, other: Any) -> Any:
    """one * other as residues, shape (L, N): the removal of a product from nothing, negated."""
    primes = np.array(r.primes, np.int32)[:, None]
    public = kernels.transform(r, np.asarray(one, np.float64)) % primes
    key = kernels.transform(r, np.asarray(other, np.float64))
    return -kernels.remove(r, np.zeros_like(public), public, key, lanes=1) % primes


@KERNELS
@pytest.mark.parametrize(("degree", "bits"), EVERY_SIZE)
def test_products_are_those_of_the_schoolbook_for_every_prime(degree: int, bits: int, kernels: Any) -> None:
    """In rings of degree 8 to 64: a prime that is 1 mod 2N is 1 mod 16 and mod 128 too."""
    primes = in_use(degree, bits)
    assert primes
    generator = random(f"schoolbook {degree} {bits}")
    for prime in primes:
        assert prime % (2 * degree) == 1
        assert prime.bit_length() == bits
    small = int(generator.choice([8, 16, 64]))
    r = ring(small, primes)
    one = generator.integers(-(2**51), 2**51, small)
    other = generator.integers(-100, 101, small)
    found = product(kernels, r, one, other)
    for row, prime in enumerate(primes):
        assert np.array_equal(found[row], schoolbook(one, other, prime))


@KERNELS
def test_the_transform_evaluates_at_all_roots_of_the_polynomial(kernels: Any) -> None:
    r = ring(32, largest_primes(26, 8192, 2))
    values = random("evaluation").integers(-(2**40), 2**40, 32)
    found = kernels.transform(r, values.astype(np.float64))
    for row, prime in enumerate(r.primes):
        points = evaluation_points(32, r, row)
        for place, point in enumerate(points):
            assert pow(point, 32, prime) == prime - 1
            expected = sum(int(v) * pow(point, i, prime) for i, v in enumerate(values)) % prime
            assert int(found[row][place]) % prime == expected
        assert len(set(points)) == 32


def evaluation_points(degree: int, r: Any, row: int) -> list[int]:
    """The roots of X^N + 1 in the transform's order, read off the image of X."""
    x = np.zeros(degree)
    x[1] = 1
    return [int(v) % r.primes[row] for v in NumbaKernels().transform(r, x)[row]]


def seal_products(degree: int, prime: int, polynomials: Any, factor: Any) -> Any:
    """Both polynomials times ``factor`` by SEAL's evaluator, as a "ciphertext" times a plaintext; shape (2, N).

    SEAL reads a plaintext's coefficient above half its modulus as negative, so the factor is centred as ours is.
    """
    plain = 2 * int(np.abs(factor).max()) + 3
    theirs = seal.SealRing(seal.RingParameters("bfv", degree, (prime,), 0, plain))
    width = -(-prime.bit_length() // 8)
    body = b"".join(int(v).to_bytes(width, "little") for v in np.concatenate(polynomials))
    ciphertext = theirs.load_sum(body)
    theirs.evaluator.multiply_plain_inplace(ciphertext, theirs.plaintext((factor % plain).astype(np.uint64)))
    raw = np.frombuffer(theirs.dump_sum(ciphertext), np.uint8).reshape(2, degree, width).astype(np.int64)
    return (raw << 8 * np.arange(width)).sum(axis=2)


@KERNELS
@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("bits", [21, 26])
def test_products_are_those_of_seal(degree: int, bits: int, kernels: Any) -> None:
    """At the real degrees and primes: two full polynomials times a key, and times a sum of a thousand parties' keys."""
    generator = random(f"seal {degree} {bits}")
    for prime in largest_primes(bits, degree, 2):
        r = ring(degree, (prime,))
        polynomials = generator.integers(0, prime, (2, degree))
        polynomials[1] = prime - 1
        for reach in (83, 83_000):
            key = generator.integers(-reach, reach + 1, degree)
            expected = seal_products(degree, prime, list(polynomials), key)
            for polynomial, wanted in zip(polynomials, expected, strict=True):
                assert np.array_equal(product(kernels, r, polynomial, key)[0], wanted)


def extreme(degree: int, lanes: int, primes: tuple[int, ...], digits: int) -> dict[str, Any]:
    """The largest of everything that encryption may be given."""
    size, rows = degree * lanes, np.array(primes)[:, None]
    signs = np.where(np.arange(digits * size) % 3 == 0, -1.0, 1.0).reshape(digits, size)
    return {
        "digits": signs * float(2**52 - 1),
        "scales": np.where(np.arange(digits) % 2, 1.0, -1.0)[None, :] * (rows // 2),
        "errors": np.where(np.arange(size) % 2, 127, -127).astype(np.int8),
        "public": np.broadcast_to(rows - 1, (len(primes), size)).astype(np.int32).copy(),
        "key": np.where(np.arange(degree) % 2, rows // 2, -(rows // 2)).astype(np.int32),
    }


def drawn(degree: int, lanes: int, primes: tuple[int, ...], digits: int, generator: Any) -> dict[str, Any]:
    rows = np.array(primes)[:, None]
    size = degree * lanes
    return {
        "digits": generator.integers(-(2**52) + 1, 2**52, (digits, size)).astype(np.float64),
        "scales": np.array([[generator.integers(-(p // 2), p // 2 + 1) for _ in range(digits)] for p in primes], float),
        "errors": generator.integers(-84, 85, size).astype(np.int8),
        "public": (generator.integers(0, 1 << 31, (len(primes), size)) % rows).astype(np.int32),
        "key": np.array([generator.integers(-(p // 2), p // 2 + 1, degree) for p in primes], np.int32),
    }


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_all_kernels_agree_bit_by_bit(degree: int, lanes: int) -> None:
    generator = random(f"kernels {degree} {lanes}")
    primes = largest_primes(26, degree, 2) + largest_primes(22, degree, 1)
    r = ring(degree, primes)
    numba, torch = NumbaKernels(), TorchKernels()
    for given in (
        extreme(degree, lanes, primes, 7),
        drawn(degree, lanes, primes, 7, generator),
        drawn(degree, lanes, primes, 1, generator),
    ):
        encrypted = numba.encrypt(r, **given, lanes=lanes)
        assert encrypted.dtype == np.int32
        assert (encrypted >= 0).all()
        assert (encrypted < np.array(primes)[:, None]).all()
        assert np.array_equal(encrypted, torch.encrypt(r, **given, lanes=lanes))
        opened = numba.remove(r, encrypted, given["public"], given["key"], lanes=lanes)
        assert np.array_equal(opened, torch.remove(r, encrypted, given["public"], given["key"], lanes=lanes))
        for row, prime in enumerate(primes):  # and both are right: the message and the errors come back
            message = sum(
                np.array(digit.astype(np.int64), object) * int(scale)
                for digit, scale in zip(given["digits"], given["scales"][row], strict=True)
            )
            assert np.array_equal(opened[row], (message + given["errors"]) % prime)


@pytest.mark.parametrize("degree", DEGREES)
def test_lanes_are_blocks_side_by_side(degree: int) -> None:
    """Place i of block l is element i * lanes + l; each block's result is what it would be alone."""
    generator = random(f"lanes {degree}")
    primes = largest_primes(24, degree, 1)
    r = ring(degree, primes)
    given = drawn(degree, 5, primes, 2, generator)
    together = NumbaKernels().encrypt(r, **given, lanes=5)
    for lane in range(5):
        alone = {
            name: np.ascontiguousarray(array[..., lane::5]) if name in ("digits", "errors", "public") else array
            for name, array in given.items()
        }
        assert np.array_equal(NumbaKernels().encrypt(r, **alone, lanes=1), together[:, lane::5])


@pytest.mark.parametrize("degree", DEGREES)
def test_transforms_agree(degree: int) -> None:
    primes = largest_primes(26, degree, 3)
    r = ring(degree, primes)
    generator = random(f"transform {degree}")
    for polynomial in (
        generator.integers(-(2**52) + 1, 2**52, degree),
        np.full(degree, 2**52 - 1),
        -np.full(degree, 2**52 - 1),
        generator.integers(-84, 85, degree),
    ):
        one = NumbaKernels().transform(r, polynomial.astype(np.float64))
        other = TorchKernels().transform(r, polynomial.astype(np.float64))
        rows = np.array(primes)[:, None]
        assert np.array_equal(one % rows, other % rows)
        for found in (one, other):
            assert (np.abs(found) <= rows // 2 + 1).all()  # balanced, but for an inexact quotient at the very half


def worst(r: Any, row: int, stages: int) -> tuple[Any, int, int]:
    """A polynomial that makes one value as large as it can be after so many stages without reduction, just before it is
    multiplied by the stage's largest root; and that value and root.

    The chain is a value that every stage adds a product of (p - 1)/2 to: x[offset] starts it, and x[offset + N/2^s] is
    what makes the product of stage s that large.
    """
    prime, degree = r.primes[row], r.degree
    half = (prime - 1) // 2
    block = int(np.argmax(np.abs(r.roots[row][1 << stages : 2 << stages])))
    offset = degree >> stages + 1
    x = np.zeros(degree)
    x[offset] = half
    for stage in range(1, stages + 1):
        above = block >> stages - stage + 1
        sign = -1 if block >> stages - stage & 1 else 1
        root = int(r.roots[row][(1 << stage - 1) + above])
        x[offset + (degree >> stage)] = rings.balanced(sign * half * pow(root, -1, prime), prime)
    return x, half * (stages + 1), int(r.roots[row][(1 << stages) + block])


def by_blocks(values: Any, r: Any, row: int) -> Any:
    """The transform in Python's integers, stage by stage (Longa and Naehrig 2016, algorithm 1)."""
    prime = r.primes[row]
    x = [int(v) % prime for v in values]
    half, blocks = r.degree, 1
    while half > 1:
        half //= 2
        for block in range(blocks):
            root = int(r.roots[row][blocks + block])
            for place in range(2 * block * half, (2 * block + 1) * half):
                product = x[place + half] * root % prime
                x[place], x[place + half] = (x[place] + product) % prime, (x[place] - product) % prime
        blocks *= 2
    return np.array(x)


@pytest.mark.parametrize("degree", DEGREES)
def test_the_largest_values_stay_exact(degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim on magnitudes: with REDUCE = 7 every product is below 2^53 and exact. The worst case is built and
    transformed exactly by both kernels; without the reduction, the kernel without fused products gets it wrong."""
    assert REDUCE == 7
    r = ring(degree, largest_primes(26, degree, 2))
    stages = degree.bit_length() - 1
    assert stages - REDUCE < REDUCE  # what is left after the one reduction is shorter
    for row, prime in enumerate(r.primes):
        x, value, root = worst(r, row, REDUCE - 1)
        assert value * abs(root) < 1 << 53
        assert value * abs(root) > 0.95 * 7 * (prime // 2) ** 2
        expected = by_blocks(x, r, row)
        assert np.array_equal(NumbaKernels().transform(r, x)[row] % prime, expected)
        assert np.array_equal(TorchKernels().transform(r, x)[row] % prime, expected)
        x, value, root = worst(r, row, 9)
        assert value * abs(root) > 1 << 53
        assert np.array_equal(TorchKernels().transform(r, x)[row] % prime, by_blocks(x, r, row))
    found = []
    monkeypatch.setattr(ring_torch, "REDUCE", 99)
    for stage in (8, 9):
        for row in (0, 1):
            for shift in range(30):
                x, _, _ = worst(r, row, stage)
                x[x != 0] -= shift
                found.append(np.array_equal(TorchKernels().transform(r, x)[row] % r.primes[row], by_blocks(x, r, row)))
                if not found[-1]:
                    return
    pytest.fail("the reduction is not needed: this test's worst case is none")


def test_the_claimed_magnitudes() -> None:
    """(k + 1) p/2 + k before stage k + 1, its product below (k + 1) 2^50 + 2^27 and exact for k <= 6; sums of seven
    scaled digits, and a product of a residue and a key, too."""
    p = max(prime for degree in DEGREES for prime in largest_primes(MAX_PRIME_BITS, degree, 1))
    for k in range(REDUCE):
        assert ((k + 1) * p / 2 + k) * (p / 2) < (k + 1) * 2**50 + 2**27 < 2**53
    assert 7 * (p / 2 + 1) * (p / 2) + 127 < 2**53
    assert (p - 1) * (p / 2) + 7 * p < 2**53


@KERNELS
@pytest.mark.parametrize("bits", [20, 23, 26])
def test_packed_residues_are_bit_strings_side_by_side(bits: int, kernels: Any) -> None:
    """The wire format against its definition, by the packing of the masked sum for each of the WIDTH strings."""
    residues = random(f"pack {bits}").integers(0, 1 << bits, 3 * GROUP).astype(np.int32)
    residues[:100] = (1 << bits) - 1
    residues[100:200] = 0
    body = kernels.pack(residues, bits)
    assert len(body) == residues.size * bits // 8
    words = np.frombuffer(body, "<u4")
    for group in range(3):
        for string in (0, 1, rings.WIDTH - 1):
            values = residues[group * GROUP : (group + 1) * GROUP].reshape(32, rings.WIDTH)[:, string]
            mine = words[group * bits * rings.WIDTH : (group + 1) * bits * rings.WIDTH].reshape(bits, -1)[:, string]
            assert packed_values(values.astype(np.uint32), bits) == mine.astype("<u4").tobytes()
    sums = np.full(residues.size, 7, np.uint32)
    sums[-1] = 0xFFFFFFFF
    expected = sums + residues.astype(np.uint32)
    kernels.add(words.astype(np.uint32), bits, sums)
    assert np.array_equal(sums, expected)


@KERNELS
@pytest.mark.parametrize(("bits", "count"), [(20, 1), (26, 2), (25, 4), (26, 8), (21, 10)])
def test_limbs_are_the_whole_coefficients(bits: int, count: int, kernels: Any) -> None:
    """Against the Chinese remainder theorem in Python's integers, at the ends of the range too."""
    r = ring(64, largest_primes(bits, 8192 if bits > 20 else 4096, count))
    q = r.modulus
    generator = random(f"limbs {bits} {count}")
    numbers = [0, 1, q - 1, q // 2, q - 2, *(int(generator.integers(1 << 62)) ** 5 % q for _ in range(700))]
    for offset in (0, 1, q // 2, q - 1):
        residues = np.array([[n % prime for n in numbers] for prime in r.primes], np.int32)
        limbs = kernels.limbs(r, residues, offset)
        assert limbs.dtype == np.int64
        assert (limbs >= 0).all()
        assert (limbs < 1 << LIMB).all()
        found = sum(limb.astype(object) << LIMB * place for place, limb in enumerate(limbs))
        assert found.tolist() == [(n + offset) % q for n in numbers]


@KERNELS
def test_digits_are_the_values_slot_by_slot(kernels: Any) -> None:
    generator = random("digits")
    values = generator.integers(-(1 << 13), 1 << 13, 250)
    layout = (Digit(first=0, count=2), Digit(first=2, count=1))
    padded = np.zeros(300, np.int64)
    padded[:250] = values
    first, second, third = padded.reshape(3, 100).tolist()
    found = kernels.digits(values, 100, layout, 20)
    assert np.array_equal(found[0], [a + (b << 20) for a, b in zip(first, second, strict=True)])
    assert np.array_equal(found[1], third)
    long = generator.integers(-(1 << 62), 1 << 62, 30)
    halves = (Digit(first=0, half="low"), Digit(first=0, half="high"))
    low, high = map(np.asarray, kernels.digits(long, 40, halves, 64))
    assert [int(a) + (int(b) << 32) for a, b in zip(low, high, strict=True)] == [*long.tolist(), *[0] * 10]
    assert (np.abs(low) < 2**52).all()
    assert kernels.digits(long[:0], 40, halves, 64).tolist() == np.zeros((2, 40)).tolist()


@KERNELS
@pytest.mark.parametrize("prime", [largest_primes(21, 8192, 1)[0], largest_primes(26, 2048, 1)[0]])
def test_rejection_takes_the_first_words_below_the_prime(prime: int, kernels: Any) -> None:
    generator = random(f"accept {prime}")
    words = generator.integers(0, 1 << 32, 2000, dtype=np.uint64).astype(np.uint32)
    words[:4] = [prime, prime - 1, 0xFFFFFFFF, 0]
    mask = (1 << prime.bit_length()) - 1
    expected = [int(word) & mask for word in words if int(word) & mask < prime]
    found = kernels.accept(words, prime, 1000)
    assert found.tolist() == expected[:1000]
    assert found[0] == prime - 1
    assert kernels.accept(words, prime, len(expected)).tolist() == expected
    assert kernels.accept(words, prime, len(expected) + 1) is None


@pytest.mark.parametrize(
    ("degree", "primes"),
    [
        (100, (40961,)),
        (0, (40961,)),
        (-8, (40961,)),
        (4, (40961,)),
        (2048, ()),
        (2048, (40961, 40961)),
        (2048, (40961 - 4096 * 2,)),  # 32769 = 3 * 10923
        (4096, (61441 - 8192 * 2,)),
        (2048, (12289 - 2,)),
        (2048, (1,)),
        (4096, (12289,)),  # a prime, but 1 mod 4096 only
        (2048, (67153921,)),  # a prime, but of 27 bits
        (2048, (largest_primes(26, 2048, 1)[0], 15)),
    ],
)
def test_what_is_no_such_ring_is_refused(degree: int, primes: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"is no prime below|a power of two|distinct"):
        ring(degree, primes)


def test_the_largest_primes_are_those() -> None:
    """By another test of primality, over all candidates."""
    for degree, bits in ((2048, 20), (8192, 23)):
        wanted = [
            n
            for n in range((1 << bits) - 1, 1 << bits - 1, -1)
            if n % (2 * degree) == 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
        ]
        for count in (1, len(wanted)):
            assert list(largest_primes(bits, degree, count)) == wanted[:count]
        with pytest.raises(SpecError, match="fewer than"):
            largest_primes(bits, degree, len(wanted) + 1)
