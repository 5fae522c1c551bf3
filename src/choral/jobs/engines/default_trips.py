"""How many trips a masked sum takes where a job file does not say: by the engine that carries them.

Over Flower a message waits seconds for the next look of a SuperNode, so that trips are what a round takes. NVFlare
pushes its messages, as `choral serve` does: there four trips are milliseconds, and confirm who is in the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings
from choral.jobs.training import privacy_of, secure_sum_of

Engine = Literal["none", "flower", "nvflare"]
SLOW: tuple[Engine, ...] = ("flower",)
"""Where trips are slow."""


def with_trips(settings: Settings, names: Sequence[str], engine: Engine) -> Settings:
    """The settings, and in them how many trips: what they say; else two, where the engine is slow and that costs no
    honest vector; else four. names: of the sites.
    """
    chosen = settings.secure_sum
    if chosen.kind != "masked" or chosen.trips is not None:
        return settings
    few = engine in SLOW and settings.serve.quorum is None  # with one, a session may be of fewer than is stated of all
    few = few and not counts_on_survivors(settings) and none_is_smaller(settings, names)
    return replace(settings, secure_sum=replace(chosen, trips=2 if few else 4))


def counts_on_survivors(settings: Settings) -> bool:
    """Whether noise is shared out, and so is paid for by who is in a sum for certain."""
    from choral.privacy import ClientPrivacy

    if settings.privacy.epsilon is None:
        return False
    privacy = privacy_of(settings, Arm(private=True), settings.privacy.epsilon)
    return isinstance(privacy, ClientPrivacy) or privacy.noise == "distributed"


def none_is_smaller(settings: Settings, names: Sequence[str]) -> bool:
    """Whether no sum in two trips may be opened over fewer sites than in four, whoever is there when a session opens.

    So what a site asks for of four trips, it has in two. False where two trips cannot be had for these numbers.
    """
    from choral.protocols import Masked, SpecError, SumSpec
    from choral.protocols.masking.ahead.floor import fewest_opened

    def fewest(trips: Any, there: int) -> int:
        """0 where there is no such sum."""
        said = replace(settings, secure_sum=replace(settings.secure_sum, trips=trips))
        spec = SumSpec(parties=tuple(names[:there]), length=1, bound=1, directory=len(names))
        try:
            summing = secure_sum_of(said, Arm())
            return fewest_opened(summing.setup(spec, session=bytes(16))) if isinstance(summing, Masked) else 0
        except (SpecError, ConfigError):
            return 0

    return all(fewest(2, there) >= fewest(4, there) for there in range(2, len(names) + 1)) and fewest(2, len(names)) > 0


def said_of(settings: Settings) -> str:
    """For the coordinator's log."""
    if settings.secure_sum.trips != 2:
        return ""
    return (
        "secure sums in two trips: no sum is over fewer sites than in four, and no receipt names who is in it;"
        " [secure_sum] trips = 4 has that"
    )
