"""A promise to clients, kept by one of them in a process of its own: what it is charged, and which sums it may join."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from choral.errors import ConfigError
from choral.privacy import AdaptiveClip, ClientPrivacy, ClientPrivacyEngine, Ledger, Privacy
from choral.privacy.ledgers.plans import passes_left
from choral.protocols.driver import PartyDriver
from choral.trainers.federated.record_shares.own_process import demanded_of

if TYPE_CHECKING:
    from choral.trainers.federated.terms.training_terms import TrainingTerms


def clients_of(
    terms: TrainingTerms, privacy: Privacy | ClientPrivacy | None, ledger: Ledger | None, holder: str
) -> ClientPrivacyEngine | None:
    """What keeps a promise to clients at one of them, for the sums that its ledger has not paid for; None for another.

    The ledger is of what was said of this client. Every sum is charged as one over the fewest survivors: how many there
    were it never learns for sure.

    Raises: ConfigError (delta not below 1/n; a clipping norm that moves, which only the server could tell);
        BudgetExceededError; LedgerError.
    """
    if not isinstance(privacy, ClientPrivacy) or ledger is None:
        return None
    if isinstance(privacy.clip, AdaptiveClip):
        raise ConfigError(
            "a clipping norm that adapts follows the sums, which a party in a process of its own does not see",
            hint="give ClientPrivacy(clip=NUMBER)",
        )
    channels = terms.algorithm.channels(terms.federation).values()
    sums = terms.rounds * sum(channel.sums for channel in channels if not channel.once)
    planned = passes_left(ledger, privacy.epsilon)
    return ClientPrivacyEngine(
        privacy,
        clients=terms.federation.parties,
        length=terms.federation.length,
        rounds=sums if planned is None else min(sums, planned),
        ledger=ledger,
        holder=holder,
    )


def check_sums(clients: ClientPrivacyEngine | None, drivers: Mapping[str, PartyDriver]) -> None:
    """Whether a client's own terms of its sums keep up the noise of which it adds one share.

    Raises: ConfigError for a sum that shows single vectors, that may be opened over fewer clients than the noise is
        sized for, or that withstands fewer colluders.
    """
    if clients is None or clients.privacy.noise != "distributed":
        return
    for driver in drivers.values():
        _, least, corrupt = demanded_of(driver)
        if least < clients.min_survivors:
            raise ConfigError(
                f"this party's policy takes part in sums of {least}, but the noise is sized for"
                f" {clients.min_survivors}",
                hint=f"give Policy(minimum_cohort={clients.min_survivors})",
            )
        if corrupt < (colluders := clients.privacy.colluders):
            raise ConfigError(
                f"this party's policy expects {corrupt} corrupt parties, and the noise {colluders} colluders, who know"
                " their shares",
                hint=f"give Policy(corrupt={colluders}), or more",
            )
