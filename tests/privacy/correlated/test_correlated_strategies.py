"""Strategies and streams against dense matrices, brute force and published bounds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm, toeplitz
from scipy.optimize import minimize

from choral.errors import ConfigError
from choral.privacy.accounting.matrix_strategies import (
    Banded,
    Buffered,
    Strategy,
    Tree,
    error,
    estimate_variance,
    sensitivity,
)
from choral.privacy.correlated import factorisation
from choral.privacy.correlated.noise_streams import stream
from choral.privacy.errors import PrivacyError
from choral.privacy.noise.gaussian import gaussian, os_stream

BLT = Buffered((0.9, 0.3), (0.4, 0.5))
FIVE = Banded((1.0, 0.7, 0.5, 0.2, 0.1))


def tree_nodes(steps: int) -> list[tuple[int, int]]:
    """(level, last step) of the complete nodes over steps 1..steps, in the order in which they are completed."""
    return [(level, t) for t in range(1, steps + 1) for level in range(t.bit_length()) if t % (1 << level) == 0]


def dense(strategy: Strategy, steps: int, passes: int) -> np.ndarray:
    """C, from the definitions: the first column of a Toeplitz matrix, or the leaves under each node of a tree."""
    count = steps * passes
    if isinstance(strategy, Banded):
        return toeplitz([*strategy.coefficients, *[0.0] * count][:count], np.zeros(count))
    if isinstance(strategy, Buffered):
        tail = [
            sum(w * d ** (t - 1) for d, w in zip(strategy.decays, strategy.weights, strict=True))
            for t in range(1, count)
        ]
        return toeplitz([1.0, *tail], np.zeros(count))
    nodes = tree_nodes(steps)
    one = np.zeros((len(nodes), steps))
    for row, (level, last) in enumerate(nodes):
        one[row, last - (1 << level) : last] = 1.0
    return np.kron(np.eye(passes), one)


def tree_decoder(steps: int) -> np.ndarray:
    """B with B C = A for one tree: each prefix's nodes, each estimated as the best unbiased of its own subtree."""
    nodes, c = tree_nodes(steps), dense(Tree(), steps, 1)
    b = np.zeros((steps, len(nodes)))
    for t in range(1, steps + 1):
        end = t
        for level in range(t.bit_length()):
            if not t >> level & 1:
                continue
            first = end - (1 << level)
            inside = [i for i, (size, last) in enumerate(nodes) if last - (1 << size) >= first and last <= end]
            # Least squares for the leaves of the subtree from its nodes' noisy sums; their total is the estimate.
            b[t - 1, inside] = np.linalg.pinv(c[inside, first:end]).sum(axis=0)
            end = first
    return b


def worst_by_brute_force(c: np.ndarray, steps: int, passes: int, rows: int | None = None) -> float:
    """The largest |C u|^2 over all records, subsets of their participations, and signs of their contributions."""
    worst = 0.0
    for j in range(steps):
        for signs in itertools.product((-1.0, 0.0, 1.0), repeat=passes):
            u = np.zeros(steps * passes)
            u[j::steps] = signs
            worst = max(worst, float(((c @ u)[:rows] ** 2).sum()))
    return worst


CASES: list[tuple[Strategy, int, int]] = [
    (Banded((1.0,)), 3, 4),
    (FIVE, 5, 3),
    (FIVE, 6, 2),
    (Banded((1.0, 0.2, 0.9)), 3, 4),  # sensitivity needs no decreasing coefficients
    (BLT, 1, 6),
    (BLT, 3, 5),
    (BLT, 8, 1),
    (Buffered((0.99,), (0.8,)), 4, 4),
    (Tree(), 1, 3),
    (Tree(), 4, 3),
    (Tree(), 7, 2),
    (Tree(), 8, 2),
]


@pytest.mark.parametrize(("strategy", "steps", "passes"), CASES)
def test_sensitivity_is_the_worst_over_all_participations(strategy: Strategy, steps: int, passes: int) -> None:
    c = dense(strategy, steps, passes)
    assert sensitivity(strategy, steps, passes) ** 2 == pytest.approx(worst_by_brute_force(c, steps, passes), rel=1e-12)


@pytest.mark.parametrize(("strategy", "steps", "passes"), CASES)
def test_a_run_that_ends_early_pays_for_the_rows_it_released(strategy: Strategy, steps: int, passes: int) -> None:
    c = dense(strategy, steps, passes)
    for done in range(1, passes + 1):
        paid = float(strategy.costs(steps, passes)[:done].sum())
        rows = done * len(c) // passes
        assert paid == pytest.approx(worst_by_brute_force(c, steps, passes, rows), rel=1e-12)
    assert (np.diff(strategy.costs(steps, passes)) >= -1e-12).all()  # starting anew never costs more than was planned


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0.0, 2.0), max_size=4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_no_vector_contributions_exceed_the_sensitivity(rest: list[float], steps: int, passes: int, seed: int) -> None:
    """Contributions are vectors of norm at most 1, different in each pass: signs are not all there is."""
    strategy = Banded((1.0, *rest[: steps - 1]))
    random = np.random.default_rng(seed)
    u = np.zeros((steps * passes, 3))
    vectors = random.normal(size=(passes, 3))
    u[int(random.integers(steps)) :: steps] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    moved = np.linalg.norm(dense(strategy, steps, passes) @ u)
    assert moved <= sensitivity(strategy, steps, passes) * (1 + 1e-12)


def test_banded_sensitivity_is_the_theorem_of_the_paper() -> None:
    """Choquette-Choo et al. 2023, theorem 2: sqrt(k) times the largest column norm."""
    for steps in (5, 9):
        for passes in (1, 4):
            assert sensitivity(FIVE, steps, passes) == pytest.approx(
                math.sqrt(passes) * np.linalg.norm(FIVE.coefficients), rel=1e-12
            )


@pytest.mark.parametrize(("strategy", "steps", "passes"), [c for c in CASES if not isinstance(c[0], Tree)])
def test_toeplitz_strategies_factorise_the_prefix_sums(strategy: Any, steps: int, passes: int) -> None:
    count = steps * passes
    c, a = dense(strategy, steps, passes), np.tri(count)
    b = a @ np.linalg.inv(c)
    np.testing.assert_allclose(b @ c, a, atol=1e-12)
    np.testing.assert_allclose(strategy.column(count), c[:, 0], atol=1e-15)
    np.testing.assert_allclose(strategy.inverse(count), np.linalg.inv(c)[:, 0], atol=1e-12)
    np.testing.assert_allclose(strategy.errors(steps, passes), (b**2).sum(1), rtol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 13, 32, 64])
def test_the_tree_factorises_the_prefix_sums(steps: int) -> None:
    b, c = tree_decoder(steps), dense(Tree(), steps, 1)
    np.testing.assert_allclose(b @ c, np.tri(steps), atol=1e-10)
    np.testing.assert_allclose(Tree().errors(steps, 1), (b**2).sum(1), rtol=1e-9)
    twice = Tree().errors(steps, 2)
    np.testing.assert_allclose(twice[steps:], twice[steps - 1] + twice[:steps], rtol=1e-12)


def test_node_estimates_have_the_variance_of_honakers_formula() -> None:
    """Honaker 2015, from below: 1 / (2 (1 - 2^-levels)) of a node's own variance."""
    for level in range(12):
        assert estimate_variance(level) == pytest.approx(1 / (2 * (1 - 2.0 ** -(level + 1))), rel=1e-12)


@pytest.mark.parametrize(("strategy", "steps", "passes"), [*CASES, (BLT, 64, 1), (Tree(), 64, 1)])
def test_streams_make_the_rows_of_the_inverse_times_z(strategy: Strategy, steps: int, passes: int) -> None:
    """The same source drives a dense computation; streams differ from it by their rounding alone."""
    size, scale = 3, 1e6
    tape: list[bytes] = []

    def recording(count: int) -> bytes:
        tape.append(os_stream(count))
        return tape[-1]

    def replaying(_: int) -> bytes:
        return tape.pop(0)

    rows = []
    for _ in range(passes if isinstance(strategy, Tree) else 1):
        made = stream(strategy)
        count = steps if isinstance(strategy, Tree) else steps * passes
        rows += [made.next(size, scale, recording) for _ in range(count)]
    got = np.array(rows)
    assert np.array_equal(got, np.rint(got))
    c = dense(strategy, steps, passes)
    z = scale * np.array([gaussian(size, replaying) for _ in range(len(c))])
    if isinstance(strategy, Tree):
        # Own noises are drawn leaf first, in the order of tree_nodes.
        prefix = np.kron(np.eye(passes), tree_decoder(steps)) @ z
        want = np.concatenate([np.diff(p, axis=0, prepend=0.0) for p in np.split(prefix, passes)])
    else:
        want = np.linalg.solve(c, z)
    assert not tape
    assert np.abs(got - want).max() < 20.0  # of 1e6: roundings of earlier steps come in, damped


def test_rounding_is_post_processing() -> None:
    """Row t of C w is z_t up to half a grid step, whatever the roundings before: nothing accumulates in it."""
    for strategy in (FIVE, BLT, factorisation.buffered(200, 10)):
        tape: list[bytes] = []

        def recording(count: int, tape: list[bytes] = tape) -> bytes:
            tape.append(os_stream(count))
            return tape[-1]

        made = stream(strategy)
        w = np.array([made.next(4, 3.0, recording) for _ in range(2000)])  # a coarse grid: rounding is a third of z
        z = 3.0 * np.array([gaussian(4, lambda _, tape=tape: tape.pop(0)) for _ in range(2000)])
        column = strategy.column(2000)
        for i in range(4):
            assert np.abs(np.convolve(column, w[:, i])[:2000] - z[:, i]).max() <= 0.5 + 1e-6


def test_streams_refuse_what_they_cannot_carry() -> None:
    for strategy in (FIVE, BLT, Tree()):
        made = stream(strategy)
        made.next(5, 1.0, os_stream)
        with pytest.raises(PrivacyError, match="for 5 parameters, now there are 6"):
            made.next(6, 1.0, os_stream)
    for strategy in (FIVE, Tree()):
        with pytest.raises(PrivacyError, match="32 bits"):
            stream(strategy).next(100, 1e10, os_stream)


def test_memory_is_the_number_of_bands_buffers_or_levels_times_the_parameters() -> None:
    for strategy, size in ((FIVE, 4 * 4), (BLT, 2 * 8), (Banded((1.0,)), 0)):
        made = stream(strategy)
        for _ in range(20):
            made.next(1000, 100.0, os_stream)
        assert made.size == size * 1000
    made = stream(Tree())
    sizes = []
    for _ in range(64):
        made.next(1000, 100.0, os_stream)
        sizes.append(made.size)
    assert max(sizes) == 1000 * (6 * 4 + 8)  # after 63 steps six nodes are open


def best_single(count: int) -> float:
    """The optimum over all matrices for one participation: the fixed point of Denisov et al. 2022, theorem 3.2."""
    gram = np.tri(count).T @ np.tri(count)
    v = np.ones(count)
    for _ in range(500):
        root = np.diag(np.sqrt(v))
        v = np.diag(np.real(sqrtm(root @ gram @ root)))
    inner = np.real(sqrtm(np.diag(np.sqrt(v)) @ gram @ np.diag(np.sqrt(v))))
    x = np.diag(v**-0.5) @ inner @ np.diag(v**-0.5)
    np.testing.assert_allclose(np.diag(x), 1.0, rtol=1e-6)
    return math.sqrt(np.trace(gram @ np.linalg.inv(x)) / count)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_for_one_pass_the_error_is_near_the_optimum_over_all_matrices(count: int) -> None:
    best = best_single(count)
    # Henzinger, Upadhyay, Upadhyay 2023: no factorisation has less than the nuclear norm of the prefix sums over n.
    floor = sum(0.5 / math.sin((2 * j - 1) * math.pi / (4 * count + 2)) for j in range(1, count + 1)) / count
    assert floor <= best * (1 + 1e-9)
    for found in (factorisation.banded(count, 1, count), factorisation.buffered(count, 1)):
        assert best * (1 - 1e-6) <= error(found, count, 1) < 1.04 * best
    assert best < error(Tree(), count, 1)


def best_multiple(steps: int, passes: int) -> float:
    """The optimum over lower triangular C >= 0 for k participations, by sequential quadratic programming."""
    count = steps * passes
    low = np.tril_indices(count)
    gram = np.tri(count).T @ np.tri(count)

    def matrix(x: np.ndarray) -> np.ndarray:
        c = np.zeros((count, count))
        c[low] = x
        return c

    def loss(x: np.ndarray) -> float:
        inverse = np.linalg.inv(matrix(x))
        return float(np.trace(gram @ inverse @ inverse.T))

    def slack(x: np.ndarray) -> np.ndarray:
        c = matrix(x)
        return np.array([1 - (c[:, j::steps].sum(1) ** 2).sum() for j in range(steps)])

    start = dense(factorisation.banded(steps, passes, steps), steps, passes)[low]
    start /= sensitivity(factorisation.banded(steps, passes, steps), steps, passes)
    found = minimize(
        loss,
        start,
        constraints={"type": "ineq", "fun": slack},
        bounds=[(0.05 if i == j else 0.0, None) for i, j in zip(*low, strict=True)],
        options={"maxiter": 500, "ftol": 1e-10},
    )
    assert found.status in (0, 8)  # 8: no step along the last direction lowers it, to rounding
    assert slack(found.x).min() > -1e-7
    return math.sqrt(found.fun / count)


@pytest.mark.parametrize(("steps", "passes"), [(4, 2), (3, 3)])
def test_for_several_passes_the_error_is_near_the_optimum_over_all_matrices(steps: int, passes: int) -> None:
    best = best_multiple(steps, passes)
    for found in (factorisation.banded(steps, passes, steps), factorisation.buffered(steps, passes)):
        assert best * (1 - 1e-4) <= error(found, steps, passes) < 1.12 * best
    assert error(Banded((1.0,)), steps, passes) > 1.3 * best


# Root mean squared error times sensitivity by jax_privacy 2.0.0 (float64), its own optimisers and sensitivities:
# toeplitz.optimize_banded_toeplitz(n=m * k, bands=b), toeplitz.minsep_sensitivity_squared, toeplitz.per_query_error;
# buffered_toeplitz.optimize(n, min_sep=m, max_participations=k, error="mean", min_buffers=i, max_buffers=i);
# dense.optimize(m * k, epochs=k, max_optimizer_steps=1000), sensitivity.fixed_epoch_sensitivity.
@pytest.mark.parametrize(
    ("steps", "passes", "bands", "theirs"),
    [(100, 10, 16, 19.853291), (100, 10, 32, 15.529065), (10, 20, 10, 17.049073), (1000, 10, 32, 41.877193)],
)
def test_banded_is_as_good_as_jax_privacys(steps: int, passes: int, bands: int, theirs: float) -> None:
    assert error(factorisation.banded(steps, passes, bands), steps, passes) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "passes", "buffers", "theirs"),
    [(100, 1, 1, 2.38267), (100, 1, 2, 2.32078), (100, 1, 3, 2.32004), (100, 10, 1, 12.44944), (100, 10, 2, 12.19385)],
)
def test_buffered_is_as_good_as_jax_privacys(steps: int, passes: int, buffers: int, theirs: float) -> None:
    assert error(factorisation.buffered(steps, passes, buffers), steps, passes) == pytest.approx(theirs, rel=3e-6)


def test_jax_privacy_says_the_same_of_one_buffered_strategy() -> None:
    """Theirs for 100 steps, 10 passes and two buffers, as printed; sensitivity of the same kind from our optimum."""
    theirs = Buffered((0.98166349, 0.57776827), (0.25023504, 0.25734546))
    assert error(theirs, 100, 10) == pytest.approx(12.19385, rel=1e-6)
    assert sensitivity(factorisation.buffered(100, 10), 100, 10) == pytest.approx(6.174915, rel=1e-5)


@pytest.mark.parametrize(("steps", "passes", "dense_optimum"), [(4, 4, 3.670608), (16, 4, 4.407855)])
def test_few_percent_lie_between_these_and_the_optimal_dense_matrix(
    steps: int, passes: int, dense_optimum: float
) -> None:
    ratios = [
        error(found, steps, passes) / dense_optimum
        for found in (factorisation.banded(steps, passes, steps), factorisation.buffered(steps, passes))
    ]
    assert 1.0 < ratios[0] < 1.07
    assert 1.0 < ratios[1] < 1.12


def test_the_square_root_has_its_published_error() -> None:
    """Fichtenberger et al. 2023: C = A^(1/2), whose largest squared error is the sum of binom(2t, t)^2 / 16^t."""
    for count in (1, 10, 64):
        root = Banded(tuple(factorisation.square_root(count).tolist()))
        c = dense(root, count, 1)
        np.testing.assert_allclose(c @ c, np.tri(count), atol=1e-12)
        known = sum(math.comb(2 * t, t) ** 2 / 16**t for t in range(count))
        assert root.errors(count, 1)[-1] * sensitivity(root, count, 1) ** 2 == pytest.approx(known**2, rel=1e-10)
        assert known <= 1 + (np.euler_gamma + math.log(16)) / math.pi + math.log(count) / math.pi


@pytest.mark.parametrize(("steps", "passes"), [(10, 20), (100, 1), (100, 10), (500, 4)])
def test_optimised_beats_closed_form_beats_independent(steps: int, passes: int) -> None:
    for bands in (2, 8, 10):
        optimal = error(factorisation.banded(steps, passes, bands), steps, passes)
        closed = error(Banded(tuple(factorisation.square_root(bands).tolist())), steps, passes)
        assert optimal <= closed * (1 + 1e-9)
        assert closed < error(Banded((1.0,)), steps, passes)
    errors = [error(factorisation.banded(steps, passes, bands), steps, passes) for bands in (1, 2, 4, 8, 10)]
    assert errors == sorted(errors, reverse=True)
    two = error(factorisation.buffered(steps, passes), steps, passes)
    assert two < error(Tree(), steps, passes)
    assert two < errors[-2]  # with the memory of four bands, less noise than with eight


@pytest.mark.parametrize("strategy", [Banded((1.0, 0.6, 0.3, 0.25)), BLT])
def test_gradients_of_the_objective_are_finite_differences(strategy: Any) -> None:
    steps, passes = 5, 3
    count = steps * passes
    column = strategy.column(count)
    value, slope = factorisation._objective(strategy, steps, passes)
    for j in (0, 1, 2, 7, count - 1):
        moved = []
        for step in (1e-6, -1e-6):
            changed = column.copy()
            changed[j] += step
            c = toeplitz(changed, np.zeros(count))
            b = np.tri(count) @ np.linalg.inv(c)
            cost = (c[:, ::steps].sum(1) ** 2).sum()
            moved.append(math.log((b**2).sum() / count * cost))
        assert np.mean(moved) == pytest.approx(value, abs=1e-8)
        assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(slope[j], abs=1e-6)


def test_strategies_are_written_and_read_back_exactly() -> None:
    for strategy in (factorisation.banded(20, 3, 7), factorisation.buffered(20, 3), Tree()):
        assert msgspec.json.decode(msgspec.json.encode(strategy), type=Strategy) == strategy


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Banded(()),
        lambda: Banded((2.0,)),
        lambda: Banded((1.0, -0.1)),
        lambda: Banded((1.0, math.nan)),
        lambda: Banded((1.0, math.inf)),
        lambda: Buffered((), ()),
        lambda: Buffered((0.5,), (0.1, 0.2)),
        lambda: Buffered((1.0,), (0.1,)),
        lambda: Buffered((0.0,), (0.1,)),
        lambda: Buffered((0.5,), (-0.1,)),
        lambda: factorisation.banded(10, 2, 0),
        lambda: factorisation.banded(10, 2, 11),
        lambda: factorisation.banded(0, 2, 1),
        lambda: factorisation.buffered(10, 0),
        lambda: factorisation.buffered(10, 2, 0),
    ],
)
def test_bad_strategies_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError):
        bad()
