"""Every reason why a site does not agree to an offer, beside that nobody approved it.

Each check stands by itself and compares what is asked with what the site has set, field by field; what is not known is
refused. All are made, so that who reviews an offer sees all that is wrong with it. Nothing of this leaves the site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from choral.errors import ChoralError
from choral.network.site.approvals import code_of
from choral.network.site.budget import begun_here, budget_objection
from choral.network.site.files.settings import DataSet
from choral.network.site.offer import BY_ENGINE, STATISTICS, Offer
from choral.network.site.terms import follows_of, promise_of, setup_of, sum_of, terms_of
from choral.privacy import ClientPrivacy, Privacy
from choral.protocols.homomorphic.front import Homomorphic
from choral.protocols.masking.ahead.floor import check_floor, promised
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.protocols.masking.masked import Masked
from choral.protocols.masking.policy import Policy
from choral.trainers.analytics.terms import StatisticsTerms
from choral.trainers.federated.terms.task_code import version_here
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.describe import settings_of

if TYPE_CHECKING:
    from choral.network.site.folder import SiteFolder

CLIENT = "client"
ALGORITHM = "fedavg"
"""What a party does whose training is an engine's; what the strategy makes of the mean is derived from that."""


def objections(folder: SiteFolder, offer: Offer, *, budget: bool = True) -> list[str]:
    """All that is wrong with the offer by the site's settings; empty if nothing is.

    budget: look at the ledger, too, if nothing else is wrong: it is what takes time.
    """
    found = [*_people(folder, offer), *_code(folder, offer), *_metrics(folder, offer)]
    try:
        terms = terms_of(offer.terms)
    except ChoralError as error:
        return [*found, str(error)]
    found += [*_consistent(terms, offer), *_job(folder, terms), *_size(folder, terms), *_encoding(folder, terms)]
    found += [*_sum(folder, offer), *_by_engine(offer, terms)]
    task = folder.settings.tasks.get(offer.task)
    if task is not None:
        data, parties = folder.settings.data[task.data], terms.federation.parties
        found += [*_privacy(data, terms, parties), *_records(data, terms), *_follows(folder, data, offer, terms)]
        if budget and not found:
            asked = promise_of(terms.privacy, parties)
            begun = begun_here(folder, offer.digest)
            found += filter(None, [budget_objection(folder, task.data, asked, terms, offer.settings, begun)])
    return found


def data_of(folder: SiteFolder, offer: Offer) -> DataSet | None:
    """The data set that this training code may read; None if the site has no such code."""
    task = folder.settings.tasks.get(offer.task)
    return folder.settings.data[task.data] if task is not None else None


def _people(folder: SiteFolder, offer: Offer) -> Iterator[str]:
    name = folder.settings.name
    if offer.coordinator != folder.coordinator:
        yield f"it says it is of {offer.coordinator!a}, and this site is connected to {folder.coordinator!a}"
    if name not in offer.parties:
        yield f"its parties do not have {name!a}, this site"
    for party in offer.parties:
        if party != name and party not in folder.parties:
            yield f"its parties have {party!a}, who is not pinned here"


def _code(folder: SiteFolder, offer: Offer) -> Iterator[str]:
    from choral.trainers.data import TASKS

    if offer.task not in folder.settings.tasks:
        yield f"no training code {offer.task!a} is installed here"
        return
    by_engine = folder.settings.tasks[offer.task].trained_by == "engine"
    if offer.by_engine or by_engine:
        if offer.by_engine != by_engine:
            yield f"{offer.task!a} is trained by {'the engine' if offer.by_engine else 'code'}, and otherwise here"
        return
    data, path = data_of(folder, offer), folder.path / "tasks" / offer.task
    if offer.task == STATISTICS:
        if offer.code != version_here():
            yield f"its statistics are of {offer.code}, and {version_here()} runs here"
        if data is not None and data.path is None:
            yield "statistics are of a CSV file, and the data has no path here"
    elif offer.embedded:
        if offer.task not in TASKS:
            yield f"Choral has no task {offer.task!a}"
        elif offer.code != version_here():
            yield f"its training code is of {offer.code}, and {version_here()} runs here"
        elif data is not None and not data.part:
            yield f"the data of a task of Choral is a part of its own, and {offer.task!a} has a path here"
    elif not path.is_file():
        yield f"no training code {offer.task!a} is installed here"
    elif code_of(path) != offer.code:
        yield f"its training code {offer.task!a} has another SHA-256 than the file that is installed here"
    elif data is not None and data.path is None:
        yield f"training code in a file reads a path, and the data of {offer.task!a} has none here"


def _by_engine(offer: Offer, terms: TrainingTerms) -> Iterator[str]:
    if not offer.by_engine:
        return
    if terms.privacy is not None or terms.shares is not None:
        yield "it promises privacy, which this site cannot keep where an engine's process trains"
    if terms.algorithm.kind != ALGORITHM:
        yield f"an engine's process trains for {ALGORITHM}, and not for {terms.algorithm.kind}"
    if terms.metrics:
        yield "the sites' own evaluations are summed only where they are made by approved code"
    if terms.code.partition(", ")[2] != BY_ENGINE:
        yield f"its terms speak of other code than the offer: {terms.code!a:.80}"


def _metrics(folder: SiteFolder, offer: Offer) -> Iterator[str]:
    if offer.metrics not in ("none", folder.settings.job.metrics):
        yield f"metrics {offer.metrics!r} would become known, which this site does not allow"


def _consistent(terms: TrainingTerms, offer: Offer) -> Iterator[str]:
    """What an offer says in two places must be one thing."""
    federation = terms.federation
    if federation.parties != len(offer.parties):
        yield f"its terms are of {federation.parties} parties, and it names {len(offer.parties)}"
    if federation.length != sum(math.prod(shape) for shape in terms.shapes.values()):
        yield f"its terms are of {federation.length} parameters, and the shapes say otherwise"
    if federation.value_bound != terms.encoding.value_bound:
        yield "its terms have two bounds of an update's coordinate"
    if bool(terms.metrics) != (offer.metrics != "none"):
        yield "its terms have sums of the sites' own evaluations that it does not speak of, or the other way round"
    asked = terms.privacy or {}
    if (terms.shares is not None) != (asked.get("noise") == "distributed" and asked.get("unit") != CLIENT):
        yield "its terms have a plan of noise in shares and no promise of it, or the other way round"
    if offer.task == STATISTICS and not isinstance(terms, StatisticsTerms):
        yield f"it is of {STATISTICS}, and its terms are of a training"
    if terms.code.partition(",")[0] != version_here():  # the task's source is compared when the party is made
        yield f"the coordinator runs {terms.code!a:.60}, and {version_here()} runs here"


def _job(folder: SiteFolder, terms: TrainingTerms) -> Iterator[str]:
    settings = folder.settings
    if terms.algorithm.kind not in settings.job.algorithms:
        yield f"the algorithm {terms.algorithm.kind} is not among {', '.join(settings.job.algorithms)}"
    noisy = terms.shares is not None or (terms.privacy or {}).get("unit") == CLIENT  # all that is summed
    beyond = [release for release in terms.algorithm.releases if release.source not in settings.job.releases]
    if beyond and not noisy:
        what = ", ".join(f"{release.what!r} ({release.source})" for release in beyond)
        yield f"it releases {what}; this site allows what is of {', '.join(settings.job.releases) or 'nothing'}"
    if terms.rounds > settings.maxima.rounds:
        yield f"{terms.rounds} rounds, at most {settings.maxima.rounds}"


def _size(folder: SiteFolder, terms: TrainingTerms) -> Iterator[str]:
    """What an algorithm sends is a few times as long as its model, so the model is what is bounded."""
    length, most = terms.federation.length, folder.settings.maxima.parameters
    if length > most:
        yield f"a model of {length} parameters, at most {most}"


def _encoding(folder: SiteFolder, terms: TrainingTerms) -> Iterator[str]:
    policy, encoding = folder.settings.sum, terms.encoding
    if encoding.value_bound > policy.value_bound:
        yield f"coordinates up to {encoding.value_bound:g}, at most {policy.value_bound:g}"
    if encoding.value_bits > policy.value_bits:
        yield f"{encoding.value_bits} bits of a coordinate, at most {policy.value_bits}"
    if encoding.weights == "examples" and terms.federation.largest > policy.maximum_weight:
        yield f"a site may count for {terms.federation.largest} records, at most {policy.maximum_weight}"


def _sum(folder: SiteFolder, offer: Offer) -> Iterator[str]:
    """Make the setup that would be signed over everybody, and hold it against the policy as the driver does again."""
    try:
        summing = sum_of(offer.secure_sum)
        if summing.name not in folder.settings.sum.kinds or not isinstance(summing, Masked | Homomorphic):
            yield f"the secure sum is {summing.name}, which is not among {', '.join(folder.settings.sum.kinds)}"
            return
        policy = policy_of(folder, offer)
        if isinstance(summing, Homomorphic) and summing.key == "shared":
            yield from _shared_key(policy, summing, len(offer.parties))
            return
        if summing.cohort == "random" and policy.cohort != "random":
            yield "it takes the coordinator's word that it draws rosters at random; this site expects it to choose them"
        if isinstance(summing, Masked) and summing.trips not in (taken := folder.settings.sum.trips):
            yield f"its rounds take {summing.trips} trips, which are not among {', '.join(map(str, taken))}"
        if folder.settings.name not in offer.parties or set(policy.directory) != set(offer.parties):
            return  # which is said already
        setup = setup_of(summing, offer.parties)
    except ChoralError as error:
        yield str(error)
        return
    try:
        policy.check(setup, folder.settings.name)
    except ChoralError as error:
        yield str(error)
    try:
        if isinstance(setup, AheadSetup):
            check_floor(setup, policy)
    except ChoralError as error:
        yield str(error)


def _shared_key(policy: Policy, summing: Homomorphic, parties: int) -> Iterator[str]:
    if policy.server != "semi-honest" or policy.corrupt:
        yield "a shared key withstands no malicious coordinator and no site that works with it; this site expects them"
    fewest = smallest_shared(summing, parties)
    if fewest < policy.minimum_cohort:
        yield f"a smallest sum of {fewest}, at least {policy.minimum_cohort}"


def smallest_shared(summing: Homomorphic, parties: int) -> int:
    """The fewest whose sum may be opened under a shared key."""
    return summing.min_survivors or parties // 2 + 1


def policy_of(folder: SiteFolder, offer: Offer) -> Policy:
    """What this site demands of the sum, with the keys of the offer's parties: its own settings, and no less than the
    offer says, for a person approved that. A coordinator proposes each session's setup when the job runs.

    A fraction of corrupt sites is of all that are pinned, counted here: all of them may be among the few of an offer.
    Raises: OfferError, SpecError.
    """
    settings, pinned = folder.settings.sum, {**folder.parties, folder.settings.name: folder.signing.public}
    corrupt = settings.corrupt
    if isinstance(corrupt, float):
        corrupt = math.ceil(corrupt * len(pinned))
    own = Policy(
        corrupt=corrupt,
        directory={party: pinned[party] for party in offer.parties if party in pinned},
        minimum_cohort=settings.minimum_cohort,
        minimum_threshold=settings.minimum_threshold,
        security_bits=settings.security_bits,
        server=settings.server,
        cohort=settings.cohort,
    )
    summing = sum_of(offer.secure_sum)
    if not isinstance(summing, Masked | Homomorphic):
        return own
    if isinstance(summing, Homomorphic) and summing.key == "shared":
        return replace(own, minimum_cohort=max(own.minimum_cohort, smallest_shared(summing, len(offer.parties))))
    setup = setup_of(summing, offer.parties)
    return replace(
        own,
        corrupt=max(corrupt, setup.corrupt),
        minimum_cohort=max(own.minimum_cohort, promised(setup, summing.min_survivors)),
        server="malicious" if "malicious" in (own.server, setup.server) else "semi-honest",
        cohort="chosen" if "chosen" in (own.cohort, summing.cohort) else "random",
    )


def _privacy(data: DataSet, terms: TrainingTerms, parties: int) -> Iterator[str]:
    return _promised(data, terms.privacy, parties)


def _promised(data: DataSet, record: Mapping[str, Any] | None, parties: int) -> Iterator[str]:
    promise = data.promise
    if promise is None:
        return  # the site takes jobs without, and so with any
    asked = promise_of(record, parties)
    if asked is None:
        yield "it promises no privacy, and the data may be used with a promise only"
        return
    unit = CLIENT if isinstance(asked, ClientPrivacy) else "record"
    if unit != promise.unit:
        yield f"its privacy is of each {unit}, and the data's of each {promise.unit}"
        return
    if asked.epsilon > promise.epsilon:
        yield f"epsilon {asked.epsilon:g}, at most {promise.epsilon:g}"
    if asked.delta != promise.delta:
        yield f"delta {asked.delta:g}, and the data's is {promise.delta:g} in every job"
    if isinstance(asked, Privacy) and asked.neighbours != promise.neighbours:
        yield f"neighbours {asked.neighbours!r}, and the data's are {promise.neighbours!r}"
    clip = clip_of(asked)
    if clip > promise.max_grad_norm:
        yield f"a clipping norm of {clip:g}, at most {promise.max_grad_norm:g}"
    if asked.noise not in promise.noise:
        yield f"{asked.noise} noise, which is not among {', '.join(promise.noise)}"
    if asked.noise == "distributed" and asked.colluders < promise.colluders:
        yield f"noise in shares against {asked.colluders} colluders, at least {promise.colluders}"


def _follows(folder: SiteFolder, data: DataSet, offer: Offer, terms: TrainingTerms) -> Iterator[str]:
    """The training that statistics are fixed together with, by the same limits."""
    try:
        follows = follows_of(offer, terms.federation.parties)
    except ChoralError as error:
        yield str(error)
        return
    if follows is None:
        return
    promise, rounds = follows
    if not isinstance(terms, StatisticsTerms):
        yield "a training is to follow, and it is a training itself"
    if rounds > folder.settings.maxima.rounds:
        yield f"{rounds} rounds to follow, at most {folder.settings.maxima.rounds}"
    record = settings_of(promise, terms.federation.parties)
    yield from (f"{said}, of what is to follow" for said in _promised(data, record, terms.federation.parties))


def _records(data: DataSet, terms: TrainingTerms) -> Iterator[str]:
    if data.records > terms.federation.largest:
        yield f"the data has {data.records} records, more than the {terms.federation.largest} that a site may have"


def clip_of(privacy: Privacy | ClientPrivacy) -> float:
    """The largest clipping norm; infinite where it moves, for then nobody can say."""
    clip = privacy.clip if isinstance(privacy, ClientPrivacy) else privacy.max_grad_norm
    return float(clip) if isinstance(clip, int | float) else math.inf
