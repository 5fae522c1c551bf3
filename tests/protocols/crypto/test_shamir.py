"""Secret sharing: exact against exact arithmetic, other libraries and drafts; corrupt shares found and named."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from Crypto.Protocol.SecretSharing import Shamir as PeerShamir
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.protocols.crypto import shamir
from choral.protocols.crypto.shamir import PRIME, Combiner, ShareError, split
from choral.protocols.errors import SpecError

SECRET = bytes(range(32))


def stream(seed: int = 0) -> Callable[[int], bytes]:
    """Repeatable random bytes, for tests alone."""
    return random.Random(seed).randbytes


def is_probable_prime(n: int) -> bool:
    """Miller and Rabin with 40 bases: a composite passes with probability below 4^-40."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in [random.Random(0).randrange(2, n - 1) for _ in range(40)]:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_prime_is_the_smallest_above_two_to_the_256() -> None:
    assert is_probable_prime(PRIME)
    assert not any(is_probable_prime(n) for n in range(2**256 + 1, PRIME, 2))
    assert PRIME > 2**256  # so every 32-byte string is an element


def test_shares_are_the_polynomials_values() -> None:
    """With the coefficients known, by exact integer arithmetic."""
    noise = stream(1)(64 * 3)
    slopes = [int.from_bytes(noise[start : start + 64], "little") % PRIME for start in (0, 64, 128)]
    (shares,) = split([SECRET], threshold=4, indices=(1, 2, 7, 1000, 2**32 - 1), randomness=lambda n: noise[:n])
    for index, share in zip((1, 2, 7, 1000, 2**32 - 1), shares, strict=True):
        value = int.from_bytes(SECRET, "little")
        value += sum(slope * index ** (3 - place) for place, slope in enumerate(slopes))
        assert share == (value % PRIME).to_bytes(33, "little")


@settings(max_examples=50)
@given(
    secrets=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=3),
    threshold=st.integers(2, 9),
    extra=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
def test_any_threshold_shares_will_do(secrets: list[bytes], threshold: int, extra: int, seed: int) -> None:
    chance = random.Random(seed)
    indices = chance.sample(range(1, 200), threshold + extra)
    shares = split(secrets, threshold=threshold, indices=indices, randomness=chance.randbytes)
    chosen = chance.sample(range(len(indices)), chance.randint(threshold, len(indices)))
    combiner = Combiner([indices[place] for place in chosen], threshold)
    for secret, row in zip(secrets, shares, strict=True):
        assert combiner.combine([row[place] for place in chosen]) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(31) + b"\x80"])
def test_extreme_secrets(secret: bytes) -> None:
    (shares,) = split([secret], threshold=2, indices=(1, 2), randomness=stream())
    assert Combiner((1, 2), 2).combine(shares) == secret


def test_frost_vectors(vectors: Path) -> None:
    """IRTF FROST draft: 2 of 3 in four prime-order groups."""
    cases = json.loads((vectors / "shamir" / "prime_field_frost.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        order = int(case["order"], 16)
        shares = {
            int(index): int.from_bytes(bytes.fromhex(s), case["byteorder"]) for index, s in case["shares"].items()
        }
        secret = int.from_bytes(bytes.fromhex(case["secret"]), case["byteorder"])
        for pair in itertools.permutations(shares, 2):
            assert Combiner(pair, 2, field=order).interpolate([shares[index] for index in pair]) == secret
        assert Combiner(tuple(shares), 2, field=order).interpolate(list(shares.values())) == secret


def test_the_peers_own_vectors_and_ours_agree_on_what_sharing_means(vectors: Path) -> None:
    """GF(2^128) is another field, so no share can be compared; the peer reads its vectors, and both recover a secret
    from the same subsets of indices."""
    cases = json.loads((vectors / "shamir" / "ssss_gf2_128.json").read_text())["cases"]
    assert len(cases) == 8
    for case in cases:
        pairs = [(int(index), bytes.fromhex(share)) for index, share in case["shares"]]
        threshold = case["threshold"]
        assert PeerShamir.combine(pairs[:threshold], ssss=True).hex() == case["secret"]
        secret = bytes.fromhex(case["secret"]) * 2
        indices = [index for index, _ in pairs]
        (shares,) = split([secret], threshold=threshold, indices=indices, randomness=stream(threshold))
        for chosen in itertools.combinations(range(len(indices)), threshold):
            combiner = Combiner([indices[place] for place in chosen], threshold)
            assert combiner.combine([shares[place] for place in chosen]) == secret


def test_lagrange_weights_by_exact_fractions() -> None:
    indices = (3, 1, 4, 15, 9, 26, 535)
    for index, weight in zip(indices, shamir.lagrange_at_zero(indices), strict=True):
        exact = Fraction(1)
        for other in indices:
            if other != index:
                exact *= Fraction(-other, index - other)
        assert weight == exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME


def test_fewer_shares_than_the_threshold_say_nothing() -> None:
    """Exhaustively in a field of 13: given t - 1 = 2 shares, each secret is met by exactly one polynomial."""
    field = 13
    for first, second in itertools.combinations(range(1, 5), 2):
        seen: dict[tuple[int, int], list[int]] = {}
        for top, middle, secret in itertools.product(range(field), repeat=3):
            polynomial = [top, middle, secret]
            pair = tuple(shamir.evaluate(polynomial, index, field=field) for index in (first, second))
            seen.setdefault((pair[0], pair[1]), []).append(secret)
        assert len(seen) == field**2
        assert all(sorted(secrets) == list(range(field)) for secrets in seen.values())


def test_coefficients_use_all_their_random_bytes() -> None:
    """Taking 32 bytes for a 257-bit prime would leave the share's top bit biased; here each of 64 bytes matters."""
    base = bytes(64)
    seen = set()
    for place in range(64):
        noise = base[:place] + b"\x01" + base[place + 1 :]
        (shares,) = split([SECRET], threshold=2, indices=(1, 2), randomness=lambda n, noise=noise: noise)
        seen.add(shares[0])
    assert len(seen) == 64


def test_the_top_coefficient_may_be_zero() -> None:
    """Refusing zero would tell t - 1 holders one value that the secret is not."""
    (shares,) = split([SECRET], threshold=2, indices=(1, 2), randomness=bytes)
    assert shares[0] == shares[1] == SECRET + b"\0"


def test_random_bytes_are_asked_for_once_and_counted() -> None:
    asked: list[int] = []

    def randomness(n: int) -> bytes:
        asked.append(n)
        return hashlib.shake_256(b"r").digest(n)

    shares = split([SECRET, SECRET], threshold=5, indices=range(1, 8), randomness=randomness)
    assert asked == [64 * 4 * 2]
    assert not set(shares[0]) & set(shares[1])  # one secret shared twice: other coefficients
    with pytest.raises(SpecError):
        split([SECRET], threshold=5, indices=range(1, 8), randomness=lambda n: bytes(n - 1))


@pytest.mark.parametrize(
    ("threshold", "indices"),
    [(1, (1, 2)), (0, (1, 2)), (3, (1, 2)), (2, (0, 1, 2)), (2, (1, 1, 2)), (2, (-1, 1)), (2, (1, 2**32)), (2, ())],
)
def test_thresholds_and_indices_that_are_refused(threshold: int, indices: tuple[int, ...]) -> None:
    with pytest.raises(SpecError):
        split([SECRET], threshold=threshold, indices=indices, randomness=stream())
    with pytest.raises(SpecError):
        Combiner(indices, threshold)


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), bytes(16)])
def test_other_secret_lengths_are_refused(secret: bytes) -> None:
    with pytest.raises(SpecError):
        split([SECRET, secret], threshold=2, indices=(1, 2), randomness=stream())


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "little"), b"\xff" * 33])
def test_malformed_shares_are_named(share: bytes) -> None:
    (shares,) = split([SECRET], threshold=2, indices=(5, 9), randomness=stream())
    with pytest.raises(ShareError) as caught:
        Combiner((9, 5), 2).combine([shares[1], share])
    assert caught.value.indices == (5,)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_shares_is_refused(count: int) -> None:
    with pytest.raises(SpecError):
        Combiner((1, 2), 2).combine([bytes(33)] * count)


def test_a_result_that_is_no_secret_is_refused() -> None:
    """f(0) = 2^256 + 5: a field element, not 32 bytes."""
    polynomial = [7, 2**256 + 5]
    shares = [shamir.evaluate(polynomial, index).to_bytes(33, "little") for index in (1, 2)]
    with pytest.raises(ShareError, match="no 32-byte secret"):
        Combiner((1, 2), 2).combine(shares)


@pytest.mark.parametrize("errors", range(9))
def test_corrupt_shares_are_found_and_named(errors: int) -> None:
    """16 shares, threshold 8: eight syndromes name up to four corrupt shares and notice up to eight."""
    indices = random.Random(9).sample(range(1, 1000), 16)
    (shares,) = split([SECRET], threshold=8, indices=indices, randomness=stream(3))
    for trial in range(20):
        chance = random.Random(1000 * errors + trial)
        places = chance.sample(range(16), errors)
        wrong = list(shares)
        for place in places:
            wrong[place] = ((int.from_bytes(wrong[place], "little") + chance.randrange(1, 2**200)) % PRIME).to_bytes(
                33, "little"
            )
        combiner = Combiner(indices, 8)
        if not errors:
            assert combiner.combine(wrong) == SECRET
            continue
        with pytest.raises(ShareError) as caught:
            combiner.combine(wrong)
        expected = tuple(sorted(indices[place] for place in places)) if errors <= 4 else ()
        assert caught.value.indices == expected


def test_only_a_consistent_accusation_is_made() -> None:
    """In a field of 101 chance roots are common: whoever is named, at most two of six, the rest agree."""
    chance = random.Random(5)
    draws = [[chance.randrange(101) for _ in range(6)] for _ in range(3000)]
    named = [(values, accused) for values in draws if (accused := accusation(values))]
    assert named
    for values, accused in named:
        assert len(accused) <= 2
        rest = [index for index in range(1, 7) if index not in accused]
        Combiner(rest, 2, field=101).interpolate([values[index - 1] for index in rest])


def accusation(values: list[int]) -> tuple[int, ...]:
    try:
        Combiner(range(1, 7), 2, field=101).interpolate(values)
    except ShareError as error:
        return error.indices
    return ()


def test_a_swapped_pair_of_shares_is_named() -> None:
    (shares,) = split([SECRET], threshold=3, indices=range(1, 9), randomness=stream(4))
    shares[1], shares[5] = shares[5], shares[1]
    with pytest.raises(ShareError) as caught:
        Combiner(range(1, 9), 3).combine(shares)
    assert caught.value.indices == (2, 6)


def test_one_spare_share_detects_but_does_not_name() -> None:
    (shares,) = split([SECRET], threshold=3, indices=range(1, 5), randomness=stream(4))
    shares[0] = bytes(33)
    with pytest.raises(ShareError) as caught:
        Combiner(range(1, 5), 3).combine(shares)
    assert caught.value.indices == ()


def test_no_secret_in_errors() -> None:
    (shares,) = split([SECRET], threshold=2, indices=(1, 2, 3), randomness=stream())
    shares[0] = bytes(33)
    with pytest.raises(ShareError) as caught:
        Combiner((1, 2, 3), 2).combine(shares)
    text = str(caught.value) + caught.value.hint
    assert not any(share.hex() in text or str(int.from_bytes(share, "little")) in text for share in shares[1:])
