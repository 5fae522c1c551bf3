"""How long a coordinator waits for whom, by the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.jobs.settings import Settings

if TYPE_CHECKING:
    from choral.network.coordinator.sites import Waits


def waits_of(settings: Settings) -> Waits:
    from choral.network.coordinator.sites import Waits

    chosen = settings.serve
    return Waits(sites=chosen.wait, quorum=chosen.quorum, training=chosen.training, step=chosen.step, away=chosen.away)
