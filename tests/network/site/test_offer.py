"""What a coordinator sends is an offer in every key and value, or none; its digest is of all of them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from site_folders import make_sites, offer, terms

from choral.network import Offer, OfferError, SiteFolder
from choral.network.site.objections import objections
from choral.network.site.offer import alike
from choral.network.site.terms import sum_of, sum_record, terms_of
from choral.privacy import ClientPrivacy, CorrelatedPrivacy, Privacy, SharesTerms, plan_shares
from choral.trainers import FedSGD


def test_an_offer_is_read_as_it_was_made() -> None:
    assert Offer.read(offer().message()) == offer()
    assert Offer.read(offer().message()).digest == offer().digest


def test_spaces_and_the_order_of_keys_do_not_change_the_digest() -> None:
    again = json.dumps(dict(reversed(json.loads(offer().message()).items())), indent=2)
    assert Offer.read(again).digest == offer().digest


def test_each_word_changes_the_digest() -> None:
    fields = {field.name for field in dataclasses.fields(Offer)}
    others: dict[str, Any] = {
        "job": "other", "coordinator": "other", "task": "other.py", "code": "1" * 64, "settings": {"a": 1},
        "terms": {"a": 1}, "secure_sum": {"a": 1}, "parties": ("south", "north", "east", "west"),
        "metrics": "in the clear, no epsilon",
    }  # fmt: skip
    assert set(others) == fields
    digests = {dataclasses.replace(offer(), **{name: value}).digest for name, value in others.items()}
    assert len(digests | {offer().digest}) == len(fields) + 1
    close = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": [1]}, {"a": None}, {}]
    assert len({offer(settings=each).digest for each in close}) == len(close)


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(offer().message()), **fields}).encode()


NONE = {
    "no JSON": b"\x80",
    "a list": b"[]",
    "a key twice": offer().message()[:-1] + b',"job":"other"}',
    "a key twice within": changed().replace(b'"kind": "masked"', b'"kind": "masked", "kind": "plain"'),
    "an unknown key": changed(more=1),
    "a missing key": b'{"job": "a"}',
    "NaN": changed(settings={"a": float("nan")}),
    "a number beyond floats": changed().replace(b'"batch_size": 20', b'"batch_size": 1e999'),
    "deep": b'{"a":' * 100_000,
    "too long": changed(settings={"a": "x" * (1 << 20)}),
    "a path": changed(task="../site.toml"),
    "a hidden file": changed(task=".key"),
    "a job with a slash": changed(job="a/b"),
    "no digest": changed(code="abc"),
    "one party": changed(parties=["north"]),
    "a name twice": changed(parties=["north", "North"]),
    "parties as text": changed(parties="north"),
    "a party that is a number": changed(parties=["north", 1]),
    "terms as text": changed(terms="x"),
    "other metrics": changed(metrics="all"),
    "metrics as a list": changed(metrics=["none"]),
}


@pytest.mark.parametrize("what", NONE)
def test_what_is_no_offer_is_refused(what: str) -> None:
    with pytest.raises(OfferError):
        Offer.read(NONE[what])


def test_an_offer_holds_its_own_copy() -> None:
    given_settings = {"a": [1]}
    made = offer(settings=given_settings)
    given_settings["a"].append(2)
    assert made.settings == {"a": [1]}


# ------------------------------------------------------------------------------------------------------- hostile terms

numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.just(10**400), st.just(-1))
values = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.just([]), st.just({}), st.just([[1]]))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a record, by the keys that lead there."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        found += places(part, (*path, key))
    return found


def put(record: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value


RECORDS = [
    terms(), terms(privacy=ClientPrivacy(1.0, 1e-5)), terms(privacy=None),
    terms(algorithm=FedSGD(), privacy=Privacy(1.0, 1e-5, noise="distributed"), shares=plan_shares(
        Privacy(1.0, 1e-5, noise="distributed"),
        SharesTerms(records=800, batch_size=64, steps=20, parties=4, min_survivors=3, length=7, most_records=256),
    )),
    terms(
        algorithm=FedSGD(),
        privacy=CorrelatedPrivacy(1.0, 1e-5, mechanism="banded", bands=3, noise="distributed"),
        shares=plan_shares(
            CorrelatedPrivacy(1.0, 1e-5, mechanism="banded", bands=3, noise="distributed"),
            SharesTerms(records=800, batch_size=64, steps=20, parties=4, min_survivors=3, length=7, most_records=256),
        ),
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory) -> SiteFolder:
    return make_sites(tmp_path_factory.mktemp("hostile")).north


@pytest.mark.parametrize("which", range(len(RECORDS)))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_terms_are_read_as_they_are_written_or_refused(north: SiteFolder, which: int, data: st.DataObject) -> None:
    """Whatever stands in one place of them. What is read says the very same again: nothing is dropped or guessed; and
    a site's objections to it are words, never an error.
    """
    record = json.loads(json.dumps(RECORDS[which].record()))
    path = data.draw(st.sampled_from(places(record)))
    put(record, path, data.draw(values))
    assert all(
        isinstance(reason, str) for reason in objections(north, offer(terms=terms(), record=record), budget=False)
    )
    try:
        found = terms_of(record)
    except OfferError:
        return
    assert alike(record, json.loads(json.dumps(found.record())))


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["plain", "masked", "homomorphic"]), field=st.text(max_size=12), value=values)
@example(kind="masked", field="corrupt", value=0.5)
@example(kind="masked", field="min_survivors", value=True)
@example(kind="homomorphic", field="key", value="shared")
def test_sums_are_read_as_they_are_written_or_refused(kind: str, field: str, value: Any) -> None:
    record = {"kind": kind, field: value} if field else {"kind": kind}
    try:
        made = sum_of(record)
    except OfferError:
        return
    assert sum_record(made).items() >= record.items()
