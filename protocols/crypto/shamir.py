"""Shamir's secret sharing of raw 32-byte secrets over the prime field just above 2^256.

A secret is the constant term of a polynomial of degree ``threshold - 1`` with uniform coefficients; the share of index
``i >= 1`` is its value at ``i``: 33 bytes, little-endian. Any ``threshold`` shares give the secret by Lagrange
interpolation at 0; fewer are independent of it (Shamir, *How to share a secret*, 1979).

Shares are *not* authenticated: with exactly ``threshold`` of them a corrupt one gives another secret, so the caller
must be able to recognise the right one (the protocol recomputes the public key). With more, :class:`Combiner` finds
every corruption of up to ``shares - threshold`` of them and names up to half as many, being a Reed-Solomon code. A
coalition of more than that half can make the honest look corrupt: take a name as proof only below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import mul

from choral.errors import ChoralError
from choral.protocols.errors import SpecError

PRIME = 2**256 + 297
"""The smallest prime above 2^256: every 32-byte string is a field element."""
SECRET_BYTES = 32
SHARE_BYTES = 33
_RANDOM_BYTES = 64
"""Per coefficient: 512 bits reduced modulo PRIME are within 2^-254 of uniform."""


class ShareError(ChoralError):
    """Shares that no split of a 32-byte secret can have given: out of the field, or inconsistent with one another.

    indices: those that are corrupt, ascending; empty when it cannot be told which they are. Where shares contradict one
        another it is certain only if at most half of ``shares - threshold`` are corrupt.
    """

    def __init__(self, message: str, *, indices: tuple[int, ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.indices = indices


def split(
    secrets: Sequence[bytes], *, threshold: int, indices: Sequence[int], randomness: Callable[[int], bytes]
) -> list[list[bytes]]:
    """The shares of each secret, as ``[secret][position in indices]``, 33 bytes each.

    secrets: 32 bytes each. indices: distinct, from 1 to 2^32 - 1. 2 <= threshold <= len(indices).
    randomness: ``randomness(n)`` gives n secret uniform bytes, from the operating system or a cryptographic stream.
        Called once, for 64 (threshold - 1) len(secrets) bytes.

    Guarantee: any threshold - 1 shares are within statistical distance 2^-240 of independent of the secret. The top
    coefficient may be zero, as it must for that.
    Raises: SpecError for anything outside these ranges.
    """
    _check(indices, threshold)
    for secret in secrets:
        if len(secret) != SECRET_BYTES:
            raise SpecError(f"expected secrets of {SECRET_BYTES} bytes, got {len(secret)}")
    needed = _RANDOM_BYTES * (threshold - 1) * len(secrets)
    noise = randomness(needed)
    if len(noise) != needed:
        raise SpecError(f"expected {needed} random bytes, got {len(noise)}")
    coefficients = [
        int.from_bytes(noise[start : start + _RANDOM_BYTES], "little") % PRIME
        for start in range(0, needed, _RANDOM_BYTES)
    ]
    shares = []
    for position, secret in enumerate(secrets):
        polynomial = coefficients[position * (threshold - 1) : (position + 1) * (threshold - 1)]
        polynomial.append(int.from_bytes(secret, "little"))  # highest power first, the secret last
        # Shamir 1979, section 2: D_i = q(i) for q(x) = D + a_1 x + ... + a_{t-1} x^{t-1} mod p
        shares.append([evaluate(polynomial, index).to_bytes(SHARE_BYTES, "little") for index in indices])
    return shares


def evaluate(polynomial: Sequence[int], point: int, *, field: int = PRIME) -> int:
    """The polynomial's value at ``point`` modulo ``field``; coefficients with the highest power first."""
    value = 0
    limit = field << 512
    for coefficient in polynomial:  # Horner: q(x) = (...(a_{t-1} x + a_{t-2}) x + ...) x + D
        value = value * point + coefficient
        if value > limit:  # points are small: reducing now and then is cheaper than at each step
            value %= field
    return value % field


class Combiner:
    """Recovers secrets from the shares of one set of ``indices``; Lagrange's coefficients are computed once.

    indices: of the shares that :meth:`combine` will get, in that order: distinct, 1 to 2^32 - 1, at least
        ``threshold`` of them. Shares beyond the first ``threshold`` are used to check, at a cost of
        O(len(indices)) multiplications for each.
    field: the prime modulus; only known-answer tests need another than PRIME.

    Raises: SpecError for anything outside these ranges.
    """

    def __init__(self, indices: Sequence[int], threshold: int, *, field: int = PRIME) -> None:
        _check(indices, threshold)
        self.indices = tuple(indices)
        self.threshold = threshold
        self._field = field
        self._weights = lagrange_at_zero(self.indices[:threshold], field=field)
        self._parity = _parity_weights(self.indices, field) if len(self.indices) > threshold else []

    def combine(self, shares: Sequence[bytes]) -> bytes:
        """The 32-byte secret of ``shares``, one per index, 33 bytes each.

        Raises: SpecError for another number of shares; ShareError when one is malformed (naming it), when they are
            inconsistent (naming the corrupt ones where they can be identified), or when the result is no secret.
        """
        if len(shares) != len(self.indices):
            raise SpecError(f"expected {len(self.indices)} shares, got {len(shares)}")
        values = [int.from_bytes(share, "little") for share in shares]
        if max(values) >= self._field or set(map(len, shares)) != {SHARE_BYTES}:
            malformed = tuple(
                sorted(
                    index
                    for index, share, value in zip(self.indices, shares, values, strict=True)
                    if len(share) != SHARE_BYTES or value >= self._field
                )
            )
            raise ShareError(f"the shares of indices {malformed} are not field elements", indices=malformed)
        secret = self.interpolate(values)
        if secret >> 8 * SECRET_BYTES:
            raise ShareError("the shares combine to a value that is no 32-byte secret: at least one is corrupt")
        return secret.to_bytes(SECRET_BYTES, "little")

    def interpolate(self, values: Sequence[int]) -> int:
        """The field element at 0 of the polynomial through ``values``. Raises ShareError as :meth:`combine` does."""
        if self._parity:
            self._check_parity(values)
        return int(sum(map(mul, self._weights, values))) % self._field  # f(0) = sum_i w_i f(i)

    def _check_parity(self, values: Sequence[int]) -> None:
        """Syndromes S_k = sum_i v_i i^k y_i for k < m - t vanish exactly on the values of polynomials of degree < t.

        For v_i = 1 / prod_{j != i} (i - j), sum_i v_i g(i) is the coefficient of x^{m-1} of the g of degree < m: that
        is 0 for g(x) = x^k f(x) of degree <= (m - t - 1) + (t - 1) = m - 2. The shares as a Reed-Solomon code: McEliece
        and Sarwate 1981.
        """
        field = self._field
        terms = [weight * value % field for weight, value in zip(self._parity, values, strict=True)]
        syndromes = []
        for _ in range(len(values) - self.threshold):
            syndromes.append(sum(terms) % field)
            terms = [term * index for term, index in zip(terms, self.indices, strict=True)]
        if not any(syndromes):
            return
        corrupt = _locate(syndromes, self.indices, field)
        named = f": those of indices {corrupt} are corrupt" if corrupt else ", and too many are corrupt to say which"
        raise ShareError(f"the shares do not lie on one polynomial{named}", indices=corrupt)


def lagrange_at_zero(indices: Sequence[int], *, field: int = PRIME) -> list[int]:
    """Weights w with f(0) = sum_i w_i f(i) for every polynomial of degree < len(indices)."""
    product = 1
    for index in indices:
        product = product * index % field
    # w_i = prod_{j != i} (-j) / (i - j) = (-1)^{t-1} prod_j j / (i prod_{j != i} (i - j))
    denominators = [
        index * difference % field for index, difference in zip(indices, _differences(indices, field), strict=True)
    ]
    sign = -1 if len(indices) % 2 == 0 else 1  # (-1)^{t-1}
    return [sign * product * inverse % field for inverse in _inverses(denominators, field)]


def _parity_weights(indices: Sequence[int], field: int) -> list[int]:
    """The column multipliers 1 / prod_{j != i} (i - j) of the dual Reed-Solomon code."""
    return _inverses(_differences(indices, field), field)


def _differences(indices: Sequence[int], field: int) -> list[int]:
    """prod_{j != i} (i - j) modulo field, for each i."""
    products = []
    limit = field << 512
    for index in indices:
        value = 1
        for other in indices:
            if other != index:
                value *= index - other
                if abs(value) > limit:
                    value %= field
        products.append(value % field)
    return products


def _inverses(values: Sequence[int], field: int) -> list[int]:
    """All inverses for one inversion (Montgomery's trick)."""
    prefixes = [1]
    for value in values:  # P_k = v_0 ... v_{k-1}, and from the end v_k^-1 = P_k (v_0 ... v_k)^-1
        prefixes.append(prefixes[-1] * value % field)
    inverse = pow(prefixes[-1], -1, field)
    result = [0] * len(values)
    for position in range(len(values) - 1, -1, -1):
        result[position] = inverse * prefixes[position] % field
        inverse = inverse * values[position] % field
    return result


def _locate(syndromes: Sequence[int], indices: Sequence[int], field: int) -> tuple[int, ...]:
    """The corrupt indices by Berlekamp and Massey, or () when there are more than half as many as syndromes.

    Massey 1969, the "LFSR synthesis algorithm" in its steps 2 to 6: there C is ``locator``, B ``previous``, L
    ``length``, x ``shift``, b ``last``, d ``discrepancy``, N ``position``.
    """
    locator, previous, length, shift, last = [1], [1], 0, 1, 1
    for position, syndrome in enumerate(syndromes):
        discrepancy = syndrome  # step 2: d = s_N + sum_{i=1}^{L} c_i s_{N-i}
        for degree in range(1, min(length, len(locator) - 1) + 1):
            discrepancy += locator[degree] * syndromes[position - degree]
        discrepancy %= field
        if not discrepancy:  # step 3
            shift += 1
            continue
        # steps 4 and 5: C(D) <- C(D) - d b^-1 D^x B(D)
        factor = discrepancy * pow(last, -1, field) % field
        updated = locator + [0] * (len(previous) + shift - len(locator))
        for degree, coefficient in enumerate(previous):
            updated[degree + shift] = (updated[degree + shift] - factor * coefficient) % field
        if 2 * length <= position:  # step 5: L <- N + 1 - L, B <- the former C, b <- d, x <- 1
            length, previous, last, shift = position + 1 - length, locator, discrepancy, 1
        else:
            shift += 1
        locator = updated
    # The locator is prod (1 - i x) over corrupt i: its reversal, highest power first, vanishes at each of them.
    padded = (locator + [0] * (length + 1))[: length + 1]
    found = tuple(sorted(index for index in indices if evaluate(padded, index, field=field) == 0))
    return found if 2 * length <= len(syndromes) and len(found) == length else ()


def _check(indices: Sequence[int], threshold: int) -> None:
    if threshold < 2:
        raise SpecError(f"expected threshold >= 2, got {threshold}: with 1 every share is the secret")
    if len(indices) < threshold:
        raise SpecError(f"expected at least {threshold} indices, got {len(indices)}")
    if len(set(indices)) != len(indices):
        raise SpecError("share indices must be distinct")
    if not all(1 <= index < 2**32 for index in indices):
        raise SpecError("share indices must be from 1 to 2^32 - 1: the share of index 0 is the secret")
