"""A ledger in a few lines: noisy steps of one kind that follow each other, taken together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from choral.privacy import Ledger
    from choral.privacy.accounting.events import Event


class Phase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Noisy steps of one kind on a ledger. mechanism: in words. first, last: the events that they stand in, from 1."""

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    first: int
    last: int


def phases_of(ledger: Ledger) -> tuple[Phase, ...]:
    """The ledger in the order in which it was written, alike events that follow each other taken together."""
    from choral.privacy.accounting.events import CLIENT_UNIT

    phases: list[Phase] = []
    for place, event in enumerate(ledger.releases if ledger.unit == CLIENT_UNIT else ledger.events, 1):
        phase = Phase(
            mechanism=_in_words(event),
            noise_multiplier=event.noise_multiplier,
            sample_rate=getattr(event, "sample_rate", 1.0),  # of clients, one has it whose cohorts are secret
            steps=event.steps,
            first=place,
            last=place,
        )
        before = phases[-1] if phases else None
        if before and msgspec.structs.replace(before, steps=0, first=0, last=0) == msgspec.structs.replace(
            phase, steps=0, first=0, last=0
        ):
            phases[-1] = msgspec.structs.replace(before, steps=before.steps + phase.steps, last=place)
        else:
            phases.append(phase)
    return tuple(phases)


def _in_words(event: Event) -> str:
    from choral.privacy.accounting.banded_shares import BandedShares
    from choral.privacy.accounting.events import (
        ClientRelease,
        CorrelatedGaussian,
        PoissonSampledGaussian,
        PoissonSampledShares,
        SampledClientRelease,
    )

    if isinstance(event, SampledClientRelease):
        return "Gaussian, of secret cohorts"
    if isinstance(event, ClientRelease):
        words = f"{event.mechanism.replace('_', ' ')}, {event.shares} unknown shares"
        return words + (", counted anew by who survived" if event.settles else "")
    if isinstance(event, CorrelatedGaussian):
        return f"correlated Gaussian, pass {event.number}"
    if isinstance(event, PoissonSampledGaussian):
        return "Poisson-sampled Gaussian"
    if isinstance(event, PoissonSampledShares):
        return f"Poisson-sampled Gaussian in shares, {event.honest} unknown"
    if isinstance(event, BandedShares):
        bands, every = len(event.coefficients), event.separation
        return f"correlated Gaussian, {bands} bands, in shares, {event.honest} unknown; a record every {every} steps"
    return f"search among {event.mean:g} tries in the mean, of each try"
