"""Without noise: equal to the last bit to plain arithmetic on all records together, however they are dealt."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from choral import Masked, federated_statistics
from choral.trainers import Categories, Count, Covariance, Histogram, Mean, Quantiles, Table

EVERY = {
    "n": Count(column="age"),
    "age": Mean(0, 120),
    "stay": Mean(-8, 56),
    "age bins": Histogram([0, 18, 65, 120], column="age"),
    "sex": Categories(("f", "m")),
    "sex and age": Table({"sex": ("f", "m"), "age": (1, 2, 3)}),
    "both": Covariance({"age": (0, 120), "stay": (-8, 56)}),
    "quartiles": Quantiles((0.25, 0.5, 0.75), 0, 120, bins=16384, column="age"),
}


def table(ages: list[float], stays: list[float], sexes: list[str]) -> dict[str, Any]:
    return {"age": np.array(ages), "stay": np.array(stays), "sex": np.array(sexes)}


def dealt(records: list[tuple[float, float, str]], cuts: list[int]) -> dict[str, dict[str, Any]]:
    """Records as parties that have them in this order."""
    ends = [0, *sorted(1 + cut % (len(records) - 2) for cut in cuts), len(records)]
    ends = sorted(set(ends))
    return {
        f"party-{at}": table(*([row[column] for row in records[low:high]] for column in range(3)))  # type: ignore[arg-type]
        for at, (low, high) in enumerate(itertools.pairwise(ends))
    }


def exact_mean(values: list[float]) -> float:
    return float(sum(map(Fraction, values)) / len(values))


def exact_covariance(first: list[float], second: list[float]) -> float:
    a, b, n = list(map(Fraction, first)), list(map(Fraction, second)), len(first)
    return float((sum(x * y for x, y in zip(a, b, strict=True)) - sum(a) * sum(b) / n) / (n - 1))


RECORDS = st.lists(
    st.tuples(
        st.integers(0, 120 * 64).map(lambda k: k / 64.0),
        st.integers(-8, 56).map(float),
        st.sampled_from(["f", "m", "other"]),
    ),
    min_size=4,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.lists(st.integers(0, 1000), min_size=1, max_size=6))
def test_equal_to_the_last_bit_to_plain_arithmetic(records: list[tuple[float, float, str]], cuts: list[int]) -> None:
    found = federated_statistics(dealt(records, cuts), EVERY)
    ages, stays = [row[0] for row in records], [row[1] for row in records]
    assert found["n"]["count"].value == len(records)
    for name, values in (("age", ages), ("stay", stays)):
        assert found[name]["count"].value == len(records)
        assert found[name]["sum"].value == float(sum(map(Fraction, values)))
        assert found[name]["mean"].value == exact_mean(values)
        assert found[name]["variance"].value == exact_covariance(values, values)
        assert found["both"][f"mean {name}"].value == exact_mean(values)
    for first, second, label in ((ages, ages, "age, age"), (ages, stays, "age, stay"), (stays, stays, "stay, stay")):
        value = found["both"][f"covariance {label}"].value
        assert value == pytest.approx(exact_covariance(first, second), rel=1e-14, abs=1e-300)
    varied = exact_covariance(ages, ages) > 0 and exact_covariance(stays, stays) > 0
    correlation = found["both"]["correlation age, stay"].value
    assert correlation == (pytest.approx(np.corrcoef(ages, stays)[0, 1], abs=1e-9) if varied else None)
    ordered, width = np.sort(ages), 120 / 16384  # the median of bins lies within one of a middle value of records
    median = found["quartiles"]["quantile 0.5"].value
    assert median is not None
    assert ordered[(len(ages) - 1) // 2] - width <= median <= ordered[len(ages) // 2] + width
    for name, statistic in found.estimates.items():
        assert not any(word in label for label in statistic for word in ("min", "max", "least", "largest")), name
    counts = np.histogram(ages, [0, 18, 65, 120])[0]
    assert [found["age bins"][f"count {c}"].value for c in ("[0, 18)", "[18, 65)", "[65, 120]")] == counts.tolist()
    for sex in ("f", "m", "other"):
        assert found["sex"][f"count {sex}"].value == sum(row[2] == sex for row in records)
    for age in (1, 2, 3):
        both = sum(row[2] == "f" and row[0] == age for row in records)
        assert found["sex and age"][f"count f, {age}"].value == both
    assert all(each.noise in (0.0, None) for _, _, each in found.rows())


def test_the_same_under_the_masked_sum() -> None:
    generator = np.random.default_rng(5)
    records = [(float(a), float(s), "fm"[int(x)]) for a, s, x in generator.integers(0, [120, 50, 2], (90, 3))]
    parties = dealt(records, [20, 40, 60])
    plain, masked = (federated_statistics(parties, EVERY, secure_sum=each) for each in ("plain", Masked()))
    assert plain.estimates == masked.estimates
    assert masked.bytes_up > plain.bytes_up


def test_quantiles_are_within_a_bin() -> None:
    generator = np.random.default_rng(6)
    values = generator.normal(60, 15, 4000)
    parties = {name: {"x": part} for name, part in zip("abc", np.array_split(values, 3), strict=True)}
    shares = (0.01, 0.25, 0.5, 0.9)
    found = federated_statistics(parties, {"x": Quantiles(shares, 0, 120)})
    for share in shares:
        # of linear interpolation between order statistics; neighbours there are less than .3 of a bin apart on average
        value = found["x"][f"quantile {share:g}"].value
        assert value is not None
        assert np.mean(values < value) == pytest.approx(share, abs=0.005)


def test_missing_values_are_left_out_one_by_one() -> None:
    nan = float("nan")
    parties = {
        "a": {"age": [1.0, nan, 3.0], "stay": [2.0, 4.0, nan], "sex": ["f", "", "m"]},
        "b": {"age": [nan, 7.0], "stay": [nan, 8.0], "sex": ["m", "f"]},
    }
    found = federated_statistics(parties, EVERY)
    assert found["n"]["count"].value == 3
    assert found["age"]["mean"].value == 11 / 3
    assert found["stay"]["sum"].value == 14
    assert found["sex"]["count f"].value == 2
    assert found["both"]["count"].value == 2  # records that have both
    assert found["sex and age"]["count f, 1"].value == 1


def test_beyond_the_bounds_counts_as_the_bound() -> None:
    parties = {"a": {"x": [-1e300, 0.5, np.inf]}, "b": {"x": [2.0, -np.inf]}}
    found = federated_statistics(parties, {"x": Mean(0, 1), "bins": Histogram([0, 0.5, 1], column="x")})
    assert found["x"]["sum"].value == 2.5
    assert [found["bins"][f"count {c}"].value for c in ("[0, 0.5)", "[0.5, 1]")] == [2, 3]


def test_a_column_far_from_zero_keeps_its_last_bits() -> None:
    base = 1e9
    parties = {"a": {"x": [base + 0.25, base + 0.5]}, "b": {"x": [base + 0.75]}}
    assert federated_statistics(parties, {"x": Mean(base, base + 1)})["x"]["variance"].value == 0.0625


def test_tensors_have_columns_by_number() -> None:
    import torch
    from torch.utils.data import TensorDataset

    data = TensorDataset(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 1]))
    found = federated_statistics({"a": data, "b": data}, {"1": Mean(0, 8), "label": Categories((0, 1))})
    assert found["1"]["mean"].value == 4
    assert found["label"]["count 1"].value == 2
