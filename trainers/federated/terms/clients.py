"""A promise to clients, kept by one of them in a process of its own: what it is charged, and which sums it may join."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from choral.errors import ConfigError
from choral.privacy import (
    AdaptiveClip,
    BudgetExceededError,
    ClientPrivacy,
    ClientPrivacyEngine,
    Ledger,
    Privacy,
)
from choral.privacy.accounting.budget import at_least
from choral.privacy.accounting.events import ClientRelease
from choral.privacy.ledgers.plans import LedgerState, RemainingBudget
from choral.protocols.driver import PartyDriver
from choral.trainers.federated.record_shares.own_process import demanded_of

if TYPE_CHECKING:
    from choral.trainers.federated.terms.training_terms import TrainingTerms


def clients_of(
    terms: TrainingTerms,
    privacy: Privacy | ClientPrivacy | None,
    ledger: Ledger | None,
    holder: str,
    *,
    begun: bool = True,
) -> ClientPrivacyEngine | None:
    """What keeps a promise to clients at one of them, for the sums that its ledger has not paid for; None for another.

    The ledger is of what was said of this client. Every sum is charged as one over the fewest survivors: how many there
    were it never learns for sure.

    **One noise for all.** The sum is decoded as one, and noise that the server adds is the server's: what is charged
    here must be what is added there. So the noise is what everybody computes alike, as if nothing had been spent, or
    what the promise names; never what this ledger has room for. A plan with it is admitted here by this ledger alone:
    exactly if it is the first, by a filter if something was released before (:mod:`choral.privacy.ledgers.plans`).

    begun: whether this training may have been charged before a restart. One that was not makes a plan of its own where
    that of an earlier one, of the same noise, is used up.

    Raises: ConfigError (delta not below 1/n; a clipping norm that moves, which only the server could tell);
        BudgetExceededError, where the noise is not named and something was spent, or too little is left for it;
        LedgerError.
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

    def engine(privacy: ClientPrivacy, rounds: int, ledger: Ledger) -> ClientPrivacyEngine:
        clients, length = terms.federation.parties, terms.federation.length
        return ClientPrivacyEngine(privacy, clients=clients, length=length, rounds=rounds, ledger=ledger, holder=holder)

    alike = engine(privacy, sums, Ledger())  # as at the server and at every client
    remaining = RemainingBudget.on(ledger, privacy.epsilon, privacy.delta)
    left = _left_of(remaining.state, privacy.epsilon, alike.release)
    if left == 0 and not begun:
        left = None
    if left is None and not remaining.empty and privacy.noise_multiplier is None:
        raise _unnamed(ledger, alike.least_noise(remaining, sums), sums)
    return engine(replace(privacy, noise_multiplier=alike.ratio), sums if left is None else min(left, sums), ledger)


def _left_of(state: LedgerState, epsilon: float, release: ClientRelease) -> int | None:
    """How many sums are left of the latest plan, if it is this training's, begun before a restart; None otherwise."""
    latest = state.latest
    if latest is None or latest.epsilon != epsilon or [part.event for part in latest.parts] != [release]:
        return None
    return sum(state.left)


def _unnamed(ledger: Ledger, ratio: float, sums: int) -> BudgetExceededError:
    spent = ledger.epsilon(ledger.delta) if ledger.delta is not None else 0.0
    return BudgetExceededError(
        "noise of clients must be the same at all of them, who do not know what was spent at each other: a job on data"
        f" of which something was spent must name it, and of this data epsilon {at_least(spent)} was. For {sums} sums"
        f" it has room for privacy.noise_multiplier = {at_least(ratio)}, or more",
        hint="the largest that a client has room for fits all of them",
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
