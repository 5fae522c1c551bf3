"""What run.json, ledgers, history and settings say must be the same, both ways; honest runs of every kind agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_arguments import centralize, federate

from choral import ClientPrivacy, CorrelatedPrivacy, Masked, Privacy
from choral.audits import audit
from choral.audits.budgets.consistency import books_checks
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.ledgers.ledger import Ledger
from choral.trainers.run_folder.run import Run

SIZES = {"north": 60, "south": 40, "east": 50}
DELTA = 1e-5
Edit = Callable[[dict[str, Any]], Any]


def data(name: str, records: int) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(records, 3, generator=generator)
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def build(dataset: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    model = torch.nn.Linear(3, 2)
    loader = torch.utils.data.DataLoader(dataset, batch_size=10, shuffle=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), loader


def fit(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def evaluate(model: Any) -> float:
    return float(next(model.parameters()).abs().mean())


def job(out: Path, **more: Any) -> dict[str, Any]:
    parties = {name: data(name, records) for name, records in SIZES.items()}
    settings = {"task": "digits", "training": {"batch_size": 10}}
    functions = {"build": build, "fit": fit, "evaluate": evaluate}
    return {**functions, "parties": parties, "rounds": 3, "out": out, "config": settings, **more}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small run of every kind of promise."""
    top = tmp_path_factory.mktemp("honest")
    record, client = Privacy(epsilon=3.0, delta=DELTA), ClientPrivacy(epsilon=8.0, delta=DELTA, noise="local")
    federate(**job(top / "record"), privacy=record)
    federate(**job(top / "masked"), privacy=record, secure_sum=Masked(min_survivors=3, corrupt=1, dropouts=0))
    federate(**job(top / "client"), privacy=client)
    federate(**job(top / "plain"))
    centralize(**job(top / "pooled"), privacy=Privacy(epsilon=3.0, delta=DELTA, epochs=3))
    centralize(**job(top / "correlated"), privacy=CorrelatedPrivacy(epsilon=3.0, delta=DELTA, epochs=3))
    return {folder.name: folder for folder in top.iterdir()}


@pytest.mark.parametrize("kind", ["record", "masked", "client", "plain", "pooled", "correlated"])
def test_an_honest_run_of_every_kind_holds(honest: dict[str, Path], kind: str) -> None:
    run = Run.load(honest[kind])
    found = [check for check in books_checks(run) if check.verdict != "holds"]
    assert not found
    assert audit(run).verdict == "holds"


def edited(folder: Path, tmp_path: Path, edit: Edit, name: str = "run.json") -> Run:
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / name
    lines = name.endswith(".jsonl")
    content = list(map(json.loads, path.read_text().splitlines())) if lines else json.loads(path.read_text())
    edit(content)
    path.write_text("\n".join(map(json.dumps, content)) + "\n" if lines else json.dumps(content))
    return Run.load(tmp_path / "copy")


def each_cost(change: Edit) -> Edit:
    def edit(info: dict[str, Any]) -> None:
        for cost in info["spent"].values():
            change(cost)

    return edit


def larger_parties(info: dict[str, Any]) -> None:
    info["parties"] = {name: 10 * size for name, size in info["parties"].items()}


def without(name: str) -> Edit:
    def edit(info: dict[str, Any]) -> None:
        del info["parties"][name], info["spent"][name], info["raw_bytes"][name]

    return edit


def scaled(field: str, factor: float) -> Edit:
    return each_cost(lambda cost: cost.update({field: factor * cost[field]}))


EDITS = {
    "a noise multiplier doubled": (scaled("noise_multiplier", 2), "budget"),
    "a noise multiplier halved": (scaled("noise_multiplier", 0.5), "budget"),
    "a sampling rate halved": (scaled("sample_rate", 0.5), "budget"),
    "steps taken off": (each_cost(lambda cost: cost.update(steps=cost["steps"] - 1)), "ledgers"),
    "steps added": (each_cost(lambda cost: cost.update(steps=cost["steps"] + 1)), "ledgers"),
    "a smaller delta": (lambda i: (i["privacy"].update(delta=1e-6),
                                   each_cost(lambda c: c.update(delta=1e-6))(i)), "ledgers"),
    "parties ten times as large": (larger_parties, "rates"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_one_place_is_found(honest: dict[str, Path], tmp_path: Path, name: str) -> None:
    edit, part = EDITS[name]
    run = edited(honest["record"], tmp_path, edit)
    assert "violated" in {check.verdict for check in audit(run).checks if part in check.name}


def test_a_task_of_ones_own_may_batch_otherwise_than_the_settings_say(honest: dict[str, Path], tmp_path: Path) -> None:
    run = edited(
        honest["record"], tmp_path, lambda info: info["config"].update(task="mine.py", training={"batch_size": 7})
    )
    assert {check.verdict for check in books_checks(run)} == {"holds"}


def test_a_party_that_was_taken_out_leaves_more_survivors_than_parties(honest: dict[str, Path], tmp_path: Path) -> None:
    run = edited(honest["record"], tmp_path, without("east"))
    assert run.folder is not None
    (run.folder / "ledger" / "east.jsonl").unlink()
    (check,) = (check for check in books_checks(run) if "history" in check.name)
    assert check.verdict == "violated"
    assert "3 survivors of 3 selected, and run.json names 2 parties" in check.finding


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lines: lines[3].update(epsilon=lines[1]["epsilon"] / 2), "epsilon falls"),
        (lambda lines: lines[3].update(epsilon=lines[3]["epsilon"] * 0.9999), "it ends at epsilon"),
        (lambda lines: lines[3].update(epsilon=lines[2]["epsilon"] * (1.0 - 1e-6)), "epsilon falls"),
        (lambda lines: lines[2].update(survivors=4), "round 2 has 4 survivors"),
        (lambda lines: lines[2].update(asked=2), "round 2 has 3 survivors of 2 selected"),
        (lambda lines: lines[2].update(asked=4), "round 2 has 3 survivors of 4 selected, and run.json names 3"),
    ],
)
def test_an_edited_history_is_found(honest: dict[str, Path], tmp_path: Path, edit: Edit, said: str) -> None:
    run = edited(honest["record"], tmp_path, edit, "history.jsonl")
    (check,) = (check for check in books_checks(run) if "history" in check.name)
    assert check.verdict == "violated"
    assert said in check.finding


@pytest.mark.parametrize(
    ("edit", "part", "said"),
    [
        (lambda info: info.update(rounds=2), "history", "3 rounds are recorded, and 2 were asked for"),
        (lambda info: info["config"]["training"].update(batch_size=11), "rates", "the settings ask for 11"),
        (lambda info: info["parties"].update(north=61), "rates", "of 61 records is no whole batch"),
        (lambda info: info["parties"].update(north=0), "rates", "of 0 records is no whole batch"),
        (lambda info: info["privacy"].update(delta=1e-6), "ledgers", "1e-06 in run.json's promise"),
        (each_cost(lambda cost: cost.update(delta=1e-6)), "ledgers", "cost and 1e-05 in the ledger"),
        (each_cost(lambda cost: cost.update(steps=cost["steps"] + 1)), "ledgers", "noisy steps, the ledger holds"),
    ],
)
def test_what_differs_is_named(honest: dict[str, Path], tmp_path: Path, edit: Edit, part: str, said: str) -> None:
    run = edited(honest["record"], tmp_path, edit)
    (check,) = (check for check in books_checks(run) if part in check.name)
    assert (check.verdict, said in check.finding) == ("violated", True), check


@pytest.mark.parametrize(("batch", "verdict"), [(1.0, "holds"), (2.0, "holds"), (0.4, "violated"), (1.5, "violated")])
def test_a_rate_is_that_of_a_whole_batch_of_one_record_or_more(
    honest: dict[str, Path], tmp_path: Path, batch: float, verdict: str
) -> None:
    run = edited(honest["record"], tmp_path, lambda info: info["config"]["training"].update(batch_size=int(batch)))
    assert run.folder is not None
    for name, records in SIZES.items():
        path = run.folder / "ledger" / f"{name}.jsonl"
        path.unlink()
        ledger = Ledger(path, holder=name)
        ledger.bind(name, DELTA)
        ledger.append(PoissonSampledGaussian(sample_rate=batch / records, noise_multiplier=1.0, steps=1), after=0)
    (check,) = (check for check in books_checks(run) if "rates" in check.name)
    assert (check.verdict, check.finding.count("no whole batch")) == (verdict, 3 if verdict == "violated" else 0)
    assert "more" not in check.finding


def test_a_run_that_was_interrupted_may_hold_more_steps_than_it_states_and_no_fewer(
    honest: dict[str, Path], tmp_path: Path
) -> None:
    """A ledger is written before its step is made: what was cut off in between is on the ledger alone."""
    for steps, verdict in ((-1, "holds"), (0, "holds"), (1, "violated")):

        def edit(info: dict[str, Any], more: int = steps) -> None:
            info.update(rounds=4)
            each_cost(lambda cost: cost.update(steps=cost["steps"] + more))(info)

        run = edited(honest["record"], tmp_path / str(steps), edit)
        assert not run.finished
        (check,) = (check for check in books_checks(run) if "ledgers" in check.name)
        assert check.verdict == verdict, check


def test_a_ledger_of_twice_the_noise_that_costs_less_than_is_claimed_is_found(
    honest: dict[str, Path], tmp_path: Path
) -> None:
    """Rewritten with fresh hashes, and so in order by itself: it costs less than run.json states for the same steps."""
    run = edited(honest["record"], tmp_path, lambda info: None)
    assert run.folder is not None
    path = run.folder / "ledger" / "north.jsonl"
    old = Ledger(path, holder="north")
    events, delta = old.events, old.delta or 0.0
    path.unlink()
    new = Ledger(path, holder="north")
    new.bind("north", delta)
    for place, event in enumerate(events):
        assert isinstance(event, PoissonSampledGaussian)
        new.append(
            PoissonSampledGaussian(
                sample_rate=event.sample_rate, noise_multiplier=2 * event.noise_multiplier, steps=event.steps
            ),
            after=place,
        )
    report = audit(run)
    assert report.verdict == "violated"
    assert any("noise multiplier" in check.finding for check in report.checks if check.verdict == "violated")


def test_a_transcript_that_the_settings_ask_for_and_nobody_knows_of_is_not_verified(
    honest: dict[str, Path], tmp_path: Path
) -> None:
    run = edited(honest["plain"], tmp_path, lambda info: info["config"].update(transcript="digests"))
    (check,) = (check for check in books_checks(run) if "transcript" in check.name)
    assert check.verdict == "unverified"
