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
_STEPS, _CLOSE = 1000, 1e-10


def check_rule(rule: Any) -> None:
    """Raises: SpecError."""
    checks.one_of(rule, "robust", RULES)


def robust_mean(rows: Floats, rule: Rule) -> Floats:
    """Return the rule's mean of the rows, shape (d,). rows: shape (groups, d), float64, finite; at least one row.

    median: of each coordinate (Yin et al. 2018). trimmed: the mean of each coordinate without a quarter of the rows at
    either end (ibid.). geometric: the point with the least sum of distances to the rows (Pillutla, Kakade, Harchaoui
    2022), from the median, to a relative 1e-10 or in 1,000 steps.
    """
    if rule == "median":
        return np.asarray(np.median(rows, axis=0))
    if rule == "trimmed":
        cut = trimmed_at(len(rows))
        return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))
    return _geometric_median(rows)


def _geometric_median(rows: Floats) -> Floats:
    """Weiszfeld's steps; where one lands on rows, as Vardi and Zhang 2000 go on ("The multivariate L1-median")."""
    point = np.median(rows, axis=0)
    for _ in range(_STEPS):
        distances = np.linalg.norm(rows - point, axis=1)
        apart = distances > 1e-14 * float(distances.max())
        if not apart.any():
            break
        weights = 1.0 / distances[apart]
        step = (weights / weights.sum()) @ rows[apart] - point
        here = len(rows) - int(apart.sum())
        pull = float(np.linalg.norm(step)) * float(weights.sum())  # of the other rows, in rows
        if pull <= here:
            break  # the rows here hold it
        step *= 1.0 - here / pull
        point = point + step
        if float(np.linalg.norm(step)) <= _CLOSE * float(distances.max()):
            break
    return np.asarray(point)


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
