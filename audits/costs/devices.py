"""Accelerators and parties' devices by name, from dated data sheets, for a bill of the reader's own job."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from choral.errors import ConfigError

TABLE = Path(__file__).with_name("devices.toml")
Kind = TypeVar("Kind")


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a cloud. tflops: the peak of its data sheet, in ``arithmetic``. watts, usd_hour: None where no page had it."""

    name: str
    tflops: float
    arithmetic: Literal["float32", "bfloat16"]
    watts: float | None = None
    usd_hour: float | None = None
    as_of: str = ""
    page: str = ""


class DeviceClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a party. speed: times one core of the measured machine. mbps: in either direction. rounds_per_day: 0 if it is
    always there.
    """

    name: str
    speed: float
    watts: float
    mbps: float
    rounds_per_day: float = 0.0
    as_of: str = ""
    page: str = ""


class ReferenceDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peaks of the board that the price table's ``accelerator_speedup`` stands for, in Tflop/s."""

    float32: float
    bfloat16: float
    page: str


class DeviceTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of ``devices.toml``."""

    reference: ReferenceDevice
    accelerators: dict[str, Accelerator]
    devices: dict[str, DeviceClass]


@cache
def device_table() -> DeviceTable:
    """The shipped table, read once."""
    return msgspec.toml.decode(TABLE.read_bytes(), type=DeviceTable, strict=True)


def accelerator(name: str) -> Accelerator:
    """Raises: ConfigError for a name that the table lacks."""
    return _named(device_table().accelerators, name, "report.job.accelerator")


def device(name: str) -> DeviceClass:
    """Raises: ConfigError for a name that the table lacks."""
    return _named(device_table().devices, name, "report.job.devices")


def _named(known: dict[str, Kind], name: str, key: str) -> Kind:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"{key} is {name!r}, which audits/costs/devices.toml does not have", hint=hint)
    return known[name]


def speedup(chosen: Accelerator, reference: float) -> float:
    """Over one core of the measured device: ``reference``, the price table's assumption, in proportion to the peaks."""
    return reference * chosen.tflops / float(getattr(device_table().reference, chosen.arithmetic))
