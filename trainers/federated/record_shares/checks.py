"""What noise in shares is refused for, before anything is trained: algorithms, sums and rounds that break its theorem.

docs/noise-in-shares.md has the theorem, and under "Never at a party" why several local steps are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, Privacy
from choral.privacy.accounting.plain_numbers import as_integer
from choral.protocols.interface import SecureSum, SumSpec
from choral.protocols.tap import watched_by
from choral.trainers.algorithms.interface import Algorithm
from choral.trainers.federated.participation import Participation

if TYPE_CHECKING:
    from collections.abc import Sequence

_FEDSGD = "use FedSGD(batch_size=..., steps_per_round=...) or GD(), whose parties make one step between two sums"


def in_shares(privacy: Privacy | ClientPrivacy | None) -> TypeGuard[Privacy]:
    """Whether the promise is of records, by noise to which each party adds a share."""
    return isinstance(privacy, Privacy) and privacy.noise == "distributed"


def check_algorithm(algorithm: Algorithm) -> None:
    """Raises: ConfigError, with the reason, unless its parties make one step between two sums."""
    if algorithm.in_shares:
        return
    raise ConfigError(
        f'{algorithm.kind} with noise="distributed": its parties make several steps between two sums, each of which'
        " follows the party's own share of the noise of the one before; shares are enough only where all of a step's"
        " are summed before the next, and several local steps would promise more than they keep",
        hint=_FEDSGD,
    )


def check_sum(privacy: Privacy, secure_sum: SecureSum) -> None:
    """Raises: ConfigError for a sum under a key that every party holds, or that withstands fewer than the colluders."""
    if getattr(secure_sum, "key", None) == "shared":
        raise ConfigError(
            'noise="distributed" under a shared key: any one party opens every other\'s vector, which has a share of'
            " the noise alone",
            hint='use Masked(...), or Homomorphic(key="split")',
        )
    corrupt = getattr(secure_sum, "corrupt", None)
    if isinstance(corrupt, int) and corrupt < privacy.colluders:
        raise ConfigError(
            f"the sum withstands {corrupt} corrupt parties, and the noise {privacy.colluders} colluders",
            hint=f"give the secure sum corrupt={privacy.colluders}, or more",
        )


def check_rounds(participation: Participation, parties: int) -> None:
    """Raises: ConfigError for rounds that ask some of the parties, and a least number that is more than all."""
    if not participation.everybody:
        raise ConfigError(
            'noise="distributed" needs every party in every step: the noise is sized for the survivors among all',
            hint="leave out cohort, rate and availability; dropouts, a deadline and patience may be given",
        )
    if participation.least is not None and participation.least not in range(2, parties + 1):
        raise ConfigError(
            f"participation.least is {participation.least} of {parties} parties, the fewest in a plain sum",
            hint="a number from 2 to all of them; leave it out for a majority",
        )


def check_shares(
    privacy: Privacy | ClientPrivacy | None,
    secure_sum: SecureSum,
    participation: Participation,
    parties: Sequence[str],
) -> None:
    """All but the algorithm, which is checked where others are; of another promise nothing.

    Raises: ConfigError; what opening the sum does.
    """
    if not in_shares(privacy):
        return
    check_sum(privacy, secure_sum)
    check_rounds(participation, len(parties))
    fewest = fewest_survivors(secure_sum, participation, parties)
    if fewest <= privacy.colluders:
        raise ConfigError(
            f"a sum may be opened over {fewest} parties, of which {privacy.colluders} may be colluders: no honest"
            " party's noise would be left",
            hint=f"give the secure sum min_survivors={privacy.colluders + 1} at least; the more, the less noise",
        )


def check_processes(privacy: Privacy | ClientPrivacy | None) -> None:
    """Raises: ConfigError where several processes would train, each with some of the parties."""
    if in_shares(privacy):
        raise ConfigError(
            'noise="distributed" is computed by one process, and there are several', hint="start it without torchrun"
        )


def fewest_survivors(secure_sum: SecureSum, participation: Participation, parties: Sequence[str]) -> int:
    """Over how few parties a sum may be opened at least, by what the sum states; fixed before the first round.

    A plain sum states nothing. There the server is trusted to open none over fewer than participation.least, by default
    a majority. Raises: ConfigError for a sum that does not say; what opening one does.
    """
    if secure_sum.name == "plain":
        return participation.least or len(parties) // 2 + 1
    with watched_by(None):  # nothing is summed here, and a transcript has the messages of sums
        stated = secure_sum.open(SumSpec(parties=tuple(parties), length=1, bound=1)).statement.get("min_survivors")
    if stated is None:
        raise ConfigError(
            f"the secure sum {secure_sum.name!r} does not state over how few parties it may be opened",
            hint="use Masked(...) or Homomorphic(...)",
        )
    return as_integer("min_survivors", stated)
