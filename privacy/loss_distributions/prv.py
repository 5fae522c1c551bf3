"""Epsilon from both sides by privacy random variables: an accountant of others, to hold against ours.

Gopi, Lee, Wutschitz 2021, "Numerical composition of differential privacy", in Opacus' code. It shares no program with
ours or dp-accounting's: the loss is truncated, spread over a grid that keeps its mean, composed by FFT, and theorem 5.5
bounds what that did: with errors e of epsilon and f of delta, the delta~ that is computed and the true one have

    delta(epsilon + e) - f  <=  delta~(epsilon)  <=  delta(epsilon - e) + f.                                       (1)

Opacus imports torch, about two seconds; so this module is loaded where it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv import Domain

from choral.privacy.errors import AccountingError

_ERROR = 0.01  # of epsilon, to either side
_MOST_POINTS = 1 << 22  # of the grid; where it takes more, the bracket is made wider
_DELTA_ERROR = 1e-3  # of delta, as in Opacus


class _Accountant(PRVAccountant):  # type: ignore[misc]
    """Opacus' accountant, with a grid that fits into memory and both ends of its bracket."""

    def bracket(self, delta: float) -> tuple[float, float]:
        delta_error = delta * _DELTA_ERROR
        self._error = _ERROR
        composed = self._get_dprv(eps_error=_ERROR, delta_error=delta_error)
        low, _, high = composed.compute_epsilon(delta, delta_error, self._error)  # both ends of (1)
        return max(float(low), 0.0), max(float(high), 0.0)

    def _get_domain(self, *, eps_error: float, delta_error: float, **rest: object) -> Domain:
        while True:
            domain = super()._get_domain(eps_error=eps_error, delta_error=delta_error, **rest)
            if domain.size <= _MOST_POINTS:
                self._error = eps_error
                return domain
            eps_error *= 1.1 * domain.size / _MOST_POINTS


def bracket(steps: Sequence[tuple[float, float, int]], delta: float) -> tuple[float, float]:
    """Return a lower and an upper bound on epsilon at `delta` of `steps`: triples (sample rate, noise, number).

    For *removing* a record, the worse direction of this mechanism in every case known.
    Raises: AccountingError (the method gives no answer there).
    """
    accountant = _Accountant()
    # Steps that take every record are exactly one Gaussian of noise / sqrt(T).
    accountant.history = [(s / math.sqrt(t), q, 1) if q == 1.0 else (s, q, t) for q, s, t in steps]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the orders that it tries for the width of its grid
            low, high = accountant.bracket(delta)
    except (RuntimeError, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise AccountingError(
            f"privacy random variables give no epsilon at delta={delta:g}: {error}",
            hint="The other accountants still do; say that this one did not check them.",
        ) from error
    if not low <= high:
        raise AccountingError(f"privacy random variables give the bracket [{low}, {high}] at delta={delta:g}")
    return low, high
