"""Robust means of the rows of a table, and how often random groups are spoiled.

A row is the mean of a group. A rule withstands fewer than half of its rows being anything (the trimmed mean: no more
than it trims at either end); how many are spoiled when some parties poison is counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from choral.protocols import argument_checks as checks

Rule = Literal["median", "trimmed", "geometric"]
RULES: tuple[Rule, ...] = get_args(Rule)
Floats = npt.NDArray[np.float64]

TRIMMED = 0.25  # of the rows, at either end
_STEPS, _CLOSE = 1000, 5e-11


def check_rule(rule: Any) -> None:
    """Raises: SpecError."""
    checks.one_of(rule, "robust", RULES)


def robust_mean(rows: Floats, rule: Rule) -> Floats:
    """Return the rule's mean of the rows, shape (d,). rows: shape (groups, d), float64, finite; at least one row.

    median: of each coordinate (Yin et al. 2018). trimmed: the mean of each coordinate without a quarter of the rows at
    either end (ibid.). geometric: the point with the least sum of distances to the rows (Pillutla, Kakade, Harchaoui
    2022), from the median: that sum is within a relative 1e-10 of the least, or 1,000 steps were made.
    """
    if rule == "median":
        return np.asarray(np.median(rows, axis=0))
    if rule == "trimmed":
        cut = trimmed_at(len(rows))
        return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))
    return _geometric_median(rows)


def _geometric_median(rows: Floats) -> Floats:
    """Weiszfeld's steps; where one lands on rows, as Vardi and Zhang 2000 go on ("The multivariate L1-median").

    A small step is no end: near a row all are small. It ends where the subgradient, times twice the largest distance,
    leaves nothing to win; or at a row that holds the point, which is looked at when one comes near, once.
    """
    point, looked = np.median(rows, axis=0), set[int]()
    for _ in range(_STEPS):
        distances = np.linalg.norm(rows - point, axis=1)
        nearest, farthest = int(distances.argmin()), float(distances.max())
        if distances[nearest] <= 0.01 * farthest and nearest not in looked:
            looked.add(nearest)
            if _step(rows, rows[nearest])[1] <= 0.0:
                return np.array(rows[nearest])
        step, left = _step(rows, point)
        if left * farthest <= _CLOSE * float(distances.sum()):
            break
        point = point + step
    return np.asarray(point)


def _step(rows: Floats, point: Floats) -> tuple[Floats, float]:
    """Return the step, and the length of the least subgradient of the sum of distances."""
    distances = np.linalg.norm(rows - point, axis=1)
    apart = distances > 1e-14 * float(distances.max())
    if not apart.any():
        return np.zeros_like(point), 0.0
    weights = 1.0 / distances[apart]
    step = (weights / weights.sum()) @ rows[apart] - point
    here = len(rows) - int(apart.sum())
    pull = float(np.linalg.norm(step)) * float(weights.sum())  # of the other rows, in rows
    return step * max(0.0, 1.0 - here / pull) if pull else step, max(0.0, pull - here)


def trimmed_at(groups: int) -> int:
    """Rows that the trimmed mean leaves out at either end; fewer than half of them in all."""
    return min(math.ceil(TRIMMED * groups), (groups - 1) // 2)


def withstands(rule: Rule, groups: int) -> int:
    """Spoiled groups that the rule withstands."""
    return trimmed_at(groups) if rule == "trimmed" else (groups - 1) // 2


def spoiled(sizes: Sequence[int], attackers: int) -> list[Fraction]:
    """Return the probability that 0, 1, 2, ... groups have an attacker in them, where the groups are drawn at random.

    Of the ways to choose the attackers' places, those with k groups hit: the product over groups of 1 (not hit) plus
    C(size, i) for each i >= 1 of attackers in it.
    """
    ways = [[0] * (attackers + 1) for _ in range(len(sizes) + 1)]
    ways[0][0] = 1
    for size in sizes:
        for hit in range(len(sizes) - 1, -1, -1):
            for placed in range(attackers, -1, -1):
                if not (count := ways[hit][placed]):
                    continue
                for here in range(1, min(size, attackers - placed) + 1):
                    ways[hit + 1][placed + here] += count * math.comb(size, here)
    whole = math.comb(sum(sizes), attackers)
    return [Fraction(row[attackers], whole) for row in ways]
