"""One core's figures of the digits, measured as a comparison does it: in a process of its own, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from choral.audits import Comparison, compare
from choral.audits.costs.on_device import OneCore, measure
from choral.errors import ConfigError
from choral.jobs.settings import ReportSettings, Settings
from choral.jobs.side_by_side import ON_DEVICE_FILE, on_device
from choral.jobs.training import load_task
from choral.trainers import Run

SETTINGS = Settings(report=ReportSettings(on_device="pt2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("on-device")


@pytest.fixture(scope="module")
def found(folder: Path) -> OneCore:
    measured = on_device(SETTINGS, folder)
    assert measured is not None
    return measured


def test_it_is_the_digits_on_one_core(found: OneCore) -> None:
    assert found.parameters == 2410
    assert found.examples[1] == 1438
    assert found.data_bytes[1] == 1438 * 264
    assert found.data_bytes[0] == found.examples[0] * 264
    assert 3 < found.epoch_seconds[1] / found.epoch_seconds[0] < 30, "ten times the records"
    (file,) = found.exported
    assert file.kind == ".pt2"
    assert file.size > 4 * 2410
    assert 0 < file.batch < file.single < 0.1
    assert found.peak_mib > found.imports_mib > 20


def test_it_is_measured_once_and_a_damaged_file_is_said(found: OneCore, folder: Path, tmp_path: Path) -> None:
    marked = msgspec.structs.replace(found, parameters=7)
    (folder / ON_DEVICE_FILE).write_bytes(msgspec.json.encode(marked))
    assert on_device(SETTINGS, folder) == marked
    (tmp_path / ON_DEVICE_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        on_device(SETTINGS, tmp_path)
    assert on_device(Settings(), tmp_path) is None


def test_the_report_says_it(found: OneCore, make_run: Callable[..., Run], tmp_path: Path) -> None:
    report = compare({"cloud": make_run("cloud"), "federated": make_run("federated")})
    assert report.costs is not None
    whole = msgspec.structs.replace(report, costs=msgspec.structs.replace(report.costs, on_device=found))
    assert Comparison.load(whole.save(tmp_path / "r.json")).costs == whole.costs
    page = whole.save(tmp_path / "r.html").read_text("utf-8")
    assert "On a device: one core, one thread" in page
    assert "On a device" not in report.save(tmp_path / "without.html").read_text("utf-8")


def test_batches_that_do_not_begin_with_the_inputs_are_refused() -> None:
    task = load_task(Settings(), 0)
    records = [{"x": torch.zeros(64)} for _ in range(4)]

    def build(dataset: object) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.utils.data.DataLoader[object]]:
        model = torch.nn.Linear(64, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.utils.data.DataLoader(dataset, 2)  # type: ignore[arg-type]

    mine = dataclasses.replace(task, build=build, fit=lambda *_: None, parties={"a": records, "b": records})
    with pytest.raises(ConfigError, match="knows models of one tensor"):
        measure(mine)
