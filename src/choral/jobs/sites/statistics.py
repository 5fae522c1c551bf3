"""Statistics with sites: what `choral stats --directory` makes of the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.jobs.settings import Arm, SitesSettings
from choral.jobs.sites.waits import waits_of
from choral.jobs.statistics import StatisticsSettings, job_of, statistic_of
from choral.jobs.training import privacy_of, secure_sum_of

if TYPE_CHECKING:
    from choral.network import CertifiedIdentity
    from choral.network.coordinator.sites import Carrier
    from choral.network.site.offer import Offer
    from choral.privacy import Privacy, SharesPlan
    from choral.protocols import Homomorphic, Masked
    from choral.protocols.interface import SecureSum
    from choral.trainers.analytics.part import Statistic
    from choral.trainers.analytics.result import FederatedStatistics
    from choral.trainers.analytics.terms import StatisticsTerms


def statistics_offer(settings: StatisticsSettings, names: tuple[str, ...], *, coordinator: str) -> Offer:
    """The offer that the sites are asked to agree to. Raises: ConfigError, OfferError."""
    return _offer(settings, names, _terms(settings, names)[0], coordinator)


def _offer(settings: StatisticsSettings, names: tuple[str, ...], terms: StatisticsTerms, coordinator: str) -> Offer:
    from choral.network.site.offer import STATISTICS, Offer
    from choral.network.site.terms import sum_record
    from choral.trainers.federated.terms.task_code import version_here

    return Offer(
        job=settings.serve.job or "statistics",
        coordinator=coordinator,
        task=STATISTICS,
        code=version_here(),
        settings={"title": settings.title},
        terms=terms.record(),
        secure_sum=sum_record(_sum(settings, names)),
        parties=names,
    )


def serve_statistics(
    settings: StatisticsSettings,
    carrier: Carrier,
    keys: Mapping[str, bytes],
    *,
    coordinator: CertifiedIdentity,
    say: Callable[[str], None],
    out: Path | None = None,
) -> FederatedStatistics:
    """Compute them with the sites of the directory; with ``out``, write them there, and their manifest, which the sites
    sign. Raises: ConfigError, OfferError; what ends a sum.
    """
    from choral.network.coordinator.statistics import SitesStatistics
    from choral.trainers.analytics.federated_statistics import check_threshold, of_sites
    from choral.trainers.run_folder.evidence.sealing import seal_statistics

    names = tuple(keys)
    terms, privacy = _terms(settings, names)
    check_threshold(settings.threshold, privacy, terms.packing, None)  # before anything is paid for
    asked = SitesStatistics(
        offer=_offer(settings, names, terms, coordinator.name),
        terms=terms,
        secure_sum=_sum(settings, names),
        carrier=carrier,
        keys=keys,
        waits=waits_of(job_of(settings)),
        say=say,
        coordinator=None if out is None else coordinator,
        rehearsal=settings.serve.rehearsal,
    )
    opened, signatories = asked.opened()
    found = of_sites(
        terms.packing,
        opened,
        privacy,
        parties=len(names),
        contributors=settings.contributors,
        threshold=settings.threshold,
    )
    found = replace(found, estimates={name: found.estimates[name] for name in settings.statistics})
    if out is not None and signatories is not None:
        seal_statistics(found.save_in(out), signatories, names)
    return found


def terms_of_statistics(
    statistics: Mapping[str, Statistic],
    *,
    names: tuple[str, ...],
    sites: SitesSettings,
    privacy: Privacy | None,
    secure_sum: SecureSum,
    contributors: int | None = None,
) -> StatisticsTerms:
    """What all sites hold alike. Raises: ConfigError; BudgetExceededError."""
    from choral.protocols import Homomorphic, Masked
    from choral.trainers.algorithms.interface import FederationInfo
    from choral.trainers.analytics.federated_statistics import packing_of
    from choral.trainers.analytics.terms import StatisticsSums, StatisticsTerms, record_of
    from choral.trainers.federated.codec import Encoding, cap_of
    from choral.trainers.federated.terms.task_code import version_here
    from choral.trainers.run_folder.describe import settings_of

    if sites.records is None or sites.largest is None:
        raise ConfigError(
            "sites.records and sites.largest are not set: how many records sites have is agreed on, and never counted",
            hint="[sites] records = 1200, largest = 400: of all sites together, and the most that one may have",
        )
    if not isinstance(secure_sum, Masked | Homomorphic):
        raise ConfigError("sites send into no plain sum", hint='[secure_sum] kind = "masked"')
    length = packing_of(statistics, sites.records, noisy=privacy is not None).length
    largest, encoding = cap_of(sites.largest), Encoding()
    plan = None
    if privacy is not None:
        plan = _shares_plan(privacy, secure_sum, names, records=sites.records, length=length, most=largest)
    terms = StatisticsTerms(
        algorithm=StatisticsSums(
            statistics={name: record_of(each) for name, each in statistics.items()}, contributors=contributors
        ),
        federation=FederationInfo(
            parties=len(names),
            length=length,
            examples=sites.records,
            largest=largest,
            value_bound=encoding.value_bound,
            weight=sites.records,
        ),
        encoding=encoding,
        privacy=settings_of(privacy, len(names)),
        shapes={"statistics": (length,)},
        rounds=1,
        code=version_here(),
        shares=plan,
    )
    terms.check()
    return terms


def _shares_plan(
    privacy: Privacy,
    secure_sum: Masked | Homomorphic,
    names: tuple[str, ...],
    *,
    records: int,
    length: int,
    most: int,
) -> SharesPlan:
    """Of the noise that the sites add up, each its share. Raises: ConfigError for a sum that withstands too few."""
    from choral.network.site.terms import setup_of
    from choral.privacy import SharesTerms, plan_shares
    from choral.protocols.masking.ahead.floor import promised

    setup = setup_of(secure_sum, names)
    if setup.corrupt < privacy.colluders:
        raise ConfigError(
            f"the sum withstands {setup.corrupt} corrupt sites, and the noise {privacy.colluders} colluders",
            hint=f"secure_sum.corrupt = {privacy.colluders}, or more",
        )
    terms = SharesTerms(
        records=records,
        batch_size=records,
        steps=1,
        parties=len(names),
        min_survivors=promised(setup, secure_sum.min_survivors),
        length=length,
        most_records=most,
    )
    return plan_shares(privacy, terms)


def _sum(settings: StatisticsSettings, names: tuple[str, ...]) -> SecureSum:
    """Where contributors are counted, over everybody."""
    chosen: Any = secure_sum_of(job_of(settings), Arm())
    if settings.contributors is None:
        return chosen  # type: ignore[no-any-return]
    return replace(chosen, min_survivors=len(names), dropouts=0)  # type: ignore[no-any-return]


def _terms(settings: StatisticsSettings, names: tuple[str, ...]) -> tuple[StatisticsTerms, Privacy | None]:
    from choral.privacy import ClientPrivacy

    if settings.parties or settings.task is not None:
        raise ConfigError("parties and task are of rehearsals, and sites have their own data", hint="leave them out")
    epsilon, job = settings.privacy.epsilon, job_of(settings)
    privacy = None if epsilon is None else privacy_of(job, Arm(private=True), epsilon)
    if isinstance(privacy, ClientPrivacy):
        raise ConfigError('statistics of sites with unit = "client"', hint="a promise for records, or none")
    made = terms_of_statistics(
        {name: statistic_of(name, each) for name, each in settings.statistics.items()},
        names=names,
        sites=settings.sites,
        privacy=privacy,
        secure_sum=_sum(settings, names),
        contributors=settings.contributors,
    )
    return made, privacy
