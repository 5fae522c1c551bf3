"""Time, and energy as the machine's own meters count it: processor packages (RAPL) and NVIDIA boards (NVML).

Both meters count everything that the machine does meanwhile, other processes included, and neither counts memory
chips, disks or losses of the power supply. Where no meter can be read nothing is made up: the reading is None.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

RAPL = Path("/sys/class/powercap")
_Item = TypeVar("_Item")


@dataclass
class Stopwatch:
    """Seconds by the clock, and of this process's processors, while it runs; a context manager, to be used again."""

    seconds: float = 0.0
    processor: float = 0.0

    def __enter__(self) -> Stopwatch:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Stopwatch:
        self._began = time.perf_counter(), time.process_time()
        return self

    def stop(self) -> Stopwatch:
        self.seconds += time.perf_counter() - self._began[0]
        self.processor += time.process_time() - self._began[1]
        return self

    def over(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items; the time in which they are made counts, and what is done with them does not."""
        iterator = iter(items)
        while True:
            with self:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


class EnergyMeter:
    """Joules since the last reading. device: where the model trains; only "cuda" reads an NVIDIA board.

    meters: the names of what is read, empty where nothing can be.
    """

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self._packages = _packages(rapl)
        self._board = _board(device)
        if device.type == "cuda" and self._board is None:
            self._packages = []  # the processor alone would be taken for the whole
        self._before = self._read()

    @property
    def meters(self) -> tuple[str, ...]:
        boards = ("NVML",) if self._board is not None else ()
        return (*(f"RAPL {package.name}" for package in self._packages), *boards)

    def take(self) -> float | None:
        """Joules since the last call or the start; None without a meter, or if one stopped answering."""
        before, self._before = self._before, self._read()
        if not before or not self._before:
            return None
        joules = 0.0
        for (was, span), (now, _) in zip(before, self._before, strict=True):
            joules += (now - was) % span if span else now - was  # RAPL counters start over at their range
        return joules

    def _read(self) -> list[tuple[float, float]]:
        """Each meter's count and range, in J."""
        try:
            found = [
                (int((path / "energy_uj").read_text()) / 1e6, int((path / "max_energy_range_uj").read_text()) / 1e6)
                for path in self._packages
            ]
            if self._board is not None:
                library, handle = self._board
                found.append((library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0))
        except Exception:  # a meter that fails must not end a training; NVML's errors have no common base but this
            return []
        return found


def _packages(root: Path) -> list[Path]:
    """The folders of whole packages (``intel-rapl:0``, also on AMD) that may be read; their parts are in them."""
    found = []
    for path in sorted(root.glob("intel-rapl:*")):
        if path.name.count(":") == 1:
            with contextlib.suppress(OSError, ValueError):
                int((path / "energy_uj").read_text())
                int((path / "max_energy_range_uj").read_text())
                found.append(path)
    return found


def _board(device: torch.device) -> Any:
    """The NVML library and the board's handle, None where there is no board or no library (nvidia-ml-py)."""
    if device.type != "cuda":
        return None
    try:
        library = import_module("pynvml")
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no driver, a board without the counter
        return None
    return library, handle
