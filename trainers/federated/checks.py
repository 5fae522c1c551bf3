"""What a plan is held to: arguments of the right type, and algorithm, participation and promise that fit each other.

Each refusal stands in one line; a plan, and whoever wants to know beforehand, calls the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, Privacy
from choral.privacy.client_level.client import check_client_delta
from choral.protocols import Grouped, Homomorphic, Masked, Plain
from choral.protocols.interface import SecureSum
from choral.trainers.algorithms.interface import Algorithm, FederationInfo
from choral.trainers.federated.participation import Participation
from choral.trainers.federated.record_shares.checks import check_algorithm, in_shares
from choral.trainers.run_folder.keep import Keep
from choral.trainers.run_folder.owner_privacy import check_delta, check_own_ledger
from choral.trainers.task import arguments
from choral.trainers.task.learning_rate import Schedule
from choral.trainers.task.seeding import caller_keeps_generators
from choral.trainers.task.task import Loss, Task, TaskError, checked_build

FAILS = 2.0**-100  # of a round with secret cohorts, for want of clients: less than double precision can tell of delta
_PROBE = FederationInfo(parties=2, length=7, examples=2, largest=2, value_bound=1.0, weight=2)


def secure_sum_named(given: Any) -> SecureSum:
    """The secure sum that is meant: itself, that of a name in settings with its usual terms, or `Plain` for none.

    Raises: ConfigError for an unknown name, a class, or anything that does not open sessions.
    """
    if given is None:
        return Plain()
    known: dict[str, type[SecureSum]] = {"plain": Plain, "masked": Masked, "homomorphic": Homomorphic}
    if isinstance(given, str) and given.lower() in known:
        return known[given.lower()]()
    if isinstance(given, type) or not callable(getattr(given, "open", None)) or not hasattr(given, "name"):
        raise ConfigError(
            f"secure_sum is {arguments.shown(given)}, expected a secure sum, or one of {', '.join(known)}",
            hint="such as choral.Masked(), with its parentheses",
        )
    made: SecureSum = given
    return made


def check_groups(task: Any, participation: Any, groups: Mapping[str, tuple[Any, type]]) -> None:
    """Raises: ConfigError for arguments of other types. groups: what was given for each, and what it must be."""
    arguments.instance(task, "task", Task, "Task(build=..., fit=..., evaluate=...)")
    arguments.instance(participation, "participation", Participation, "Participation(cohort=...)")
    for name, (value, kind) in groups.items():
        arguments.instance(value, name, kind, f"{kind.__name__}(...)")


def check_privacy_kind(privacy: Any) -> None:
    """Raises: ConfigError for another promise than those of records and of clients."""
    if privacy is not None:
        hint = "Privacy(epsilon=3.0, delta=1e-5, max_grad_norm=1.0, epochs=1), or ClientPrivacy"
        arguments.instance(privacy, "privacy", (Privacy, ClientPrivacy), hint)


def check_privacy(privacy: Privacy | ClientPrivacy | None, examples: Mapping[str, int], parties: int) -> None:
    """Raises: ConfigError for a promise that so many records or clients cannot be given, or with a ledger of one data
    owner for all of them.
    """
    if isinstance(privacy, Privacy):
        check_own_ledger(privacy)
        check_delta(privacy, examples)
    elif privacy is not None:
        check_client_delta(privacy.delta, parties)
        privacy.survivors_of(parties)


def check_schedule(algorithm: Algorithm, schedule: Schedule | None) -> None:
    """Raises: ConfigError for learning rates that change, of an algorithm that has none which would."""
    if schedule is not None and not schedule.constant and algorithm.needs_loss and not algorithm.paced:
        raise ConfigError(
            f"the schedule is of the learning rate of fit, which {algorithm.kind} does not call",
            hint="leave the schedule out, or use FedSGD, GD, FedAvg, FedProx, SCAFFOLD, FedAdam, FedYogi or FedNova",
        )


def check_ranks(ranks: int, privacy: Privacy | None, out: str | Path | None, parties: int) -> None:
    """Raises: ConfigError if ledgers would have to be known to several processes and are not in files, or if a process
    would keep none.
    """
    if privacy is None:
        return
    if out is None:
        raise ConfigError(
            "several processes keep the ledgers of one run, which must be files then", hint="give out=FOLDER"
        )
    if parties < ranks:
        raise ConfigError(
            f"{ranks} processes for {parties} private parties, each of which stays at one process",
            hint=f"start at most {parties}",
        )


def check_participation(algorithm: Algorithm, participation: Participation, parties: int) -> None:
    """Raises: ConfigError for a cohort that is no number from 2 to all, or where an algorithm needs everybody."""
    if participation.everybody:
        return
    cohort, least, most = participation.cohort, participation.least, participation.expected(parties)
    if cohort is not None and not 2 <= cohort <= parties:
        raise ConfigError(f"expected a cohort of 2 to {parties} parties, got {cohort}", hint="None asks all")
    if least is not None and not 2 <= least <= most:
        raise ConfigError(f"expected participation.least of 2 to {most}, got {least}", hint="at most the cohort")
    if algorithm.keeps or any(channel.once for channel in algorithm.channels(_PROBE).values()):
        raise ConfigError(
            f"{algorithm.kind} needs every party: its parties keep state, or are counted once for the whole run",
            hint="leave out cohort, or use FedAvg, FedProx, FedAdam, FedYogi or FedNova",
        )


def check_patience(
    algorithm: Algorithm, participation: Participation, privacy: Privacy | ClientPrivacy | None, secure_sum: str
) -> None:
    """A round that fails after its first sum has shown that sum, and the next one computes the same vectors for it.

    Over other survivors, so that the difference of the two sums may be one party's vector. Client-level privacy and
    noise in shares pay for each sum, and a plain sum hides no vector. Raises: ConfigError for several sums in a round,
    and patience.
    """
    paid = isinstance(privacy, ClientPrivacy) or in_shares(privacy)
    if participation.patience and sums_of(algorithm) > 1 and secure_sum != "plain" and not paid:
        raise ConfigError(
            f"{algorithm.kind} has several sums in a round: one that fails after the first is retried from the same"
            " weights, and the server sees the same vectors summed over other survivors",
            hint="leave out participation.patience, or use ClientPrivacy, which pays for each sum",
        )


def sums_of(algorithm: Algorithm) -> int:
    """Secure sums in a round, those of the first round alone included."""
    return sum(channel.sums for channel in algorithm.channels(_PROBE).values())


def check_fits(algorithm: Algorithm, privacy: Privacy | ClientPrivacy | None, loss: Loss | None) -> None:
    """Whether the algorithm's releases are what the promise covers, and the task has what it needs.

    Raises: ConfigError naming the release that would not be charged; TaskError for a missing loss.
    """
    if algorithm.needs_loss and loss is None:
        raise TaskError(
            f"{algorithm.kind} needs the gradients of the records, and the task has no loss",
            hint="give loss(model, batch) -> tensor of one loss per record, shape (n,)",
        )
    if isinstance(privacy, ClientPrivacy):
        _check_client(algorithm)
    elif in_shares(privacy):
        check_algorithm(algorithm)
    elif privacy is not None:
        for release in algorithm.releases:
            if release.source == "data":
                raise ConfigError(
                    f"{algorithm.kind} also releases {release.what}, read from the records outside fit: record-level"
                    " privacy adds noise to the steps of fit only",
                    hint='give Privacy(noise="distributed"), which adds noise to them in shares, under a secure sum'
                    if algorithm.in_shares
                    else "use FedAvg, FedProx, SCAFFOLD, FedAdam, FedYogi or FedNova; or ClientPrivacy",
                )


def check_weights(algorithm: Algorithm, privacy: Privacy | ClientPrivacy | None, weights: str) -> None:
    """Raises: ConfigError where parties are to count alike, and one with more records would count for more."""
    if weights != "equal":
        return
    if in_shares(privacy):
        raise ConfigError(
            'weights="equal" with noise="distributed" of records: a step sums the records that were drawn, and a party'
            " with more of them counts for more",
            hint="leave weights out",
        )
    if algorithm.by_records:
        raise ConfigError(
            f'{algorithm.kind} with weights="equal": what a party sends grows with the records that it says it has,'
            " whatever the weights of the mean",
            hint="leave weights out, or use another algorithm, such as FedAvg, DANE or FSVRG(scaled=False)",
        )


def _check_client(algorithm: Algorithm) -> None:
    """Client-level privacy clips one vector of the model's length per sum, and knows no state beside it."""
    for name, channel in algorithm.channels(_PROBE).items():
        if channel.length != _PROBE.length or channel.largest_count is not None:
            raise ConfigError(
                f"{algorithm.kind}: what its {name!r} exchange releases is not one vector like the weights, which"
                " client-level privacy could clip as a whole",
                hint=algorithm.client_hint,
            )
    if algorithm.keeps:
        raise ConfigError(
            f"{algorithm.kind}: its parties keep state that must agree with the sums, and clipping breaks that",
            hint=algorithm.client_hint,
        )


def check_secret_cohorts(
    privacy: Privacy | ClientPrivacy | None,
    participation: Participation,
    secure_sum: SecureSum,
    keep: Keep,
    clients: int,
    sums: int,
) -> None:
    """Nothing without a `sample_rate` in the promise. clients: how many there are. sums: in one round.

    What the promise rests on: with probability q a client is in a cohort, by itself, and whoever is held off sees no
    more of a round than its model. Cohorts can be known where they are drawn from a public seed, of a fixed size, taken
    among those who happened to be available, or told to their own members, as the roster of a secure sum is. A round
    that fails tells that few were drawn: none may, but for a chance far below delta.

    Raises: ConfigError for cohorts that are not as the promise says, or not secret.
    """
    if not isinstance(privacy, ClientPrivacy) or privacy.sample_rate is None:
        return
    rate = privacy.sample_rate
    if participation.rate != rate:
        raise ConfigError(
            f"the promise has sample_rate = {rate:g}, and participation.rate is {participation.rate}",
            hint=f"give Participation(rate={rate:g}): each client is drawn by itself, never a cohort of fixed size",
        )
    if participation.draw != "system":
        raise ConfigError(
            'participation.draw = "seed" with a sample_rate in the promise: cohorts that are drawn from a public seed'
            " are known to everybody",
            hint='leave draw out: "system" draws them from the operating system\'s randomness',
        )
    if not participation.availability.always or participation.deadline is not None or participation.patience:
        raise ConfigError(
            "availability, a deadline or patience with a sample_rate in the promise: who is there, in time, or there"
            " again would decide with the draw who is in a sum",
            hint="leave them out; dropouts may be given",
        )
    if secure_sum.name != "plain":
        raise ConfigError(
            f"a sample_rate with the secure sum {secure_sum.name!r}: members of a cohort are told who else is in it",
            hint="use Plain(): the server is trusted with the updates, the cohorts and the noise; or leave it out",
        )
    if keep.transcript is not None:
        raise ConfigError(
            "a transcript with a sample_rate in the promise: it shows who was selected",
            hint="leave the transcript out, or the sample_rate",
        )
    if sums != 1:
        raise ConfigError(
            f"a sample_rate with an algorithm of {sums} sums in a round: they are of one cohort, drawn once",
            hint="use FedAvg, FedProx, FedAdam, FedYogi or FedNova",
        )
    _check_size(participation, rate, clients)


def _check_size(participation: Participation, rate: float, clients: int) -> None:
    """Raises: ConfigError where a round may have too few clients, which would be seen."""
    from scipy import stats  # here, since it takes long to load

    there = rate * math.prod(1.0 - chance for chance in participation.dropouts.chances)
    least = participation.fewest(clients)
    if float(stats.binom.cdf(least - 1, clients - 1, there)) > FAILS:
        raise ConfigError(
            f"of {clients} clients, each drawn with probability {rate:g}, fewer than the {least} of"
            " participation.least may be there: a round that fails would tell that few were drawn",
            hint="give least=2, and a rate with which some 75 clients or more are expected",
        )


def check_contributors(
    secure_sum: SecureSum,
    algorithm: Algorithm,
    privacy: Privacy | ClientPrivacy | None,
    keep: Keep,
    task: Task,
    datasets: Mapping[str, Any],
) -> None:
    """Of a sum that counts contributors: is a coordinate that no record of a party touches zero in what it sends?

    Raises: ConfigError for noise; for algorithms whose parties send more than the change of their own training; for an
    optimizer that moves weights without data; and for a transcript, which knows one sum in an exchange.
    """
    _check_grouped(secure_sum, algorithm, keep)
    if getattr(secure_sum, "contributors", None) is None:
        return
    if privacy is not None:
        raise ConfigError(
            "contributors with differential privacy: noise is not zero anywhere, so every party contributes to all",
            hint="leave contributors out: all coordinates are published whatever the data are, each with noise for a"
            " whole vector, so which are published tells nothing, and costs no delta (docs/secure-sums.md)",
        )
    if algorithm.kind not in ("fedavg", "fedprox", "fedadam", "fedyogi"):
        raise ConfigError(
            f"contributors with {algorithm.kind}: its parties send what is not zero where they have no data",
            hint="use fedavg, fedprox, fedadam or fedyogi, whose parties send the change of their own training",
        )
    if keep.transcript is not None:
        raise ConfigError("contributors with a transcript: it would tell of two sums in the place of one")
    if (dataset := next(iter(datasets.values()), None)) is None:
        return
    # Where one party alone has data, all would seem to contribute, and what the others add is known.
    with caller_keeps_generators(), torch.random.fork_rng(devices=[]):
        _, optimizer, _ = checked_build(task.build, dataset)
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        raise ConfigError(
            "contributors with weight decay: every party moves every weight, whether it has data there or not",
            hint="train without weight_decay, or leave contributors out",
        )


def _check_grouped(secure_sum: SecureSum, algorithm: Algorithm, keep: Keep) -> None:
    """Raises: ConfigError for algorithms whose sums are no means of like vectors, and for a transcript."""
    if not isinstance(secure_sum, Grouped):
        return
    if algorithm.kind not in ("fedavg", "fedprox", "fedadam", "fedyogi", "gd"):
        raise ConfigError(
            f"robust means with {algorithm.kind}: nobody knows what a median of its sums is",
            hint="use fedavg, fedprox, fedadam, fedyogi or gd",
        )
    if keep.transcript is not None:
        raise ConfigError("robust means with a transcript: it would tell of many sums in the place of one")
