"""What is written down can be read back: events of whatever numbers, and refusals before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.errors import ConfigError
from choral.privacy import Ledger, LedgerError, Privacy, private_search
from choral.privacy.accounting.events import ClientRelease, CorrelatedGaussian, Event, PoissonSampledGaussian, Search
from choral.privacy.accounting.matrix_strategies import Banded, Buffered, Tree
from choral.privacy.ledgers.hash_chain import GENESIS, ChainedLine, UnreadableError, encoded, follow, lines

DECODER = msgspec.json.Decoder(ChainedLine[Event])


def dressed(numbers: st.SearchStrategy[Any], *ways: Callable[[Any], Any]) -> st.SearchStrategy[Any]:
    """The same numbers as they are, and in other types."""
    return st.tuples(numbers, st.sampled_from((lambda number: number, *ways))).map(lambda pair: pair[1](pair[0]))


def narrow(value: float) -> Any:
    """float32 where that stays a positive number, else float64."""
    return np.float32(value) if 1e-30 < value < 1e30 else np.float64(value)


positive = dressed(
    st.floats(5e-324, 1.7e308) | st.integers(1, 10**300).map(float), np.float64, narrow, Fraction.from_float
) | st.integers(1, 2**53)
rates = dressed(st.floats(5e-324, 1.0), np.float64, Fraction.from_float) | st.sampled_from(
    [1, np.int64(1), np.True_ + 0]
)
counts = dressed(st.integers(1, 2**63 - 1), np.int64, np.uint64)
sampled = st.builds(PoissonSampledGaussian, sample_rate=rates, noise_multiplier=positive, steps=counts)
decays = st.lists(st.floats(1e-300, 1.0, exclude_max=True) | st.just(np.float64(0.5)), min_size=1, max_size=3)
strategies = (
    st.just(Tree())
    | st.lists(st.floats(0, 1e300) | st.integers(0, 9), max_size=3).map(lambda rest: Banded([1, *rest]))  # type: ignore[arg-type]
    | decays.map(lambda found: Buffered(found, [0] * len(found)))  # type: ignore[arg-type]
)
correlated = st.builds(CorrelatedGaussian, strategy=strategies, noise=positive, steps=counts, number=counts)
searches = st.builds(
    Search,
    tries=st.lists(sampled | correlated, min_size=1, max_size=2),
    mean=st.integers(1, 500) | dressed(st.floats(1, 500), np.float64),
    shape=st.integers(0, 100) | dressed(st.floats(0, 100), np.float64),
)
releases = st.builds(
    ClientRelease,
    mechanism=st.sampled_from(["gaussian", "discrete_gaussian", "skellam"]),
    sensitivity_squared=counts,
    share_variance=positive,
    shares=counts,
    length=counts,
    steps=counts,
    settles=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(event=sampled | correlated | searches | releases)
def test_every_event_that_can_be_made_is_read_back_as_it_is(event: Event) -> None:
    content, head = lines(GENESIS, (event,))
    assert list(follow(content, DECODER)) == [(event, head)]


@settings(max_examples=25, deadline=None)
@given(events=st.lists(sampled | searches, min_size=1, max_size=4))
def test_a_ledger_of_such_events_is_read_back(events: list[Event], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("ledger") / "a.jsonl"
    ledger = Ledger(path)
    ledger.bind("a", 1e-5)
    for known, event in enumerate(events):
        ledger.append(event, after=known)
    assert list(Ledger(path).events) == events


BAD_NUMBERS = [
    True,
    np.True_,
    "1",
    "0.5",
    math.nan,
    math.inf,
    -math.inf,
    None,
    10**400,
    1j,
    [1.0],
    b"1",
    -1,
    Fraction(-1),
]
BAD_COUNTS = [True, "1", 1.5, 1.0, np.float64(2), 0, -3, 2**63, math.nan, None, Fraction(3, 2)]
GOOD = {
    PoissonSampledGaussian: {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 10},
    CorrelatedGaussian: {"strategy": Tree(), "noise": 1.0, "steps": 10, "number": 1},
    Search: {
        "tries": (PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.0, steps=10),),
        "mean": 2.0,
        "shape": 1.0,
    },
    ClientRelease: {
        "mechanism": "gaussian",
        "sensitivity_squared": 1,
        "share_variance": 1.0,
        "shares": 1,
        "length": 1,
        "steps": 1,
        "settles": False,
    },
}
NUMBERS = ("sample_rate", "noise_multiplier", "noise", "mean", "shape", "share_variance")


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in GOOD.items() for field in fields])
def test_what_is_no_number_of_that_kind_is_refused_by_name(kind: Any, field: str) -> None:
    kind(**GOOD[kind])
    other = [None, 3, "tree", (), ("x",)]
    for bad in BAD_NUMBERS if field in NUMBERS else BAD_COUNTS if isinstance(GOOD[kind][field], int) else other:
        if field == "settles" and bad is True:
            continue
        with pytest.raises(ConfigError, match=field):
            kind(**{**GOOD[kind], field: bad})


def test_the_line_of_the_guide_for_a_search_leaves_a_ledger_that_can_be_read(tmp_path: Path) -> None:
    """A whole number for the mean number of tries, as anybody writes it."""
    path = tmp_path / "data.jsonl"
    privacy = Privacy(epsilon=3.0, delta=1e-5, epochs=2, ledger=path)
    found = private_search(privacy, [0.01, 0.1], lambda rate, _: (rate, rate), records=600, batch_size=60, mean=10)
    assert found is not None
    (event,) = Ledger(path).events
    assert isinstance(event, Search)
    assert (event.mean, type(event.mean)) == (10.0, float)
    assert privacy.spent().epsilon == Ledger(path).epsilon(1e-5)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_what_could_not_be_read_back_is_refused_and_nothing_is_written(tmp_path: Path, where: str) -> None:
    """An event that was tampered with after it was made, a holder that is no Unicode, something that is no event."""
    path = None if where == "memory" else tmp_path / "a.jsonl"
    event = PoissonSampledGaussian(sample_rate=0.5, noise_multiplier=2.0, steps=3)
    for field, value in (("noise_multiplier", 2), ("sample_rate", math.nan), ("steps", 3.0), ("steps", np.int64(3))):
        bent = msgspec.structs.replace(event)
        msgspec.structs.force_setattr(bent, field, value)
        for known in (0, 1):
            ledger = Ledger(path)
            ledger.bind("a", 1e-5)
            if known:
                ledger.append(event, after=0)
            with pytest.raises(LedgerError, match="read back"):
                ledger.append(bent, after=known)
            assert ledger.events == (event,) * known
            if path is not None:
                assert path.exists() == bool(known)
                path.unlink(missing_ok=True)
    ledger = Ledger(path)
    ledger.bind("\ud800", 1e-5)
    with pytest.raises(LedgerError, match="read back"):
        ledger.append(event, after=0)
    with pytest.raises(LedgerError, match="no event"):
        ledger.append({"sample_rate": 0.5}, after=0)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_delta_of_another_type_is_the_same_delta(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ledger = Ledger(path)
    ledger.bind("a", Fraction(1, 1024))  # type: ignore[arg-type]
    ledger.append(PoissonSampledGaussian(sample_rate=1, noise_multiplier=3, steps=2), after=0)
    assert (Ledger(path).delta, Ledger(path).events[0].sample_rate) == (1 / 1024, 1.0)
    for bad in (0, 1, math.nan, "1e-5", True):
        with pytest.raises(ConfigError, match="delta"):
            Ledger().bind("a", bad)  # type: ignore[arg-type]
    for holder in ("", 3, None):
        with pytest.raises(ConfigError, match="holder"):
            Ledger().bind(holder, 1e-5)  # type: ignore[arg-type]


class Note(msgspec.Struct):
    value: float = 0.0
    text: str = ""
    more: Any = None


@pytest.mark.parametrize(
    "bad",
    [
        Note(math.nan),
        Note(math.inf),
        Note(text="\ud800"),
        Note("x"),
        Note(more=type("Odd", (), {"__repr__": lambda self: "odd"})()),
        Note(more={"a": math.nan}),
    ],  # type: ignore[arg-type]
    ids=repr,
)
def test_an_object_that_json_does_not_hold_is_not_encoded(bad: Note) -> None:
    with pytest.raises(UnreadableError, match="read back"):
        encoded(bad)


def test_a_whole_number_for_a_decimal_one_is_encoded_only_where_no_digest_is_made() -> None:
    assert encoded(Note(1)) == b'{"value":1,"text":"","more":null}'
    with pytest.raises(UnreadableError, match="read back"):
        encoded(Note(1), hashed=True)
