"""The maps of who wins, cell by cell against whole bills, and the data sets' dots against the tasks themselves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from choral.audits import compare
from choral.audits.costs.crossover import cloud_seconds, cloud_usd, federation_seconds, federation_usd, workload
from choral.audits.costs.prices import PriceSettings, read_prices
from choral.audits.costs.target import costs_to_target
from choral.audits.costs.winners import PARTIES, RATIOS, TASK_SIZES, WinnerMap, winner_maps
from choral.audits.report.charts.winner_figures import winner_figure, winner_sentence
from choral.jobs.settings import Settings
from choral.jobs.training import load_task
from choral.trainers import Run
from choral.trainers.task.task import raw_bytes

MakeRun = Callable[..., Run]
PRICES = read_prices()


def rising(run: Run, rounds: int) -> Run:
    """Its accuracy is .9 from that round on, and .1 before."""
    history = [
        msgspec.structs.replace(entry, metrics={"accuracy": 0.9 if entry.round >= rounds else 0.1})
        for entry in run.history
    ]
    return dataclasses.replace(run, history=tuple(history))


@pytest.fixture
def arms(make_run: MakeRun) -> dict[str, list[Run]]:
    return {
        "cloud": [rising(make_run("cloud"), 3)],
        "cloud-dp": [rising(make_run("cloud-dp"), 9)],
        "federated": [rising(make_run("federated"), 5)],
        "federated-masked": [rising(make_run("federated-masked"), 7)],
        "federated-dp": [rising(make_run("federated-dp"), 11)],
    }


def maps_of(arms: dict[str, list[Run]], level: float = 0.9) -> tuple[WinnerMap, ...]:
    return winner_maps(arms, costs_to_target(arms, "accuracy", "cloud", PRICES, level), PRICES)


def test_each_pair_is_at_equal_privacy_and_charged_its_own_rounds(arms: dict[str, list[Run]]) -> None:
    found = maps_of(arms)
    assert [(each.cloud, each.federated, each.kind, each.daily) for each in found] == [
        ("cloud", "federated-masked", "usd", False),
        ("cloud", "federated-masked", "seconds", False),
        ("cloud", "federated-masked", "seconds", True),
        ("cloud-dp", "federated-dp", "usd", False),
        ("cloud-dp", "federated-dp", "seconds", False),
        ("cloud-dp", "federated-dp", "seconds", True),
    ]
    assert {(each.rounds, each.cloud_rounds) for each in found} == {(7.0, 3.0), (11.0, 9.0)}
    assert {each.epsilon for each in found} == {None, arms["cloud-dp"][0].info.privacy["epsilon"]}  # type: ignore[index]
    other = msgspec.structs.replace(
        arms["cloud-dp"][0].info, privacy={**(arms["cloud-dp"][0].info.privacy or {}), "epsilon": 99.0}
    )
    unequal = arms | {"cloud-dp": [dataclasses.replace(arms["cloud-dp"][0], info=other)]}
    assert {each.cloud for each in maps_of(unequal)} == {"cloud"}, "another epsilon is no equal privacy"


def test_every_cell_and_every_flip_is_that_of_whole_bills(arms: dict[str, list[Run]]) -> None:
    """Nine cells of each map, one at a time, with every price doubled and halved."""
    work = workload("federated-masked", arms["federated-masked"], "cloud", arms["cloud"], PRICES)
    assert work is not None
    at = msgspec.structs.replace(work, rounds=7, cloud_rounds=3)
    random = np.random.default_rng(3)

    def wins(kind: str, place: tuple[int, int], changes: dict[str, float]) -> bool:
        table = read_prices(changes=PriceSettings(**changes))
        own = msgspec.structs.replace(
            at, accelerator_seconds=at.accelerator_seconds * 20 / table["accelerator_speedup"]
        )
        n, size = PARTIES[place[1]], RATIOS[place[0]] * at.model_bytes
        if kind == "usd":
            return federation_usd(own, table, n, own.examples) < cloud_usd(own, table, n, own.examples, size)
        return federation_seconds(own, table, own.examples) < cloud_seconds(own, table, n, own.examples, size)

    firm = 0
    for found in maps_of(arms)[:3]:
        paced = {"rounds_per_day": 1.0} if found.daily else {}
        for row, column in random.integers((len(RATIOS), len(PARTIES)), size=(9, 2)).tolist():
            cell = wins(found.kind, (row, column), paced)
            assert found.distribution[row][column] == cell
            others = [
                wins(found.kind, (row, column), paced | {key: value})
                for key in PRICES.entries
                for value in (2 * (paced.get(key) or PRICES[key]), (paced.get(key) or PRICES[key]) / 2)
                if not (key == "accelerator_efficiency" and value > 1) and not (key == "accelerators" and value < 1)
            ]
            assert found.firm[row][column] == all(other == cell for other in others)
            firm += found.firm[row][column]
    assert firm > 0


def test_larger_records_and_a_daily_round_move_the_border_as_they_must(arms: dict[str, list[Run]]) -> None:
    for found in maps_of(arms):
        for column in range(len(PARTIES)):
            cells = [row[column] for row in found.distribution]
            assert cells == sorted(cells), "larger records never favour the cloud"
    once, daily = maps_of(arms)[1:3]
    assert daily.share <= once.share


def test_who_never_reached_the_level_wins_nowhere(arms: dict[str, list[Run]]) -> None:
    arms["federated-masked"] = [rising(run, 99) for run in arms["federated-masked"]]
    found = maps_of({name: arms[name] for name in ("cloud", "federated-masked")})
    assert [each.share for each in found] == [0.0, 0.0, 0.0]
    assert "never reached the level" in winner_sentence(found[0])
    assert maps_of({name: arms[name] for name in ("cloud", "federated-masked")}, level=2.0) == ()


def test_the_picture_has_its_cells_dots_and_words(arms: dict[str, list[Run]]) -> None:
    found = maps_of(arms)[0]
    drawing = str(winner_figure(found, "w").wide)
    runs = 0
    for row, firm in zip(found.distribution, found.firm, strict=True):
        looks = list(zip(row, firm, strict=True))
        changes = [look for place, look in enumerate(looks) if place == 0 or looks[place - 1] != look]
        runs += sum(look != (False, True) for look in changes)
    assert drawing.count('class="cell arm-1"') == runs + 4  # with the key
    for data in TASK_SIZES:
        assert re.search(rf'class="name arm-0"[^>]*>[a-z, ]*\b{data.name}\b', drawing), data.name
    assert drawing.count('class="dot arm-0"') == len(TASK_SIZES)
    said = winner_sentence(found)
    assert said.count(". ") == 0, "one sentence"
    assert said.endswith(".")
    assert "Specialised hardware, or massive distribution?" in drawing
    assert "nan" not in drawing
    page = compare({name: runs[0] for name, runs in arms.items()})
    assert page.costs is not None
    assert len(page.costs.maps) == 6


def test_the_dot_of_the_embedded_data_set_is_true() -> None:
    """Those of the others need files; `choral.jobs.training.load_task` gives theirs likewise."""
    task = load_task(Settings(), 0)
    examples = sum(len(dataset) for dataset in task.parties.values())  # type: ignore[arg-type]
    model, _, _ = task.build(next(iter(task.parties.values())))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(raw_bytes(dataset) for dataset in task.parties.values()) / examples
    assert TASK_SIZES[0] == ("digits", len(task.parties), size, parameters)
