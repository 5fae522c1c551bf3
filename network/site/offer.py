"""What a coordinator proposes, as a record with a digest. A site agrees to a digest, so to every word of it.

An offer is data: nothing in it is imported or executed, and a site's limits are in none of its fields. Training code is
named, by a file that the site has installed, and its SHA-256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from choral.errors import ConfigError
from choral.network.errors import OfferError
from choral.network.site.files.settings import FILE
from choral.network.transport.certificates import NAME

LARGEST_OFFER = 1 << 20  # bytes; most of it are the names and shapes of the model's parameters
MOST_PARTIES = 10_000
IN_THE_CLEAR = "in the clear, no epsilon"
BY_ENGINE = "trained by the engine"
"""In the place of the code's SHA-256: an engine's process trains, by code that the coordinator ships."""
STATISTICS = "statistics"
"""In the place of the training code's name: none is run, and Choral computes statistics of a CSV file."""
METRICS = ("none", IN_THE_CLEAR)
"""What becomes known of the sites' own evaluations: nothing; or their sums, which no promise covers."""
DIGEST = re.compile(r"[0-9a-f]{64}")
_PURPOSE = b"choral offer 1\n"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A job as a coordinator proposes it.

    job: its name. coordinator: who proposes it. task: the training code: a file in the site's folder of tasks, or a
    task that comes with Choral. code: the SHA-256 of that file in hexadecimal; "choral VERSION" for a task that comes
    with it; `BY_ENGINE` where the site's process runs none, and is handed what an engine's process trained.
    settings: training, split, algorithm, privacy and participation as in the job file. terms: the record of the
    training terms that every party signs (`TrainingTerms.record`). secure_sum: its kind and settings. parties: who is
    asked, by name. metrics: what becomes known of the sites' own evaluations, one of `METRICS`.

    Raises: OfferError for a value of another type or out of range, or what JSON cannot say.
    """

    job: str
    coordinator: str
    task: str
    code: str
    settings: Mapping[str, Any]
    terms: Mapping[str, Any]
    secure_sum: Mapping[str, Any]
    parties: tuple[str, ...]
    metrics: str = "none"

    def __post_init__(self) -> None:
        for field, pattern in (("job", NAME), ("coordinator", NAME), ("task", FILE)):
            _check_text(getattr(self, field), field, pattern)
        if not isinstance(self.code, str) or not (DIGEST.fullmatch(self.code) or self.embedded or self.by_engine):
            raise OfferError(f"code: expected a SHA-256 in hexadecimal, 'choral VERSION' or {BY_ENGINE!r}")
        if not isinstance(self.parties, tuple) or not 2 <= len(self.parties) <= MOST_PARTIES:
            raise OfferError(f"parties: expected 2 to {MOST_PARTIES} names")
        for name in self.parties:
            _check_text(name, "parties", NAME)
        if len({name.lower() for name in self.parties}) != len(self.parties):
            raise OfferError("parties: a name is there twice")
        if self.metrics not in METRICS:
            raise OfferError(f"metrics: expected one of {', '.join(map(repr, METRICS))}")
        for field in ("settings", "terms", "secure_sum"):
            object.__setattr__(self, field, _plain(getattr(self, field), field))
        if len(self.message()) > LARGEST_OFFER:
            raise OfferError(f"an offer of {len(self.message())} bytes, expected at most {LARGEST_OFFER}")

    @property
    def embedded(self) -> bool:
        """Whether the training code is a task that comes with Choral, and no file."""
        return bool(re.fullmatch(r"choral [0-9A-Za-z.+-]{1,40}", self.code))

    @property
    def by_engine(self) -> bool:
        """Whether an engine's process trains, and the site's process runs no code for it."""
        return self.code == BY_ENGINE

    def message(self) -> bytes:
        """The offer as JSON; `read` gives it back."""
        return msgspec.json.encode({**vars_of(self), "parties": list(self.parties)}, order="deterministic")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the offer in hexadecimal: what is approved. Of its values, so not of spaces or the order of keys.

        Two offers that differ in a word differ in it.
        """
        return hashlib.sha256(_PURPOSE + self.message()).hexdigest()

    @classmethod
    def read(cls, raw: bytes | str) -> Offer:
        """The offer of a message or of a file.

        Raises: OfferError for more than 1 MiB, what is no JSON, a key that is missing, unknown or there twice, or a
            value of another type.
        """
        if len(raw) > LARGEST_OFFER:
            raise OfferError(f"an offer of more than {LARGEST_OFFER} bytes")
        try:
            found = _no_key_twice(raw)
        except (ValueError, RecursionError):
            raise OfferError("this is no offer: expected a JSON object, no key twice") from None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(found, dict) or set(found) != set(names):
            given = set(found) if isinstance(found, dict) else set()
            unknown, missing = sorted(given - set(names)), sorted(set(names) - given)
            raise OfferError(
                f"an offer with unknown keys {[f'{key:.40}' for key in unknown[:5]]} and without {missing}",
                hint="the coordinator may run another version of Choral",
            )
        if isinstance(parties := found["parties"], list):
            found["parties"] = tuple(parties)
        return cls(**found)


def vars_of(offer: Offer) -> dict[str, Any]:
    """The fields, by name."""
    return {field.name: getattr(offer, field.name) for field in dataclasses.fields(offer)}


def _check_text(value: object, what: str, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise OfferError(f"{what}: expected letters, digits, '.', '_' and '-', got {value!a:.80}")


def _plain(value: object, what: str) -> dict[str, Any]:
    """A mapping as JSON has it. Raises: OfferError for what would be another value when it is read."""
    if not isinstance(value, Mapping):
        raise OfferError(f"{what}: expected a table, got a {type(value).__name__}")
    try:
        plain = msgspec.to_builtins(dict(value), str_keys=False)
        again = msgspec.json.decode(msgspec.json.encode(plain))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise OfferError(f"{what}: cannot be said in JSON: {error}") from None
    if not alike(plain, again):
        raise OfferError(f"{what}: has a number that JSON cannot say, such as NaN")
    return again  # type: ignore[no-any-return]


def alike(given: Any, read: Any) -> bool:
    """Whether they are equal, a list and a tuple of the same being so, and 1 and 1.0 and True not."""
    if isinstance(given, list | tuple) and isinstance(read, list):
        return len(given) == len(read) and all(map(alike, given, read))
    if isinstance(given, dict) and isinstance(read, dict):
        return given.keys() == read.keys() and all(alike(given[key], read[key]) for key in given)
    return type(given) is type(read) and given == read


def _no_key_twice(raw: bytes | str) -> Any:
    """JSON decoded, none of whose objects has a key twice: two readers would take either."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key twice")
        return found

    def refused(word: str) -> Any:
        raise ValueError(word)  # NaN, Infinity: no JSON

    return json.loads(raw, object_pairs_hook=once, parse_constant=refused)


def check_digest(text: str) -> str:
    """Return `text`. Raises: ConfigError unless it is a digest, or at least 12 characters from its beginning."""
    if not re.fullmatch(r"[0-9a-f]{12,64}", text):
        raise ConfigError(
            f"{text!a:.80} is no digest: expected 64 characters of 0-9a-f, or the first 12 or more",
            hint="`choral site review` prints it",
        )
    return text
