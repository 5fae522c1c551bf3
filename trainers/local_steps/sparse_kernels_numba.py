"""The loops of ``sparse_kernels`` compiled: time per step in proportion to a row's entries, not to the dimension.

Coordinates that a row does not touch only drift, u <- keep u - step drift, which is m steps later
keep^m u - step drift (1 + keep + ... + keep^(m-1)). So each is brought up to date when next touched, or at the end.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from choral.trainers.local_steps.linear_models import coordinate

_compiled = numba.njit(boundscheck=False, cache=True, nogil=True)
_coordinate = _compiled(coordinate)


@_compiled
def _sigmoid(margin: float) -> float:
    if margin >= 0:
        return 1.0 / (1.0 + math.exp(-margin))
    power = math.exp(margin)
    return power / (1.0 + power)


@_compiled
def walk(rows, order, batch, start, drift, keep, step, scale, anchored) -> Any:  # type: ignore[no-untyped-def]
    """See :func:`choral.trainers.local_steps.sparse_kernels.walk`."""
    indptr, indices, values, labels = rows
    steps = (len(order) + batch - 1) // batch
    powers, sums = np.empty(steps + 1), np.empty(steps + 1)  # keep^m, and step (1 + ... + keep^(m-1))
    powers[0], sums[0] = 1.0, 0.0
    for m in range(steps):
        sums[m + 1] = sums[m] + step * powers[m]
        powers[m + 1] = powers[m] * keep
    change, seen = np.zeros_like(start), np.zeros(len(start), np.int64)
    slopes = np.empty(batch)
    for now in range(steps):
        first, last = now * batch, min((now + 1) * batch, len(order))
        for k in range(first, last):
            row, margin, before = order[k], 0.0, 0.0
            for p in range(indptr[row], indptr[row + 1]):
                j = indices[p]
                missed = now - seen[j]
                if missed:
                    change[j] = powers[missed] * change[j] - sums[missed] * drift[j]
                    seen[j] = now
                margin += values[p] * (start[j] + change[j])
                before += values[p] * start[j]
            slopes[k - first] = _sigmoid(margin) - (_sigmoid(before) if anchored else labels[row])
        for k in range(first, last):
            row = order[k]
            slope = step / (last - first) * slopes[k - first]
            for p in range(indptr[row], indptr[row + 1]):
                j = indices[p]
                if seen[j] == now:
                    change[j] = keep * change[j] - step * drift[j]
                    seen[j] = now + 1
                change[j] -= slope * scale[j] * values[p]
    for j in range(len(start)):
        missed = steps - seen[j]
        change[j] = powers[missed] * change[j] - sums[missed] * drift[j]
    return change


@_compiled
def ascend(rows, order, start, dual, slack, total) -> Any:  # type: ignore[no-untyped-def]
    """See :func:`choral.trainers.local_steps.sparse_kernels.ascend`."""
    indptr, indices, values, labels = rows
    change = np.zeros_like(start)
    for row in order:
        sign = 2.0 * labels[row] - 1.0
        margin, square = 0.0, 0.0
        for p in range(indptr[row], indptr[row + 1]):
            margin += values[p] * (start[indices[p]] + slack * change[indices[p]])
            square += values[p] * values[p]
        new = _coordinate(dual[row], sign * margin, slack * square / total)
        step = sign * (new - dual[row]) / total
        for p in range(indptr[row], indptr[row + 1]):
            change[indices[p]] += step * values[p]
        dual[row] = new
    return change
