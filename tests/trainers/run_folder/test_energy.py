"""The processor's energy counters, read from a folder of the kernel's form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from choral.trainers.run_folder.energy import EnergyMeter

CPU = torch.device("cpu")


def package(root: Path, name: str, microjoules: int, span: int = 10**9) -> Path:
    path = root / name
    path.mkdir(exist_ok=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{span}\n")
    return path


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 5_000_000)
    package(tmp_path, "intel-rapl:1", 1_000_000)
    package(tmp_path, "intel-rapl:0:0", 7)
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.meters == ("RAPL intel-rapl:0", "RAPL intel-rapl:1")
    package(tmp_path, "intel-rapl:0", 8_000_000)
    package(tmp_path, "intel-rapl:1", 1_500_000)
    package(tmp_path, "intel-rapl:0:0", 900_000_000)
    assert meter.take() == pytest.approx(3.5)
    assert meter.take() == 0.0


def test_a_counter_that_starts_over_is_followed(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 999_000_000)
    meter = EnergyMeter(CPU, tmp_path)
    package(tmp_path, "intel-rapl:0", 2_000_000)
    assert meter.take() == pytest.approx(3.0)


def test_without_a_meter_nothing_is_made_up(tmp_path: Path) -> None:
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.meters == ()
    assert meter.take() is None


def test_a_meter_that_stops_answering_gives_no_number(tmp_path: Path) -> None:
    path = package(tmp_path, "intel-rapl:0", 1)
    meter = EnergyMeter(CPU, tmp_path)
    (path / "energy_uj").unlink()
    assert meter.take() is None
    package(tmp_path, "intel-rapl:0", 5)
    assert meter.take() is None
    assert meter.take() == 0.0


def test_an_accelerator_without_its_own_meter_is_not_measured_by_the_processors(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 1)
    if torch.cuda.is_available():
        pytest.skip("this machine has a board that can be read")
    assert EnergyMeter(torch.device("cuda"), tmp_path).meters == ()
