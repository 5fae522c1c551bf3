"""Noise in shares, rounded by each party: how far the opened sum is from one rounded Gaussian.

h honest parties know X_1, ..., X_h (vectors of d coordinates, in steps of a grid), add Z_i, independent N(0, r^2 I),
and send rho(X_i + Z_i), where rho rounds to integers and is **equivariant**: rho(a + 1) = rho(a) + 1. Only the sum is
seen.

**Theorem.** Let theta(h, r) be the sum over k in Z^(h-1), k not 0, of

    exp(-2 pi^2 r^2 (|k|^2 - (k_1 + ... + k_(h-1))^2 / h)),   theta(1, r) = 0.                                     (1)

In each of T steps let X_i be a function of the party's records, of its secret draws, and of the sums opened *before*,
and Z_i fresh. Then the law P of all opened sums is within (1 - theta)^(d T) Q <= P <= (1 + theta)^(d T) Q of a law Q,
which is one post-processing, the same for all data, of the sums X_1 + ... + X_h + N(0, h r^2 I). So if these are
(epsilon, delta)-DP, what is opened is

    (epsilon + 2 a, e^a delta)-DP,   a = -d T log(1 - theta).                                                      (2)

*Proof.* One step, one coordinate: rho(w) - w has period 1, so rho(W_1) + ... + rho(W_h), W_i = X_i + Z_i, is a function
of Y = W_1 + ... + W_h and of the fractional parts of W_1, ..., W_(h-1): that of W_h follows. Given Y, these h - 1
numbers are Gaussian with covariance r^2 (I - 1 1^T / h), whatever the X_i, which move the mean alone. Modulo 1 their
density is, by Poisson's summation formula, 1 plus terms whose sizes add up to theta. So, given Y, the rounded sum has a
kernel within 1 +- theta of the one for uniform fractional parts, K(Y, .), which knows nothing of X. Steps and
coordinates: fix draws and an outcome; then all X are constants, and its probability is a product of d T such factors.
The bound is uniform, so it holds for mixtures over the secret draws, and for whatever is a function of the sums. If P,
P' belong to neighbours, P(E) <= (1 + theta)^(dT) Q(E) <= (1 + theta)^(dT) (e^epsilon Q'(E) + delta),
Q'(E) <= (1 - theta)^(-dT) P'(E), and 1 + theta <= 1 / (1 - theta). []

**What it does not need**: that the X_i are bounded, or that parties know each other's. What colluders add is a
constant. **What it needs**: that nothing else depends on an honest party's Z_i or on its fractional part. Steps of
training between two sums at one party, rounding errors that are carried on, a clipping norm from one's own noisy
gradient: all void it (docs/noise-in-shares.md has a counterexample).

**Bound.** Of a class of Z^h modulo (1, ..., 1) take the k whose mean m has |m| <= 1/2. The exponent of (1) is that of
|k|^2 - h m^2 >= sum of (k_i^2 - |k_i| / 2) >= |k|^2 / 2, so 1 + theta <= (1 + 2 sum over j >= 1 of q^(j^2))^h, with
q = exp(-pi^2 r^2), and for r >= 1

    theta(h, r) <= exp(2.0001 h exp(-pi^2 r^2)) - 1,                                                               (3)

which grows with h: a bound for the most honest parties there may be holds for fewer. (1 + theta itself is the theta
series of the lattice A*_(h-1), and can be smaller for more parties.)

Reference: the distance of a Gaussian modulo a lattice from uniform is that of Micciancio and Regev 2007, "Worst-case to
average-case reductions based on Gaussian measures", section 4. Noise in shares is of Dwork et al. 2006, "Our data,
ourselves"; under a secure sum, with colluders, of Heikkila et al. 2017, "Differentially private Bayesian learning on
distributed data".
"""

from __future__ import annotations

import math

import numpy as np

from choral.errors import ConfigError

_MOST_WIDENING = 2.0**-100  # of epsilon, by the rounding of shares in one step

LEAST_DEVIATION = 1.0  # in grid steps, of a share: (3) holds from here on


def theta(honest: int, deviation: float) -> float:
    """Return theta(h, r) of equation (1), to about ten digits; infinite where floating point ends.

    Writing exp(S^2) as the mean of exp(sqrt(2) S t) over Gaussian t makes (1) a product, and with
    g(c) = sum over k in Z of exp(-b (k - c)^2), b = 2 pi^2 r^2,

        1 + theta = sqrt(b h / pi) * integral over |c| <= 1/2 of g(c)^h;                                           (4)

    the 1 is what the h-th powers of single terms add up to. The trapezoidal rule is exact for a periodic analytic
    function but for terms of size exp(-pi^2 n^2 / (b h)) for n points.
    Raises: ConfigError (a number out of range).
    """
    _check(honest, deviation, 0.05)
    if honest == 1:
        return 0.0
    b = 2.0 * math.pi**2 * deviation**2
    points = math.ceil(math.sqrt(b * honest * (b + 40.0)) / math.pi) + 64
    c = np.abs((np.arange(points) + 0.5) / points - 0.5)
    reach = math.ceil(math.sqrt(800.0 / b)) + 1
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        ratios = [np.exp(-b * (k * k - 2.0 * k * c)) for k in range(-reach, reach + 1) if k]  # to the nearest term
        others = np.sum(ratios, axis=0)
        powers = np.sum([each**honest for each in ratios], axis=0)
        terms = np.exp(-b * honest * c * c) * (np.expm1(honest * np.log1p(others)) - powers)
    value = math.sqrt(b * honest / math.pi) * float(terms.mean())
    return value if math.isfinite(value) else math.inf


def theta_bound(honest: int, deviation: float) -> float:
    """Return the right side of (3): no less than theta(h, deviation) for any h up to `honest`; from 1 grid step up.

    Raises: ConfigError (a number out of range).
    """
    _check(honest, deviation, LEAST_DEVIATION)
    if honest == 1:
        return 0.0
    exponent = 2.0001 * honest * math.exp(-(math.pi**2) * deviation**2) * (1.0 + 2.0**-40)  # floats round
    return math.expm1(exponent) if exponent < 700.0 else math.inf


def widening(honest: int, deviation: float, values: int) -> float:
    """Return a of (2), by (3), for `values` = d T integers opened in all, of sums of up to `honest` parties.

    Infinite where the theorem says nothing. Raises: ConfigError (a number out of range).
    """
    found = theta_bound(honest, deviation)
    return -values * math.log1p(-found) if found < 1.0 else math.inf


def check_shares(
    *, share: float, honest: int, parties: int, deviation: float, length: int, stretch: float, failure: float
) -> None:
    """Refuse what is no sum of shares that hides its rounding. Names: those of the events that charge for it.

    Raises: ConfigError.
    """
    if not share > 0.0:
        raise ConfigError(f"share is {share}, expected a finite number > 0")
    if not honest <= parties:
        raise ConfigError(f"honest is {honest} of {parties} parties, expected at most all")
    if not (0.0 <= stretch < 1.0 and 0.0 <= failure < 1.0):
        raise ConfigError(f"stretch is {stretch} and failure {failure}, expected >= 0 and below 1")
    if not widening(parties, deviation, length) <= _MOST_WIDENING:
        raise ConfigError(
            f"a share is {deviation:g} steps of the grid, too few for {parties} parties and"
            f" {length} coordinates to sum up as one Gaussian",
            hint="Take a finer grid: from 5 steps up there is room for any sum that fits a machine.",
        )


def _check(honest: int, deviation: float, least: float) -> None:
    if isinstance(honest, bool) or not isinstance(honest, int) or honest < 1:
        raise ConfigError(f"there are {honest} honest parties, expected an integer >= 1")
    if not least <= deviation < math.inf:
        raise ConfigError(
            f"the deviation of a share is {deviation} grid steps, expected a finite number >= {least}",
            hint="A finer grid makes it larger.",
        )
