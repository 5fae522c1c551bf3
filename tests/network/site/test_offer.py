"""What a coordinator sends is an offer in every key and value, or none; its digest is of all of them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from site_folders import offer

from choral.network import Offer, OfferError


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
    assert len({offer(settings=settings).digest for settings in close}) == len(close)


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
    settings = {"a": [1]}
    made = offer(settings=settings)
    settings["a"].append(2)
    assert made.settings == {"a": [1]}
