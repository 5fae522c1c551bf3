"""The prices that a report is made with: a dated table, and what the user puts in its place."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from choral.audits.costs.job import Job
from choral.errors import ConfigError
from choral.trainers.task import arguments

TABLE = Path(__file__).with_name("prices.toml")


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One price, or one assumption that a price is multiplied by. value: in ``unit``, finite and not negative.

    page: address and date of a public page that was read, and what it says; empty where none was. as_of: the date of
    the figure, empty of an assumption.
    """

    value: float
    unit: str
    source: str
    page: str = ""
    as_of: str = ""


@dataclass(frozen=True, kw_only=True)
class PriceSettings:
    """What is put in the place of the price table's entries; what is None is taken from the table."""

    accelerator_hour: float | None = None
    """USD per accelerator-hour in the cloud."""
    accelerator_speedup: float | None = None
    """How many times faster an accelerator trains than one core of the measured device; used where none was measured.
    """
    accelerators: float | None = None
    """How many accelerators train together in the cloud."""
    accelerator_efficiency: float | None = None
    """What each accelerator beyond the first adds, of one alone, 0 to 1."""
    accelerator_watts: float | None = None
    """Power of an accelerator at work, in W; used where it was not measured."""
    storage_gb_month: float | None = None
    """USD per GB and month of pooled data."""
    storage_months: float | None = None
    """Months that the pooled data is kept."""
    party_egress_gb: float | None = None
    """USD per GB that a party sends."""
    server_egress_gb: float | None = None
    """USD per GB that the server sends."""
    network_joules_per_byte: float | None = None
    """Energy of the network, in J per byte."""
    party_mbps: float | None = None
    """A party's line in either direction, in Mbit/s."""
    round_trips: float | None = None
    """Times per round that all parties wait for the server."""
    round_trip_seconds: float | None = None
    """Seconds of one such wait."""
    rounds_per_day: float | None = None
    """How many rounds a day the parties take part in, 0 where one follows on the other at once."""
    server_hour: float | None = None
    """USD per hour of the federation's server."""
    server_watts: float | None = None
    """Power of the federation's server, in W."""
    device_watts: float | None = None
    """Power of a party's device at work, in W; used where it was not measured."""
    kwh: float | None = None
    """USD per kWh that a party pays for its device."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                _check(field.name, value, "price.")


POSITIVE_COUNTS = ("accelerators",)  # at least 1
KEYS = tuple(field.name for field in dataclasses.fields(PriceSettings))
_POSITIVE = (
    "accelerator_speedup",
    "accelerators",
    "party_mbps",
)  # something is divided by these


@dataclass(frozen=True, kw_only=True)
class Prices:
    """A complete table. as_of: the date of its list prices, as text. origin: the file, or "shipped table". job: of the
    reader, whose bill a comparison makes with them.
    """

    as_of: str
    origin: str
    entries: Mapping[str, Price]
    job: Job | None = None

    def __getitem__(self, key: str) -> float:
        return self.entries[key].value


def read_prices(path: str | Path | None = None, changes: PriceSettings | None = None, job: Job | None = None) -> Prices:
    """The shipped table, with the entries of the file ``path`` in place of its own, and ``changes`` in place of both.

    job: the reader's own, to whose size a comparison scales its bill, beside that of what was run.

    A file holds any of the tables of ``prices.toml``, each with ``value`` and ``source`` (the unit is fixed), and
    optionally ``as_of``.

    Raises: ConfigError naming file and key: missing file, not TOML, unknown key, wrong type, a value out of range.
    """
    shipped = _read(TABLE)
    as_of, origin, entries = str(shipped.pop("as_of")), "shipped table", _entries(shipped, TABLE, {})
    if path is not None:
        own = _read(Path(path))
        as_of = f"{as_of}; {Path(path).name}: {own.pop('as_of', 'no date given')}"
        origin = f"shipped table and {Path(path).name}"
        entries = entries | _entries(own, Path(path), entries)
    for key in KEYS:
        if changes is not None and (value := getattr(changes, key)) is not None:
            entries[key] = Price(value=float(value), unit=entries[key].unit, source=f"given as price.{key}")
    return Prices(as_of=as_of, origin=origin, entries={key: entries[key] for key in KEYS}, job=job)


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no price table at {path}", hint="audits/costs/prices.toml is one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="a price table is a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}", hint="audits/costs/prices.toml is one to start from"
        ) from None


def _entries(table: Mapping[str, object], path: Path, known: Mapping[str, Price]) -> dict[str, Price]:
    found = {}
    for key, entry in table.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KEYS)}"
            raise ConfigError(f"{path}: unknown price {key}", hint=hint)
        if isinstance(entry, dict) and key in known:
            if entry.get("unit", known[key].unit) != known[key].unit:
                raise ConfigError(f"{path}: {key} is in {entry['unit']}, expected {known[key].unit}")
            entry = {**entry, "unit": known[key].unit}
        try:
            price = msgspec.convert(entry, Price, strict=True)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"{path}: {key}: {error}", hint='write [KEY], then value = 1.0 and source = "..."'
            ) from None
        _check(key, price.value, f"{path}: ")
        found[key] = price
    return found


def _check(key: str, value: float, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}{key} is {arguments.shown(value)}, expected a number")
    if not (math.isfinite(value) and value >= 0) or (value == 0 and key in _POSITIVE):
        least = "> 0" if key in _POSITIVE else ">= 0"
        raise ConfigError(f"{where}{key} is {value}, expected a finite number {least}")
    if (key == "accelerator_efficiency" and value > 1) or (key in POSITIVE_COUNTS and value < 1):
        expected = "at most 1" if key == "accelerator_efficiency" else "at least 1"
        raise ConfigError(f"{where}{key} is {value}, expected {expected}")
