"""Whether algorithm, participation and promise fit each other: refused before anything is trained."""

from __future__ import annotations

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, Privacy
from choral.trainers.algorithms.interface import Algorithm, FederationInfo
from choral.trainers.federated.participation import Dropouts, Participation
from choral.trainers.task.task import Loss, TaskError

_PROBE = FederationInfo(parties=2, length=7, examples=2, largest=2, value_bound=1.0)


def participation_of(
    algorithm: Algorithm, given: Participation | None, cohort: int | None, dropout_rate: float
) -> Participation:
    """What was given, or what its two shorthands say. dropout_rate: of a round, spread over its sums.

    Raises: ConfigError if both were given.
    """
    if given is not None:
        if cohort is not None or dropout_rate:
            raise ConfigError(
                "cohort and dropout_rate are short for parts of participation, which is given too",
                hint="Participation(cohort=..., dropouts=Dropouts(vector=...))",
            )
        return given
    sums = sum(not channel.once for channel in algorithm.channels(_PROBE).values())
    return Participation(cohort=cohort, dropouts=Dropouts(vector=1 - (1 - dropout_rate) ** (1 / sums)))


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

    Over other survivors, so that the difference of the two sums may be one party's vector. Client-level privacy pays
    for each sum, and a plain sum hides no vector. Raises: ConfigError for several sums in a round, and patience.
    """
    several = len(algorithm.channels(_PROBE)) > 1
    if participation.patience and several and secure_sum != "plain" and not isinstance(privacy, ClientPrivacy):
        raise ConfigError(
            f"{algorithm.kind} has several sums in a round: one that fails after the first is retried from the same"
            " weights, and the server sees the same vectors summed over other survivors",
            hint="leave out participation.patience, or use ClientPrivacy, which pays for each sum",
        )


def check_fits(algorithm: Algorithm, privacy: Privacy | ClientPrivacy | None, loss: Loss | None) -> None:
    """Whether the algorithm's releases are what the promise covers, and the task has what it needs.

    Raises: ConfigError naming the release that would not be charged; TaskError for a missing loss.
    """
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(f"algorithm is {algorithm!r}, expected one such as FedAvg()", hint="see docs/algorithms.md")
    if algorithm.needs_loss and loss is None:
        raise TaskError(
            f"{algorithm.kind} needs the gradients of the records, and the task has no loss",
            hint="give loss(model, batch) -> tensor of one loss per record, shape (n,)",
        )
    if isinstance(privacy, ClientPrivacy):
        _check_client(algorithm)
    elif privacy is not None:
        for release in algorithm.releases:
            if release.source == "data":
                raise ConfigError(
                    f"{algorithm.kind} also releases {release.what}, read from the records outside fit: record-level"
                    " privacy adds noise to the steps of fit only",
                    hint="use FedAvg, FedProx, SCAFFOLD, FedAdam, FedYogi or FedNova; or ClientPrivacy",
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
