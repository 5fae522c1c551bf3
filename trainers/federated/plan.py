"""A federation as it is decided before the first round: everything that can be refused is refused here, in one order.

    plan = Plan.of(task, parties, rounds=20, privacy=Privacy(...), secure_sum="masked")

Nothing is trained, written or paid for. What a command compares is planned for each arm before any arm is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import msgspec

from choral.privacy import ClientPrivacy, Privacy, PrivacyEngine
from choral.protocols import Grouped
from choral.protocols.contributors import ContributorCount
from choral.protocols.interface import SecureSum
from choral.trainers.algorithms import algorithm_named
from choral.trainers.algorithms.interface import Algorithm, LocalTrainer
from choral.trainers.engines.fastest import Fastest
from choral.trainers.federated import checks
from choral.trainers.federated.codec import Encoding
from choral.trainers.federated.participation import Participation
from choral.trainers.federated.record_shares import checks as shares
from choral.trainers.federated.virtual_parties import Census, DistantParties, census_of
from choral.trainers.local_steps.resident_model import Resident, Seating
from choral.trainers.run_folder.describe import check_tuned, describe
from choral.trainers.run_folder.evidence.rehearsal import MOST_PARTIES
from choral.trainers.run_folder.info import RunInfo
from choral.trainers.run_folder.keep import Keep
from choral.trainers.task import arguments
from choral.trainers.task.arithmetic import Arithmetic, Compute, check_arithmetic, resolve_device
from choral.trainers.task.initial_weights import Weights
from choral.trainers.task.learning_rate import Rates
from choral.trainers.task.per_party import check_held_out
from choral.trainers.task.task import Task, parties_of

_LEAST = 5  # parties that a coordinate has, where nothing else is said
_MOST_COUNTED = 1 << 25  # numbers of a round


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`~choral.trainers.federated.federate.federate` was given, as it was understood, checked; and what
    follows from it. initial: the weights to start from, read.
    """

    task: Task
    parties: Mapping[str, Any]
    census: Census
    rounds: int
    algorithm: Algorithm
    privacy: Privacy | ClientPrivacy | None
    secure_sum: SecureSum
    participation: Participation
    encoding: Encoding
    compute: Compute
    keep: Keep
    initial: Weights | None
    arithmetic: Arithmetic

    @classmethod
    def of(
        cls,
        task: Task,
        parties: Mapping[str, Any] | None = None,
        *,
        rounds: int,
        algorithm: Algorithm | str | None = None,
        privacy: Privacy | ClientPrivacy | None = None,
        secure_sum: SecureSum | str | None = None,
        participation: Participation | None = None,
        encoding: Encoding | None = None,
        compute: Compute | None = None,
        keep: Keep | None = None,
    ) -> Self:
        """Types first, then what the algorithm needs, the parties, the machine, and what goes together.

        Raises: ConfigError, DataError, TaskError, InitialWeightsError; RunFolderError for settings that could not be
            written down.
        """
        participation = Participation() if participation is None else participation
        encoding = Encoding() if encoding is None else encoding
        compute, keep = Compute() if compute is None else compute, Keep() if keep is None else keep
        checks.check_groups(
            task, participation, {"encoding": (encoding, Encoding), "compute": (compute, Compute), "keep": (keep, Keep)}
        )
        parties = parties_of(task, parties)
        rounds = arguments.whole_number(rounds, "rounds", 1, "20 is a start")
        algorithm, secure_sum = algorithm_named(algorithm), checks.secure_sum_named(secure_sum)
        checks.check_privacy_kind(privacy)
        checks.check_fits(algorithm, privacy, task.loss)
        checks.check_weights(algorithm, privacy, encoding.weights)
        census = census_of(parties, participation=participation, privacy=privacy, min_classes=task.min_classes)
        check_held_out(task.held_out, task.evaluate_party, parties, private=privacy is not None)
        by_record = isinstance(privacy, Privacy)
        device = resolve_device(compute.device)
        initial = Weights.read(task.initial_weights) if task.initial_weights is not None else None
        check_arithmetic(compute.precision, compute.compile, private=by_record, reads_records=algorithm.needs_loss)
        checks.check_participation(algorithm, participation, len(parties))
        checks.check_patience(algorithm, participation, privacy, secure_sum.name)
        checks.check_schedule(algorithm, task.schedule)
        check_tuned(keep.tuning, private=privacy is not None)
        checks.check_privacy(privacy, census.examples, len(parties))
        checks.check_secret_cohorts(privacy, participation, secure_sum, keep, len(parties), checks.sums_of(algorithm))
        checks.check_contributors(secure_sum, algorithm, privacy, keep, task, census.datasets)
        shares.check_shares(privacy, secure_sum, participation, census.names)
        return cls(
            task=task,
            parties=parties,
            census=census,
            rounds=rounds,
            algorithm=algorithm,
            privacy=privacy,
            secure_sum=secure_sum,
            participation=participation,
            encoding=encoding,
            compute=compute,
            keep=keep,
            initial=initial,
            arithmetic=Arithmetic(device, compute.precision, compile=compute.compile),
        )

    @property
    def info(self) -> RunInfo:
        """What is known for run.json before the model is built."""
        info = describe(
            "federated",
            self.parties,
            self.census.examples,
            self.rounds,
            self.compute.seed,
            self.arithmetic,
            self.privacy,
            self.keep,
            self.initial,
            self.census.population,
        )
        schedule, privacy = self.task.schedule, info.privacy
        if privacy and shares.in_shares(self.privacy):
            fewest = shares.fewest_survivors(self.secure_sum, self.participation, self.census.names)
            privacy |= {"min_survivors": fewest}
        return msgspec.structs.replace(
            info,
            privacy=privacy,
            algorithm=self.algorithm.record(),
            participation=self.participation.record(),
            schedule=schedule.record() if schedule else None,
            weights=self.encoding.weights,
            releases=tuple(asdict(release) for release in self.algorithm.releases),
            sites=self.parties.names if isinstance(self.parties, DistantParties) else (),
            standardised=None if self.task.standardised is None else dict(self.task.standardised),
        )

    @property
    def has_receipts(self) -> bool:
        """Whether the parties that this process plays leave receipts in the folder: of sums that all sign alike, which
        nobody does of groups and in two trips.
        """
        signed = not isinstance(self.secure_sum, Grouped) and getattr(self.secure_sum, "trips", 4) != 2
        here = not isinstance(self.parties, DistantParties) and signed
        return here and self.keep.folder is not None and len(self.census.names) <= MOST_PARTIES

    @property
    def by_record(self) -> Privacy | None:
        """The promise of each record, kept by every party for itself."""
        return None if isinstance(self.privacy, ClientPrivacy) or shares.in_shares(self.privacy) else self.privacy

    @property
    def first_parties(self) -> tuple[str, ...]:
        """The fewest that a round begins with: no sum is over fewer, so they stand for every cohort."""
        names = self.census.names
        return tuple(names[: self.participation.fewest(len(names))])


def contributor_count(plan: Plan, length: int) -> ContributorCount | None:
    """What counts, in a round, coordinates that few parties contribute to; None where that says nothing (vectors have
    noise, the server sees each anyway, or they are elsewhere), or would take as long as the sum.
    """
    shown = plan.secure_sum.name == "plain" or isinstance(plan.secure_sum, Grouped)
    if shown or plan.privacy is not None or isinstance(plan.parties, DistantParties):
        return None
    if length * min(len(plan.census.names), plan.participation.cohort or 1 << 30) > _MOST_COUNTED:
        return None
    return ContributorCount(getattr(plan.secure_sum, "contributors", None) or _LEAST)


def trainer_of(plan: Plan, engines: Mapping[str, PrivacyEngine]) -> tuple[Resident, LocalTrainer]:
    """The resident model of this process, and who computes at its parties."""
    task, compute, census = plan.task, plan.compute, plan.census
    resident = Resident(
        build=task.build,
        fit=task.fit,
        datasets=census.datasets,
        privacy_engines=engines,
        seed=compute.seed,
        arithmetic=plan.arithmetic,
        loss=task.loss,
        initial=plan.initial,
        rates=Rates(task.schedule, plan.rounds),
        seating=Seating(census.names[0], census.seats),
    )
    made: LocalTrainer = compute.engine(resident) if compute.engine else Fastest(resident)
    return resident, made
