"""Probe noise in shares: do the parties' steps do what their ledgers say, and the sum what its plan promises?

The records are those of :mod:`choral.audits.attacks.probing`, dealt out among as many parties as a sum is opened over
at least. In each step every party makes its vector, and the sum of all is opened. The adversary is as strong as the
promise supposes: it knows the vectors of `colluders` parties and **subtracts them**, so that what it looks at is the
sum of the honest ones', in the worst case. Its variance in coordinates that no record touches is the noise that the
theorem counts on. A sum sized for all parties, one without a margin for the colluders, and one to which a party adds
nothing are each below it by a known part (1 - h/n, 1/(h + 1), 1/h).

Correlated noise is made independent first, by the matrix C that the plan names: C times the sums is G + Z, in which
each record is in one step of a pass and what is left is the honest parties' z, of which the same holds.

A distinguisher finds none of these: bounds on epsilon by canaries are far below the promise, and stay below it. They
are made all the same, on the opened sums themselves (white box), against whatever is wrong by more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from torch.utils.data import DataLoader

from choral.audits.attacks.canaries import flip_coins
from choral.audits.attacks.probing import canary_count, judged, judged_correlated
from choral.audits.findings.evidence import Probe
from choral.audits.probes.records import ProbeLayout, ProbeRecords
from choral.audits.probes.seen import Seen
from choral.audits.probes.twins import twins
from choral.errors import ConfigError
from choral.privacy import (
    BandedPlan,
    CorrelatedGaussian,
    CorrelatedPrivacy,
    Ledger,
    Privacy,
    SharesParty,
    SharesPlan,
    SharesTerms,
    plan_shares,
)
from choral.privacy.accounting.matrix_strategies import Banded
from choral.privacy.ledgers.memory_notice import no_notice
from choral.privacy.ledgers.spending import spent_by_records

MakeParty = Callable[[Privacy, SharesPlan, str, Ledger], SharesParty]
_RATE, _STEPS = 0.4, 12
_EVERY = 4  # steps of a pass over fixed batches, and so the most bands


def probe_shares(
    privacy: Privacy,
    *,
    parties: int,
    min_survivors: int,
    make: MakeParty | None = None,
    confidence: float = 0.95,
) -> Probe:
    """Run the steps of `min_survivors` of `parties` parties twice on probe records, and test what is opened.

    privacy: the promise to be tested, ``Privacy(noise="distributed")``. make: a party, of its promise, plan, name and
        ledger; by default :class:`choral.privacy.SharesParty`, padded. Correlated noise is probed with at most 4 bands.
    Finds: noise of the honest parties that is smaller than the ledgers say, whoever it is that adds too little; noise
        used twice; more records drawn than the sample rate, or batches of fixed size; records beyond the clipping norm,
        or counted though they only fill a step up; and, by the canaries, whatever makes the whole cost more.
    Does not find: what the secure sum shows beside the sum, and what a step does on other data alone.
    Raises: ConfigError for a promise of another kind, or numbers that leave no honest party; what the parties raise.
    """
    if privacy.noise != "distributed":
        raise ConfigError(
            f'the promise is Privacy(noise="{privacy.noise}"), of noise that each party adds for itself',
            hint="choral.audits.probe is for that",
        )
    canaries = canary_count(privacy.epsilon, privacy.delta, confidence) // 2  # of as many parties, time for half
    if isinstance(privacy, CorrelatedPrivacy):
        privacy = dataclasses.replace(privacy, bands=min(privacy.bands or _EVERY, _EVERY))
    plans: list[SharesPlan] = []
    with no_notice():
        seen = twins(lambda: _opened(privacy, parties, min_survivors, make or _party, canaries, plans))
    if not isinstance(plan := plans[0], BandedPlan):
        return judged(seen, privacy.delta, confidence)
    noise = plan.share * math.sqrt(plan.honest)
    one = CorrelatedGaussian(strategy=Banded(plan.coefficients), noise=noise, steps=plan.separation, number=1)
    return judged_correlated(seen, one, privacy.delta, confidence)


def _party(privacy: Privacy, plan: SharesPlan, name: str, ledger: Ledger) -> SharesParty:
    return SharesParty(privacy, plan, holder=name, ledger=ledger)


def _opened(
    privacy: Privacy, parties: int, survivors: int, make: MakeParty, canaries: int, plans: list[SharesPlan]
) -> Seen:
    """One training on fresh coins: the sums, without what colluders sent, in clipping norms."""
    honest = survivors - privacy.colluders
    each = -(-canaries // max(honest, 1))
    layout, inside = ProbeLayout.of(canaries), flip_coins(canaries)
    correlated = isinstance(privacy, CorrelatedPrivacy)
    terms = SharesTerms(
        records=parties * each,
        batch_size=-(-parties * each // _EVERY) if correlated else int(_RATE * parties * each),
        steps=_STEPS,
        parties=parties,
        min_survivors=survivors,
        length=layout.length,
        most_records=each,
    )
    plan = plan_shares(privacy, terms)
    plans.append(plan)
    ledgers = [Ledger() for _ in range(survivors)]
    wrapped = []
    for place, ledger in enumerate(ledgers):
        first = place if place < honest else survivors * each  # a colluder's records are no secret: none is a canary
        records = ProbeRecords(each, layout, inside, plan.clip, first=first, stride=honest)
        party = make(privacy, plan, f"probe {place}", ledger)
        wrapped.append((party, *party.wrap(layout.model(), DataLoader(records))))
    released, drawn = np.zeros((_STEPS, layout.length)), np.zeros((_STEPS, honest * each), dtype=np.int64)
    for step in range(_STEPS):
        vectors = []
        for place, (party, model, optimizer, loader) in enumerate(wrapped):
            rows = []
            party.at(step)
            for x in loader:
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()
                rows.append(x[:, 0].long().numpy())
            if place < honest:
                np.add.at(drawn[step], np.concatenate(rows)[optimizer.taken], 1)
            vectors.append(party.take())
        opened, known = np.sum(vectors, axis=0), np.sum(vectors[honest:], axis=0)
        released[step] = (opened - known) * 2.0**-plan.grid.coarse
    spent = spent_by_records(ledgers[0], privacy.delta)
    return Seen(layout, released, drawn, inside, spent, 0.0 if correlated else 2.0**-plan.grid.coarse)
