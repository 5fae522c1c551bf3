"""A job with sites whose features are standardised: first a job of statistics, then the training, each approved.

    choral serve job.toml --out run     asks for means and deviations, keeps run/standardise.json, and ends
    choral serve job.toml --out run     trains: the means and deviations are words of the offer

Both are fixed in the first offer (`followed_by`), so that one plan of both stands on each site's ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings, to_json
from choral.jobs.sites.waits import waits_of
from choral.jobs.standardising import keep
from choral.jobs.training import privacy_of, secure_sum_of

if TYPE_CHECKING:
    from choral.network.coordinator.sites import Carrier
    from choral.network.site.offer import Offer
    from choral.privacy import Privacy
    from choral.trainers import Task
    from choral.trainers.analytics.terms import StatisticsTerms
    from choral.trainers.data.standardised import Standardisation


def scales_offer(
    settings: Settings, task: Task, names: tuple[str, ...], *, coordinator: str, code: str
) -> tuple[Offer, StatisticsTerms]:
    """What the sites are asked for first. Raises: ConfigError, OfferError; BudgetExceededError."""
    from choral.jobs.sites.statistics import terms_of_statistics
    from choral.network.site.offer import Offer
    from choral.network.site.terms import sum_record
    from choral.trainers.analytics.standardise import NAME, first_promise, scales_of
    from choral.trainers.data.standardised import bounds_of_features
    from choral.trainers.run_folder.describe import settings_of

    privacy, summing = _promise(settings), secure_sum_of(settings, Arm())
    terms = terms_of_statistics(
        {NAME: scales_of(bounds_of_features(task), settings.sites.records or 1)},
        names=names,
        sites=settings.sites,
        privacy=first_promise(privacy, settings.data.standardise_share, colluders=settings.privacy.colluders),
        secure_sum=summing,
    )
    plain = to_json(settings)
    follows = {"privacy": settings_of(privacy, len(names)), "rounds": settings.training.rounds}
    offer = Offer(
        job=f"{settings.serve.job or Path(settings.task).stem}-scales",
        coordinator=coordinator,
        task=Path(settings.task).name,
        code=code,
        settings={name: plain[name] for name in ("seed", "split", "training")} | {"followed_by": follows},
        terms=terms.record(),
        secure_sum=sum_record(summing),
        parties=names,
    )
    return offer, terms


def compute(
    settings: Settings,
    task: Task,
    carrier: Carrier,
    keys: Mapping[str, bytes],
    *,
    coordinator: str,
    code: str,
    out: Path,
    say: Callable[[str], None],
) -> Standardisation:
    """Have the sites answer, and keep what comes of it. Raises: ConfigError, OfferError; what ends a sum."""
    from choral.network.coordinator.statistics import SitesStatistics
    from choral.trainers.analytics.standardise import read
    from choral.trainers.run_folder.folder import check_empty

    check_empty(out)
    offer, terms = scales_offer(settings, task, tuple(keys), coordinator=coordinator, code=code)
    asked = SitesStatistics(
        offer=offer,
        terms=terms,
        secure_sum=secure_sum_of(settings, Arm()),
        carrier=carrier,
        keys=keys,
        waits=waits_of(settings),
        say=say,
    )
    (opened, _), plan = asked.opened(), terms.shares
    if plan is None:
        raise ConfigError("means and deviations without noise")
    by = replace(
        read(task, terms.packing, opened.total, opened.noise),
        how={
            "share": settings.data.standardise_share,
            "min_survivors": plan.terms.min_survivors,
            "colluders": plan.colluders,
        },
    )
    keep(by, out)
    return by


def said_of(by: Standardisation) -> dict[str, Any]:
    """As it stands in the offer of the training."""
    return {key: list(value) for key, value in asdict(by).items() if key != "how"}


def _promise(settings: Settings) -> Privacy:
    from choral.privacy import Privacy

    if settings.privacy.epsilon is None:
        raise ConfigError(
            "data.standardise with sites and without privacy.epsilon: exact means and deviations are a release of their"
            " own",
            hint="set privacy.epsilon, or compute them with `choral stats --directory`",
        )
    privacy = privacy_of(settings, Arm(private=True), settings.privacy.epsilon)
    if not isinstance(privacy, Privacy) or privacy.noise != "local":
        raise ConfigError(
            "data.standardise with sites is for a promise for records, whose noise is each site's own",
            hint='privacy.unit = "record", and an algorithm such as fedavg',
        )
    return privacy
