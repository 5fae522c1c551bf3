"""Statistics of all parties' records, from one sum of integers that nobody sees a party's share of.

    found = federated_statistics(
        parties,                                                # name -> columns
        {"age": Mean(0, 120), "stay": Histogram([0, 1, 7, 30]), "visits": Quantiles((0.25, 0.5, 0.75), 0, 400)},
        privacy=Privacy(epsilon=0.5, delta=1e-6, noise="distributed"),
        secure_sum=Masked(),
        ledgers="ledgers/",
    )
    found["age"]["mean"]          # Estimated(value=..., noise=..., sampling=...)

Bounds, edges and values are public inputs; the least and the largest value of a column are never computed. All
statistics are one vector and so one release: one Gaussian mechanism, whose sensitivity is shared out among them by
their weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from choral.errors import ConfigError, DataError
from choral.privacy import AdaptiveClip, ClientPrivacy, Ledger, Privacy, Spent
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.client_level.client import HOLDER
from choral.privacy.ledgers.ledger import as_ledger
from choral.privacy.ledgers.memory_notice import notice_memory
from choral.privacy.ledgers.spending import spent_by_clients, spent_by_records
from choral.protocols.interface import SecureSum
from choral.trainers.analytics.columns import columns_of
from choral.trainers.analytics.estimates import UNKNOWN, false_publication
from choral.trainers.analytics.part import Packing, Statistic
from choral.trainers.analytics.releases import OpenedSums, StatisticsRelease, contributes
from choral.trainers.analytics.result import FederatedStatistics
from choral.trainers.federated.checks import secure_sum_named
from choral.trainers.run_folder.folder import ledger_file
from choral.trainers.task import arguments

_FEW = 5
_VALUE_BITS = 20  # of a column's range


def federated_statistics(
    parties: Mapping[str, Any],
    statistics: Mapping[str, Statistic],
    *,
    privacy: Privacy | ClientPrivacy | None = None,
    secure_sum: SecureSum | str | None = None,
    ledgers: str | Path | Mapping[str, Ledger] | None = None,
    contributors: int | None = None,
    threshold: float | None = None,
) -> FederatedStatistics:
    """Compute statistics over parties that keep their records, in one secure sum.

    parties: name -> records: a mapping of columns, a data frame, or a TensorDataset of features and labels. At least
        two. NaN is a missing value. How many records each has is public.
    statistics: name -> what is wanted: ``Count``, ``Mean``, ``Covariance``, ``Histogram``, ``Categories``, ``Table``,
        ``Quantiles``. Its column is that name, unless it says another.
    privacy: ``Privacy(..., noise="distributed")``: for each record, in shares; ``ClientPrivacy(...)``: for each party
        with all its records, where ``clip`` is in records; None: exact, and then whoever sees the result knows it.
    secure_sum: as in ``federate``; by default ``Plain()``, where the server sees each party's vector.
    ledgers: what remembers what each party's records have spent: a folder (NAME.jsonl), or a ledger for each party; of
        clients a folder (clients.jsonl) or ``ClientPrivacy(ledger=...)``. A training on the same ledgers composes.
    contributors: without noise, leave out each cell, and each statistic that has none, to which fewer parties
        contribute. How many contribute to each is counted first, and is a release of its own.
    threshold: with noise, leave out each cell of a histogram, of categories or of a table whose noisy count of records
        is below it: post-processing, which costs nothing. The result says how often a cell of one contributor passes.

    Guarantee: of one Gaussian mechanism (record_shares), or of ClientPrivacy, for all statistics together.
    Raises: ConfigError, DataError; BudgetExceededError, LedgerError (nothing was sent); ProtocolError.
    """
    check(parties, statistics, privacy, contributors)
    release = _release(parties, statistics, secure_sum_named(secure_sum), noisy=privacy is not None)
    most = check_threshold(threshold, privacy, release.packing, max(release.records.values()))
    spent: dict[str, Spent] = {}
    if privacy is None:
        opened = release.exactly(contributors)
    elif isinstance(privacy, Privacy):
        kept, person = ledgers_of(ledgers, release.names), privacy.records_per_person
        opened = release.for_records(privacy, kept)
        spent = {name: spent_by_records(ledger, privacy.delta, person) for name, ledger in kept.items()}
    else:
        ledger = _clients_ledger(privacy, ledgers)
        opened = release.for_clients(privacy, ledger)
        spent = {HOLDER: spent_by_clients(ledger, privacy.delta)}
    found = FederatedStatistics(
        estimates=release.packing.read(opened.total, opened.noise),
        claim=_claim(privacy, opened, release, spent),
        releases=(*_releases(opened, contributors), *_shown(release, privacy, contributors)),
        survivors=opened.survivors,
        parties=len(parties),
        spent=spent,
        secure_sum=release.secure_sum.name,
        left_out=opened.left_out,
        bytes_up=opened.traffic[0],
        bytes_down=opened.traffic[1],
    )
    return found if threshold is None else above(threshold, most, found, release.packing, opened)


def of_sites(
    packing: Packing,
    opened: OpenedSums,
    privacy: Privacy | None,
    *,
    parties: int,
    contributors: int | None,
    threshold: float | None = None,
) -> FederatedStatistics:
    """The result of parties at their own sites, whose ledgers are theirs. opened: by their coordinator."""
    if privacy is None:
        claim = "Exact, without noise: no differential privacy, whoever sees the totals learns them."
    else:
        claim = (
            f"Differentially private for each record ({privacy.neighbours}), against the server and whoever sees the"
            f" result, with what up to {privacy.colluders} of the sites know: epsilon {privacy.epsilon:g} at delta"
            f" {privacy.delta:g}. What each site's data has spent in all, its own ledger says."
        )
    most = check_threshold(threshold, privacy, packing, None)
    name, corrupt = opened.statement["name"], opened.statement["corrupt"]
    word = "" if contributors is None else " That rests on the coordinator, who tells the sites the counts."
    found = FederatedStatistics(
        estimates=packing.read(opened.total, opened.noise),
        claim=f"{claim} The sites' vectors were hidden by a {name} sum that withstands {corrupt} corrupt sites.",
        releases=tuple(f"{each}{word}" for each in _releases(opened, contributors)),
        survivors=opened.survivors,
        parties=parties,
        spent={},
        secure_sum=str(name),
        left_out=opened.left_out,
        bytes_up=opened.traffic[0],
        bytes_down=opened.traffic[1],
    )
    return found if threshold is None else above(threshold, most, found, packing, opened)


def above(
    threshold: float,
    most: Mapping[str, float],
    found: FederatedStatistics,
    packing: Packing,
    opened: OpenedSums,
) -> FederatedStatistics:
    """Leave out the cells whose noisy count is below the threshold. most: what one contributor counts in a cell of each
    statistic.
    """
    estimates, chances = dict(found.estimates), dict[str, float]()
    cells, few = 0, 0
    for name, part in packing.parts.items():
        at = packing.places[name]
        if (judged := part.below(opened.total[at], threshold)) is None:
            continue
        count, hidden = judged
        estimates[name] = {**estimates[name], **dict.fromkeys(hidden, UNKNOWN)}
        chances[name] = false_publication(threshold, most[name], float(opened.noise[at][0]))
        cells, few = cells + count, few + len(hidden) // 2
    worst = max(chances.values(), default=0.0)
    said = (
        f"Left out: {few} of {cells} cells, whose count with noise is below {threshold:g}. A cell that has one"
        f" contributor alone is shown with a probability of about {worst:.2g}. That is no part of epsilon and delta,"
        " which hold for every cell whether it is shown or not."
    )
    return replace(
        found,
        estimates=estimates,
        releases=(*found.releases, said),
        left_out=few,
        threshold=threshold,
        false_publication=chances,
    )


def _release(
    parties: Mapping[str, Any], statistics: Mapping[str, Statistic], secure_sum: SecureSum, *, noisy: bool
) -> StatisticsRelease:
    """What is to be opened: the parties' records as packed integers. Raises: ConfigError, DataError."""
    wanted = frozenset(column for name, each in statistics.items() for column in each.columns(name))
    tables = {name: columns_of(data, name, wanted) for name, data in parties.items()}
    records = {name: len(next(iter(table.values()))) for name, table in tables.items()}
    for name, count in records.items():
        if count < 1:
            raise DataError(f"{name} has no records", hint="leave it out: how many a party has is public anyway")
    packing = packing_of(statistics, sum(records.values()), noisy=noisy)
    return StatisticsRelease(
        packing=packing,
        vectors={name: packing.sums(table) for name, table in tables.items()},
        records=records,
        secure_sum=secure_sum,
        digest=hashlib.sha256(repr(dict(statistics)).encode()).digest(),
    )


def packing_of(statistics: Mapping[str, Statistic], records: int, *, noisy: bool) -> Packing:
    """Return the plan of the one vector. records: of all parties, a public number: sums of squares have 62 bits.

    Raises: ConfigError.
    """
    room = (61 - records.bit_length()) // 2
    bits = min(_VALUE_BITS, room + 1)
    parts = {name: each.part(name, bits, noisy=noisy) for name, each in statistics.items()}
    return Packing(parts, {name: float(each.weight) for name, each in statistics.items()})


def check(parties: Any, statistics: Any, privacy: Privacy | ClientPrivacy | None, contributors: int | None) -> None:
    """Raises: ConfigError for arguments of another type, or that do not go together."""
    arguments.instance(parties, "parties", Mapping, "name -> columns")
    arguments.instance(statistics, "statistics", Mapping, 'such as {"age": Mean(0, 120)}')
    if len(parties) < 2:
        raise ConfigError(f"there are {len(parties)} parties, expected at least two", hint="one party's sum is its own")
    if not statistics:
        raise ConfigError("no statistics were asked for", hint='such as {"age": Mean(0, 120)}')
    for name, each in statistics.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a statistic is named {arguments.shown(name)}, expected a text")
        arguments.instance(each, f"statistic {name!r}", Statistic, "Mean(0, 120), Histogram([...]), ...")
        each.check_weight()
    if privacy is not None:
        arguments.instance(privacy, "privacy", (Privacy, ClientPrivacy), "or None, for exact statistics")
    if isinstance(privacy, Privacy) and privacy.noise != "distributed":
        raise ConfigError(
            f'statistics with Privacy(noise="{privacy.noise}")',
            hint='Privacy(..., noise="distributed") adds shares of the noise inside the secure sum',
        )
    if contributors is None:
        return
    arguments.whole_number(contributors, "contributors", 2, "how many parties a cell needs, such as 5")
    if privacy is not None:
        raise ConfigError(
            "contributors with noise: the cells are public, and whether a record is in one is what the noise hides",
            hint="threshold=... leaves out cells whose noisy count is small, which is post-processing, with no delta",
        )
    if contributors > len(parties):
        raise ConfigError(f"contributors is {contributors} of {len(parties)} parties: nothing would be left")


def check_threshold(
    threshold: float | None, privacy: Privacy | ClientPrivacy | None, packing: Packing, records: int | None
) -> dict[str, float]:
    """Return how much one contributor counts at most in a cell of each statistic. records: of the largest party.

    Of a promise for records, that is a person with all of its records; for clients, a client after it was clipped.
    Raises: ConfigError for a threshold without noise, or one that a contributor alone would reach without any.
    """
    if threshold is None:
        return {}
    arguments.number(threshold, "threshold", "records that a cell needs with noise, such as 30")
    if privacy is None:
        raise ConfigError(
            "threshold without noise: whoever sees the exact counts sees the small ones too",
            hint="contributors=... has the parties leave out what few of them contribute to",
        )
    most: dict[str, float] = {}
    for name, at in packing.places.items():
        if isinstance(privacy, Privacy):
            most[name] = float(privacy.records_per_person or 1)
        else:  # all of its norm may be in one cell
            clip = math.inf if isinstance(privacy.clip, AdaptiveClip) else privacy.clip
            most[name] = min(clip * float(packing.unit[at].max()), float(records or math.inf))
    cells = [most[name] for name, part in packing.parts.items() if part.below(np.zeros(part.length), 0.0) is not None]
    if not cells:
        raise ConfigError("threshold without a histogram, categories or a table: there are no cells to leave out")
    if not max(cells) < threshold < math.inf:
        raise ConfigError(
            f"threshold is {threshold:g}, and one contributor alone may count {max(cells):g} in a cell",
            hint="that number and four standard errors of a count: then one in 30,000 such cells is shown",
        )
    return most


def ledgers_of(given: str | Path | Mapping[str, Ledger] | None, names: tuple[str, ...]) -> dict[str, Ledger]:
    """Return each party's ledger. Raises: ConfigError for a mapping that lacks a party; LedgerError."""
    if isinstance(given, Mapping):
        missing = [name for name in names if not isinstance(given.get(name), Ledger)]
        if missing:
            raise ConfigError(f"ledgers has no Ledger for {missing[0]!r:.80}", hint="one for each party, or a folder")
        return {name: given[name] for name in names}
    if given is None:
        notice_memory(Ledger(), "ledgers=FOLDER")
        return {name: Ledger(holder=name) for name in names}
    return {name: Ledger(ledger_file(_folder(given), name), holder=name) for name in names}


def _folder(given: str | Path) -> Path:
    folder = Path(given)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _clients_ledger(privacy: ClientPrivacy, given: Any) -> Ledger:
    if isinstance(given, Mapping):
        raise ConfigError(
            "a ledger for each party, and a promise for clients: one ledger counts for all of them",
            hint="ClientPrivacy(ledger=FILE), or ledgers=FOLDER",
        )
    own = privacy.ledger is not None
    ledger = as_ledger(privacy.ledger) if own or given is None else Ledger(ledger_file(_folder(given), HOLDER))
    notice_memory(ledger, "ClientPrivacy(ledger=FILE), or ledgers=FOLDER,")
    return ledger


def _claim(
    privacy: Privacy | ClientPrivacy | None, opened: OpenedSums, release: StatisticsRelease, spent: Mapping[str, Spent]
) -> str:
    """What is promised to whom, in words."""
    rehearsal = "Rehearsal: all parties were played by one process."
    trust = str(opened.statement.get("trust", ""))
    if privacy is None:
        return (
            f"Exact, without noise: no differential privacy, whoever sees the totals learns them. {trust} {rehearsal}"
        )
    worst = max(spent.values(), key=lambda each: each.epsilon)
    who = "whoever sees the result" if release.secure_sum.name == "plain" else "the server and whoever sees the result"
    if privacy.noise == "distributed":
        who += f", with what up to {privacy.colluders} of the parties know"
    said = (
        f"Differentially private for each {worst.unit} ({worst.neighbours}), against {who}: {worst.in_words}, all that"
        " the ledgers hold counted."
    )
    if isinstance(privacy, Privacy) and privacy.records_per_person is not None:
        said += f" {_for_a_person(privacy, spent)}"
    return f"{said} {trust} {rehearsal}"


def _for_a_person(privacy: Privacy, spent: Mapping[str, Spent]) -> str:
    """What holds for all records of a person: of a Gaussian mechanism without sampling, k times the sensitivity."""
    worst = max(spent.values(), key=lambda each: each.epsilon)
    people = privacy.records_per_person or 1
    if worst.steps != 1:
        return f"For the {people} records of a person together: epsilon {worst.person_epsilon:.4g}."
    event = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=worst.noise_multiplier / people, steps=1)
    epsilon = record_level.epsilon([event], privacy.delta / 2.0, neighbours=privacy.neighbours)
    return (
        f"For up to {people} records of one person together: epsilon {epsilon:.4g} at delta {privacy.delta:g}, since"
        " noise and records add up as one Gaussian mechanism."
    )


def _shown(release: StatisticsRelease, privacy: Any, contributors: int | None) -> tuple[str, ...]:
    """What exact totals give away of single parties, as one process that plays them all can count it."""
    if privacy is not None or contributors is not None:
        return ()
    cells = np.concatenate([np.full(part.length, part.cells) for part in release.packing.parts.values()])
    counts = np.sum([contributes(release.packing, vector) for vector in release.vectors.values()], axis=0)[cells]
    few = int(((counts > 0) & (counts < _FEW)).sum())
    if not few:
        return ()
    return (
        f"Of {int((counts > 0).sum())} cells that are not empty, {int((counts == 1).sum())} are one party's alone and"
        f" {few} of fewer than {_FEW} parties: there the total is theirs. contributors={_FEW} leaves them out.",
    )


def _releases(opened: OpenedSums, contributors: int | None) -> tuple[str, ...]:
    if contributors is None:
        return ()
    return (
        f"Also released, without noise: how many parties contribute to each cell. {opened.left_out} coordinates were"
        f" left out by the parties, where fewer than {contributors} contribute, or to keep those from being computed.",
    )
