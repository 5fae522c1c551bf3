"""The inner loops of logistic regression on sparse rows, in plain numpy: what ``sparse_kernels_numba`` does faster.

Rows are in compressed sparse row form, ``rows = (indptr, indices, values, labels)``: row i has the values
``values[indptr[i]:indptr[i+1]]``, float64, at the columns ``indices[indptr[i]:indptr[i+1]]``. A record's loss is
log(1 + exp(x w)) - y x w, its gradient (sigmoid(x w) - y) x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from choral.trainers.local_steps.linear_models import coordinate

Array = np.ndarray[Any, Any]
Rows = tuple[Array, Array, Array, Array]


def walk(
    rows: Rows,
    order: Array,
    batch: int,
    start: Array,
    drift: Array,
    keep: float,
    step: float,
    scale: Array,
    anchored: bool,
) -> Array:
    """Steps over the rows in their order, ``batch`` at a time, of u <- keep u - step (drift + scale m), u = 0 at first.

    m: the batch's mean gradient at ``start + u``; anchored: less the one at ``start``. So with drift the global
    gradient these are SVRG's steps, and with no anchor those of SGD. start, drift, scale: float64, shape (d,).
    Returns u, float64, shape (d,).
    """
    labels, change = rows[3], np.zeros_like(start)
    for first in range(0, len(order), batch):
        drawn = order[first : first + batch]
        mean = np.zeros_like(start)
        for row in drawn:
            at, x = _row(rows, row)
            before = expit(x @ start[at]) if anchored else labels[row]
            np.add.at(mean, at, (expit(x @ (start[at] + change[at])) - before) * x / len(drawn))
        change = keep * change - step * (drift + scale * mean)
    return change


def ascend(rows: Rows, order: Array, start: Array, dual: Array, slack: float, total: float) -> Array:
    """Dual coordinate ascent over the rows in their order, as in
    :func:`choral.trainers.local_steps.linear_models.ascend`; changes ``dual``.

    total: ridge times n. Returns the change of the primal weights, float64, shape (d,).
    """
    labels, change = rows[3], np.zeros_like(start)
    for row in order:
        at, x = _row(rows, row)
        sign = 2.0 * labels[row] - 1.0
        margin = sign * (x @ (start[at] + slack * change[at]))
        new = coordinate(float(dual[row]), float(margin), float(slack * (x @ x) / total))
        np.add.at(change, at, sign * (new - dual[row]) / total * x)
        dual[row] = new
    return change


def _row(rows: Rows, row: int) -> tuple[Array, Array]:
    indptr, indices, values, _ = rows
    piece = slice(indptr[row], indptr[row + 1])
    return indices[piece], values[piece]
