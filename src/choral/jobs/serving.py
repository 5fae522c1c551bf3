"""A job with sites: what `choral serve` makes of the settings, the plan and the offer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings, to_json
from choral.jobs.sites.standardising import compute, said_of, scales_offer
from choral.jobs.sites.waits import waits_of
from choral.jobs.standardising import kept, wanted
from choral.jobs.training import compute_of, federation_of, keep_of, privacy_of

if TYPE_CHECKING:
    from choral.network.coordinator.remote import RemoteSites
    from choral.network.coordinator.sites import Carrier
    from choral.network.door.carrier import EngineAdapter
    from choral.network.site.offer import Offer
    from choral.network.transport.certificates import CertifiedIdentity
    from choral.trainers import RoundRecord, Run, Task
    from choral.trainers.data.standardised import Standardisation
    from choral.trainers.federated.plan import Plan
    from choral.trainers.federated.terms.training_terms import TrainingTerms

OFFERED = ("seed", "split", "training", "algorithm", "privacy", "participation")
"""What of the settings is offered; the rest is the coordinator's own matter."""


def serve(
    settings: Settings,
    carrier: Carrier,
    keys: Mapping[str, bytes],
    *,
    coordinator: CertifiedIdentity,
    out: Path | None,
    resume: bool = False,
    say: Callable[[str], None],
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Run:
    """Train with the sites of the directory. keys: their public keys, by name. coordinator: whom sites have pinned, and
    who signs the run's manifest. say: is told who is missing.

    Raises: ConfigError; as `federate`.
    """
    from choral.network.coordinator.serve import serve

    task, example, code = coordinators_task(settings)
    task = standardised_here(settings, task, by := kept(settings, out))
    plan = plan_of(settings, task, example, tuple(keys), out=out, resume=resume, on_round=on_round)
    remote = remote_of(settings, carrier, keys, coordinator=coordinator, code=code, say=say, by=by)
    return serve(plan, remote)


def standardise(
    settings: Settings,
    carrier: Carrier,
    keys: Mapping[str, bytes],
    *,
    coordinator: CertifiedIdentity,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Compute the means and deviations that the training is to have, into ``out``. Raises: as :func:`compute`."""
    task, _, code = coordinators_task(settings)
    compute(settings, task, carrier, keys, coordinator=coordinator.name, code=code, out=out, say=say)


def serve_by_engine(
    engine: EngineAdapter,
    settings: Settings,
    folder: Path,
    *,
    out: Path,
    resume: bool = False,
    say: Callable[[str], None],
) -> Run:
    """Train with sites whose messages an engine carries. folder: the coordinator's, as `choral site init` makes it:
    its key, the sites' certificates, and in tasks/ the training code, which the settings name.

    Raises: SiteError, CertificateError: the folder cannot be used; as `serve`.
    """
    from choral.network import SiteFolder
    from choral.network.door.carrier import EngineCarrier
    from choral.trainers.data import TASKS

    hub = SiteFolder.open(folder)
    keys = dict(hub.parties)
    if not keys:
        raise ConfigError(f"{folder} has no site in its directory", hint="choral site directory add FILE.crt --pin PIN")
    if settings.task not in TASKS:
        settings = dataclasses.replace(settings, task=str(folder / "tasks" / Path(settings.task).name))
    carrier = EngineCarrier(engine, hub.identity, keys)

    if wanted(settings) and kept(settings, out) is None:  # the training's offer is approved while it is waited for
        standardise(settings, carrier, keys, coordinator=hub.identity, out=out, say=say)

    def on_round(entry: RoundRecord) -> None:
        done = f"came to nothing: {entry.failed}" if entry.failed else f"over {entry.survivors} sites"
        said = ", ".join(f"{metric} {value:.4f}" for metric, value in entry.metrics.items())
        say(f"round {entry.round} {done}; {said}")

    return serve(settings, carrier, keys, coordinator=hub.identity, out=out, resume=resume, say=say, on_round=on_round)


def standardised_here(settings: Settings, task: Task, by: Standardisation | None) -> Task:
    """Raises: ConfigError where means and deviations are wanted, and are not there yet."""
    if not wanted(settings):
        return task
    if by is None:
        raise ConfigError("the means and deviations that data.standardise wants are not there", hint="choral serve")
    from choral.trainers.data.standardised import standardised_task

    return standardised_task(task, by)


def remote_of(
    settings: Settings,
    carrier: Carrier,
    keys: Mapping[str, bytes],
    *,
    coordinator: CertifiedIdentity,
    code: str,
    say: Callable[[str], None],
    by: Standardisation | None = None,
) -> RemoteSites:
    """Who has the sites answer. Raises: ConfigError."""
    from choral.network.coordinator.remote import RemoteSites

    names = tuple(keys)

    def propose(terms: TrainingTerms) -> Offer:
        return offer_of(settings, terms, names, coordinator=coordinator.name, code=code, by=by)

    metrics = settings.metrics if settings.sites.metrics != "none" else ()
    return RemoteSites(
        carrier,
        propose,
        keys=keys,
        waits=waits_of(settings),
        say=say,
        coordinator=coordinator,
        metrics=metrics,
        rehearsal=settings.serve.rehearsal,
    )


class _Made(Exception):
    """The offer is made, and nothing else is to be done."""


def offer_ahead(
    settings: Settings, keys: Mapping[str, bytes], *, coordinator: str, by: Standardisation | None = None
) -> Offer:
    """The offer that `serve` will make, for sites that want to look at it before. by: of a job that standardises; None,
    and it is that of the means and deviations.

    Raises: ConfigError; as `Plan.of`.
    """
    from choral.trainers.federated.session import Session

    task, example, code = coordinators_task(settings)
    if wanted(settings) and by is None:
        return scales_offer(settings, task, tuple(keys), coordinator=coordinator, code=code)[0]
    task = standardised_here(settings, task, by)
    names, metrics = tuple(keys), settings.metrics if settings.sites.metrics != "none" else ()
    plan = plan_of(settings, task, example, names, out=None, resume=False)
    offers: list[Offer] = []

    class Looking:
        def __init__(self) -> None:
            self.metrics, self.begun = metrics, 0

        def engine(self, session: Session) -> Any:
            offers.append(offer_of(settings, session.terms, names, coordinator=coordinator, code=code, by=by))
            raise _Made

    with contextlib.suppress(_Made), Session.open(plan, Looking()):
        pass
    return offers[0]


def coordinators_task(settings: Settings) -> tuple[Task, Any, str]:
    """The task, an example of its data, and what code it is. Raises: ConfigError."""
    from choral.network.host.training_code import check_example, coordinator_task, embedded_example
    from choral.trainers.data import TASKS
    from choral.trainers.federated.terms.task_code import version_here

    refuse_table(settings)
    if settings.task in TASKS:
        task, example = embedded_example(settings.task, settings.split, settings.training, settings.seed)
        return task, example, version_here()
    (task, example), digest = coordinator_task(Path(settings.task), settings.training, settings.seed)
    check_example(example)
    return task, example, digest


def refuse_table(settings: Settings) -> None:
    """Raises: ConfigError for [data], which a site has and no coordinator."""
    if settings.data.path is not None:
        raise ConfigError(
            "[data] names a table here, and a site has its own, which no coordinator chooses",
            hint="take a task file with site(data, training, seed) and coordinator(training, seed): docs/sites.md",
        )


def plan_of(
    settings: Settings,
    task: Task,
    example: Any,
    names: tuple[str, ...],
    *,
    out: Path | None,
    resume: bool,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Plan:
    """The plan of the federation, whose parties are elsewhere. Raises: ConfigError, as `Plan.of`."""
    from choral.trainers.federated.plan import Plan
    from choral.trainers.federated.virtual_parties import DistantParties

    sites = settings.sites
    if sites.records is None or sites.largest is None:
        raise ConfigError(
            "sites.records and sites.largest are not set: what sites count for is agreed on, and never counted",
            hint="[sites] records = 1200, largest = 400: of all sites together, and the most that one may have",
        )
    if settings.evaluation.per_party:
        raise ConfigError("evaluation.per_party needs each party's records, which stay at its site")
    arm = Arm(private=settings.privacy.epsilon is not None)
    privacy = privacy_of(settings, arm, settings.privacy.epsilon) if arm.private else None
    given = federation_of(settings, arm, task, privacy)
    given["task"] = dataclasses.replace(given["task"], parties={})
    return Plan.of(
        parties=DistantParties(names, sites.records, sites.largest, example),
        compute=compute_of(settings, settings.seed),
        keep=keep_of(settings, arm, out=out, resume=resume, on_round=on_round),
        **given,
    )


def offer_of(
    settings: Settings,
    terms: TrainingTerms,
    names: tuple[str, ...],
    *,
    coordinator: str,
    code: str,
    by: Standardisation | None = None,
) -> Offer:
    """What the sites are asked to agree to. Raises: OfferError."""
    from choral.jobs.training import secure_sum_of
    from choral.network.site.offer import Offer
    from choral.network.site.terms import sum_record

    plain = to_json(settings)
    return Offer(
        job=settings.serve.job or Path(settings.task).stem,
        coordinator=coordinator,
        task=Path(settings.task).name,
        code=code,
        settings={name: plain[name] for name in OFFERED} | ({} if by is None else {"standardise": said_of(by)}),
        terms=terms.record(),
        secure_sum=sum_record(secure_sum_of(settings, Arm())),
        parties=names,
        metrics=settings.sites.metrics,
    )
