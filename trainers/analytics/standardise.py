"""Means and deviations for the standardisation of a training, paid for from the training's own budget and ledgers.

They and the training are fixed together before either: one plan stands on each ledger, of one sum with noise and of all
passes that follow, priced as one (:mod:`choral.privacy.dpsgd.joint_plan`). Without a promise they are exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, Ledger, Privacy
from choral.privacy.accounting.events import PlannedEvents, PoissonSampledGaussian, RecordEvent, ReleasePlan
from choral.privacy.accounting.record_noise import noise_multiplier
from choral.privacy.dpsgd.joint_plan import joint_plan
from choral.privacy.noise.gaussian import grid_gaussian, noise_grid, os_stream
from choral.privacy.record_shares.plan import plan_shares
from choral.protocols import Grouped, Masked
from choral.protocols.interface import SecureSum
from choral.trainers.analytics.columns import columns_of
from choral.trainers.analytics.estimates import Estimated
from choral.trainers.analytics.federated_statistics import packing_of
from choral.trainers.analytics.part import Packing
from choral.trainers.analytics.releases import StatisticsRelease
from choral.trainers.analytics.scales import Scales
from choral.trainers.data.standardised import Standardisation, bounds_of_features
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.record_shares.checks import in_shares
from choral.trainers.federated.record_shares.ledgers import shares_terms
from choral.trainers.run_folder.folder import ledger_file
from choral.trainers.task.flat_vector import Layout
from choral.trainers.task.seeding import seeded
from choral.trainers.task.task import Built, Task, checked_build

NAME = "scales"
POOLED = "pooled"


def standardisation(plan: Plan, *, share: float, ledgers: Path) -> Standardisation:
    """Compute it over the parties of a federation that is still to begin. share: of the promise's epsilon.

    ledgers: the folder of the training's ledgers, in which the plan of both is written first.
    Guarantee: of a promise for records, both together keep it. Unit, neighbours: the promise's.
    Raises: ConfigError for a promise to clients, parties made on demand, features without bounds; DataError;
        BudgetExceededError, LedgerError (nothing was sent); what the sum raises.
    """
    privacy = plan.privacy
    refuse_clients(privacy)
    if plan.census.population:
        raise ConfigError("data.standardise over parties that are made on demand", hint="name the parties")
    release = _release(plan.task, plan.parties, _plain_sum(plan.secure_sum), noisy=privacy is not None)
    if privacy is None or isinstance(privacy, ClientPrivacy):
        return read(plan.task, release.packing, release.exactly().total)
    first = first_promise(privacy, share, colluders=privacy.colluders if in_shares(privacy) else 1)
    opened_ledgers = {name: Ledger(ledger_file(ledgers, name), holder=name) for name in release.names}
    follows = _in_shares(plan) if in_shares(privacy) else _local(plan, opened_ledgers)
    event = release.shares_plan(first).event
    wholes = {name: follows(name, event) for name in release.names}
    opened = release.for_records(first, opened_ledgers, wholes)
    how = {"share": share, "min_survivors": event.honest + first.colluders, "colluders": first.colluders}
    return replace(read(plan.task, release.packing, opened.total, opened.noise), how=how)


def pooled_standardisation(
    task: Task, *, privacy: Privacy | None, share: float, rounds: int, ledgers: Path
) -> Standardisation:
    """The same of pooled data, by one data owner's own noise. Raises: as :func:`standardisation`."""
    release = _release(task, task.parties, _plain_sum(None), noisy=privacy is not None)
    total = np.sum([*release.vectors.values()], axis=0)
    if privacy is None:
        return read(task, release.packing, total)
    from choral.trainers.centralized.centralize import pool

    first, ledger = first_promise(privacy, share, colluders=1), Ledger(ledger_file(ledgers, POOLED), holder=POOLED)
    sigma = noise_multiplier(first.epsilon, first.delta, 1.0, 1, neighbours=privacy.neighbours)
    event = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=sigma, steps=1)
    loader = _built(task, pool(list(task.parties.values())))[2]
    passes, known = rounds * privacy.epochs, len(ledger.events)  # before the plan, which reckons with those
    whole = joint_plan(privacy, loader, holder=POOLED, ledger=ledger, passes=passes, beside=event)
    ledger.append(event, after=known, plan=whole)
    unit, length = release.packing.unit, release.packing.length
    grid = noise_grid(1.0, length)
    value = np.rint(total / unit / grid) * grid + grid_gaussian(length, sigma, 1.0, grid, os_stream)
    return replace(read(task, release.packing, value * unit, sigma * unit), how={"share": share})


def refuse_clients(privacy: Privacy | ClientPrivacy | None) -> None:
    """Raises: ConfigError."""
    if isinstance(privacy, ClientPrivacy):
        raise ConfigError(
            "data.standardise with a promise to clients: its clipping norm is of updates, and not of records",
            hint='compute them before, with `choral stats` and unit = "client", or leave data.standardise out',
        )


def first_promise(privacy: Privacy, share: float, *, colluders: int) -> Privacy:
    """The part of a promise that the means and deviations spend, in shares of the noise."""
    return Privacy(
        privacy.epsilon * share,
        privacy.delta,
        neighbours=privacy.neighbours,
        records_per_person=privacy.records_per_person,
        noise="distributed",
        colluders=colluders,
    )


def scales_of(bounds: Sequence[tuple[float, float] | None], records: int) -> Scales:
    """What is computed. records: of all parties together."""
    return Scales({str(place): each for place, each in enumerate(bounds) if each is not None}, records)


def read(task: Task, packing: Packing, total: Any, noise: Any = None) -> Standardisation:
    """What the totals of :func:`scales_of` say. A column whose values are all alike is scaled by its bounds."""
    found = packing.read(total, np.zeros(packing.length) if noise is None else noise)[NAME]
    return standardisation_of(bounds_of_features(task), found)


def standardisation_of(bounds: Sequence[tuple[float, float] | None], found: Mapping[str, Estimated]) -> Standardisation:
    """bounds: of each feature, or None where it stays as it is. found: of the others."""
    means, deviations = [], []
    for place, each in enumerate(bounds):
        if each is None:
            means.append(0.0)
            deviations.append(1.0)
            continue
        means.append(found[f"mean {place}"].value or 0.0)
        deviations.append(found[f"deviation {place}"].value or (each[1] - each[0]) / 2.0)
    return Standardisation(means=tuple(means), deviations=tuple(deviations))


def _release(task: Task, parties: Mapping[str, Any], secure_sum: SecureSum, *, noisy: bool) -> StatisticsRelease:
    records = {name: len(dataset) for name, dataset in parties.items()}
    wanted = {NAME: scales_of(bounds_of_features(task), sum(records.values()))}
    packing = packing_of(wanted, sum(records.values()), noisy=noisy)
    columns = frozenset(wanted[NAME].columns(NAME))
    return StatisticsRelease(
        packing=packing,
        vectors={name: packing.sums(columns_of(dataset, name, columns)) for name, dataset in parties.items()},
        records=records,
        secure_sum=secure_sum,
        digest=hashlib.sha256(repr(wanted).encode()).digest(),
    )


def _plain_sum(secure_sum: SecureSum | None) -> SecureSum:
    """Of groups the sum inside: there are no groups' means of counts."""
    from choral.protocols import Plain

    chosen = secure_sum.sums if isinstance(secure_sum, Grouped) else secure_sum
    if isinstance(chosen, Masked) and chosen.contributors is not None:
        return replace(chosen, contributors=None, block=1)
    return chosen or Plain()


def _built(task: Task, dataset: Any) -> Built:
    """What ``build`` returns, as if it had not been called."""
    with seeded(0, 0, NAME):
        return checked_build(task.build, dataset)


def _local(plan: Plan, ledgers: Mapping[str, Ledger]) -> Callable[[str, RecordEvent], ReleasePlan]:
    privacy = plan.privacy
    if not isinstance(privacy, Privacy):
        raise ConfigError("no promise for records")
    passes = plan.rounds * privacy.epochs

    def follows(name: str, event: RecordEvent) -> ReleasePlan:
        loader = _built(plan.task, plan.parties[name])[2]
        return joint_plan(privacy, loader, holder=name, ledger=ledgers[name], passes=passes, beside=event)

    return follows


def _in_shares(plan: Plan) -> Callable[[str, RecordEvent], ReleasePlan]:
    privacy = plan.privacy
    if not isinstance(privacy, Privacy):
        raise ConfigError("no promise for records")
    model = _built(plan.task, next(iter(plan.parties.values())))[0]
    terms = shares_terms(plan, Layout(model).length)

    def follows(name: str, event: RecordEvent) -> ReleasePlan:
        del name  # all have the same
        training = plan_shares(privacy, terms, beside=(event,))
        return ReleasePlan(
            epsilon=privacy.epsilon,
            parts=(PlannedEvents(event=event, times=1), PlannedEvents(event=training.event, times=terms.steps)),
        )

    return follows
