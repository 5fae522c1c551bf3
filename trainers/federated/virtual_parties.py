"""Parties that cannot be held: too many to list, each made when it is first asked; or at places of their own.

What is known of all of them together (how many, their records in total, the most that one has) is declared, since
nobody looks. A virtual party is checked against it, and as any party is, when it is made; one that is elsewhere checks
itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, overload

import numpy as np

from choral.errors import ConfigError, DataError
from choral.privacy import ClientPrivacy, Privacy
from choral.trainers.federated.participation import Participation
from choral.trainers.run_folder.info import Population
from choral.trainers.task import arguments
from choral.trainers.task.task import check_parties, check_party

_PREFIX = "party-"
_SAMPLED = 1_000  # sizes, for the record
_SEATS = 1_024


class VirtualParties(Mapping[str, Any]):
    """A mapping from "party-0000000" on to datasets that are made on demand, for `federate` with a cohort.

    count: how many parties. make: ``make(number) -> dataset``, number from 0 to count - 1; it must make the same
        records whenever it is called for a number, which is once as long as the party is remembered: the last
        max(1024, 2 cohorts) that were asked are.
    examples: records of every party, or a quick function ``examples(number) -> int``.
    total, largest: records of all parties, and of the largest; only with ``examples`` as a function. ``total`` is for
        the record, and cannot be checked.

    It has a length and items, and refuses to be listed: what would touch every party raises ConfigError.
    Raises: ConfigError for numbers that cannot be; KeyError for a name that is none of its own.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[int], Any],
        examples: int | Callable[[int], int],
        *,
        total: int | None = None,
        largest: int | None = None,
    ) -> None:
        if callable(examples) == (total is None or largest is None) or (total is None) != (largest is None):
            raise ConfigError(
                "total and largest go with examples as a function, and only with one",
                hint="give examples=200, or examples=FUNCTION, total=..., largest=...",
            )
        if not callable(examples):
            total, largest = _whole(examples) * _whole(count), examples
        self.count, self.total, self.largest = _whole(count), _whole(total), _whole(largest)
        if self.count < 2 or self.largest < 1 or not self.count <= self.total <= self.count * self.largest:
            raise ConfigError(
                f"{count} parties of at most {largest} records with {total} in total cannot be",
                hint="at least 2 parties, each of at least one record",
            )
        self._make, self._examples = make, examples

    def examples_of(self, number: int) -> int:
        """The declared records of a party. Raises: DataError if they are not from 1 to `largest`."""
        said = self._examples(number) if callable(self._examples) else self._examples
        if not 1 <= (found := _whole(said)) <= self.largest:
            raise DataError(
                f"party {self.name_of(number)!r} is said to have {said!r} records, expected 1 to {self.largest}",
                hint="give the largest count of all as largest=",
            )
        return found

    def name_of(self, number: int) -> str:
        return f"{_PREFIX}{number:07d}"

    def number_of(self, name: str) -> int:
        """Raises: KeyError for a name that is none of its own."""
        digits = name.removeprefix(_PREFIX) if isinstance(name, str) else ""
        number = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else -1
        if not 0 <= number < self.count or self.name_of(number) != name:
            raise KeyError(name)
        return number

    def __getitem__(self, name: str) -> Any:
        return self._make(self.number_of(name))

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self.number_of(name) >= 0
        except KeyError:
            return False

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        _refuse_listing()

    def population(self) -> Population:
        """For the record. Raises: DataError for a declared size that cannot be, among those that are sampled."""
        sampled = [self.examples_of(number) for number in range(0, self.count, -(-self.count // _SAMPLED))]
        at = {"0.05": 0.05, "0.5": 0.5, "0.95": 0.95}
        return Population(
            parties=self.count,
            examples=self.total,
            largest=self.largest,
            sampled=len(sampled),
            quantiles={name: float(np.quantile(sampled, share)) for name, share in at.items()},
        )


def _whole(number: Any) -> int:
    """A whole number as an int, numpy's included; -1 for anything else, which is out of every range here."""
    try:
        return -1 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return -1


def _refuse_listing() -> NoReturn:
    raise ConfigError(
        "virtual parties are made on demand, and what was asked for would touch every one of them",
        hint="use them in federate with Participation(cohort=n) alone; for anything else give a dict of datasets",
    )


class _Names(Sequence[str]):
    def __init__(self, parties: VirtualParties) -> None:
        self._parties = parties

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        if isinstance(at, slice):
            return tuple(map(self._parties.name_of, range(len(self))[at]))
        return self._parties.name_of(range(len(self))[at])

    def __len__(self) -> int:
        return len(self._parties)

    def __iter__(self) -> Iterator[str]:
        _refuse_listing()


class _Sizes(Mapping[str, int]):
    def __init__(self, parties: VirtualParties) -> None:
        self._parties = parties

    def __getitem__(self, name: str) -> int:
        return self._parties.examples_of(self._parties.number_of(name))

    def __len__(self) -> int:
        return len(self._parties)

    def __iter__(self) -> Iterator[str]:
        _refuse_listing()


class _Checked(Mapping[str, Any]):
    """The datasets, each checked as it is made."""

    def __init__(self, parties: VirtualParties, min_classes: int) -> None:
        self._parties, self._min_classes = parties, min_classes

    def __getitem__(self, name: str) -> Any:
        declared, dataset = self._parties.examples_of(self._parties.number_of(name)), self._parties[name]
        found = check_party(name, dataset, self._min_classes)
        if found != declared:
            raise DataError(
                f"party {name!r} has {found} records, but is said to have {declared}",
                hint="examples must tell the truth",
            )
        return dataset

    def __len__(self) -> int:
        return len(self._parties)

    def __iter__(self) -> Iterator[str]:
        _refuse_listing()


@dataclass(frozen=True, eq=False)
class DistantParties(Mapping[str, Any]):
    """Their names; for each of them, the example that the server builds the model from.

    records: of all parties together; largest: that one of them may have. Both are agreed on, and never counted.
    example: a data set of the parties' kind without a record of theirs, such as a public one.

    Raises: ConfigError for numbers that cannot be.
    """

    names: tuple[str, ...]
    records: int
    largest: int
    example: Any

    def __post_init__(self) -> None:
        for name in ("records", "largest"):
            number = arguments.whole_number(getattr(self, name), name, 1, "as was agreed on, whatever a party has")
            object.__setattr__(self, name, number)
        if len(self.names) < 2 or not len(self.names) <= self.records <= len(self.names) * self.largest:
            raise ConfigError(
                f"{len(self.names)} parties of at most {self.largest} records with {self.records} in total cannot be",
                hint="at least 2 parties, each of at least one record",
            )

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.example

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Census(NamedTuple):
    """What a federation knows of its parties before the first round.

    names, examples, datasets: of every party, for those who ask. total, largest: records of all, and of the largest.
    population: for the record, where parties are not listed. seats: how many may stay resident, None for all.
    """

    names: Sequence[str]
    examples: Mapping[str, int]
    datasets: Mapping[str, Any]
    total: int
    largest: int
    population: Population | None = None
    seats: int | None = None


def _distant(parties: DistantParties) -> Census:
    """Of parties elsewhere: as was agreed on."""
    declared = Population(
        parties=len(parties), examples=parties.records, largest=parties.largest, sampled=0, quantiles={}
    )
    most = dict.fromkeys(parties.names, parties.largest)
    return Census(parties.names, most, parties, parties.records, parties.largest, declared)


def census_of(
    parties: Mapping[str, Any],
    *,
    participation: Participation,
    privacy: Privacy | ClientPrivacy | None,
    min_classes: int,
) -> Census:
    """Look at all parties, or take the word of virtual ones.

    Raises: what check_parties does; ConfigError for virtual parties without a cohort or with record-level privacy.
    """
    if isinstance(parties, DistantParties):
        return _distant(parties)
    if not isinstance(parties, VirtualParties):
        examples = check_parties(parties, least=2, min_classes=min_classes)
        return Census(tuple(parties), examples, parties, sum(examples.values()), max(examples.values()))
    if participation.cohort is None and participation.rate is None:
        raise ConfigError("virtual parties need a cohort: all of them cannot be asked", hint="e.g. cohort=100")
    if privacy is not None and not isinstance(privacy, ClientPrivacy):
        raise ConfigError(
            "record-level Privacy keeps a ledger and a budget for every party, which virtual parties have not",
            hint="use ClientPrivacy, which keeps one for all; or a dict of datasets",
        )
    return Census(
        _Names(parties),
        _Sizes(parties),
        _Checked(parties, min_classes),
        parties.total,
        parties.largest,
        parties.population(),
        max(_SEATS, 2 * participation.expected(len(parties))),
    )
