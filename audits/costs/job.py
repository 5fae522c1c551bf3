"""The reader's own job, as the settings name it, to whose size a report scales its bill."""

from __future__ import annotations

import math
from dataclasses import dataclass

from choral.audits.costs.devices import accelerator, device
from choral.errors import ConfigError
from choral.trainers.task import arguments


@dataclass(frozen=True, kw_only=True)
class Job:
    """The reader's own job, whose bill the report makes from what was measured; what is None is as it was here."""

    parties: int | None = None
    """How many parties there are."""
    records: float | None = None
    """Records of each party, in the mean."""
    record_bytes: float | None = None
    """Bytes of a record that pooling would move."""
    parameters: int | None = None
    """Parameters of the model: bytes of a round and seconds of training grow in proportion."""
    rounds: int | None = None
    """Rounds of the federation; by default those to the target, or, where it was not reached, of the run."""
    cloud_rounds: int | None = None
    """The same of the pooled training."""
    selected: float | None = None
    """Share of the parties that are there which a round selects, 0 to 1."""
    available: float | None = None
    """Share of the parties that are there when a round begins, 0 to 1."""
    rounds_per_day: float | None = None
    """Rounds a day, 0 for one after another; by default of the slowest class of devices, or of the run's clock."""
    core_seconds: float | None = None
    """Seconds of training of one record and round on one core, where you have measured it."""
    accelerator: str = ""
    """The cloud's: p100, tpu-v2, h100, h200 or tpu-v5e; by default that of the price table."""
    accelerators: int | None = None
    """How many of them."""
    devices: tuple[str, ...] = ()
    """Classes of the parties' devices, in equal numbers: phone, laptop, small-server; a name may stand several times.
    By default the measured core, with the price table's watts and line."""

    def __post_init__(self) -> None:
        for name in ("parties", "records", "record_bytes", "parameters", "rounds", "cloud_rounds", "accelerators"):
            _check(name, getattr(self, name))
        for name in ("selected", "available"):
            _check(name, getattr(self, name), most=1.0)
        _check("core_seconds", self.core_seconds)
        _check("rounds_per_day", self.rounds_per_day, zero=True)
        arguments.instance(self.accelerator, "report.job.accelerator", str, 'a name, such as "h100"')
        arguments.instance(self.devices, "report.job.devices", (tuple, list), 'names, such as ["phone"]')
        if self.accelerator:
            accelerator(self.accelerator)
        for name in self.devices:
            arguments.instance(name, "report.job.devices", str, 'names, such as ["phone"]')
            device(name)


def _check(name: str, value: float | None, *, zero: bool = False, most: float = math.inf) -> None:
    if value is None:
        return
    number = arguments.number(value, f"report.job.{name}", "a number")
    if not (math.isfinite(number) and 0 <= number <= most) or (number == 0 and not zero):
        expected = f"{'>= 0' if zero else '> 0'}{'' if most == math.inf else f' and <= {most:g}'}"
        raise ConfigError(f"report.job.{name} is {number:g}, expected a finite number {expected}")
