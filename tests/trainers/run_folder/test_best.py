"""The best round's weights are kept beside the last one's, on disk and in memory, through kills and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flat_arguments import federate

from choral.trainers import Run, RunFolderError
from choral.trainers.run_folder.info import RoundRecord, best_of

SCORES = {"accuracy": [0.1, 0.4, 0.9, 0.7, 0.9, 0.2], "loss": [9.0, 3.0, 0.5, 0.8, 0.5, 4.0]}


def job(metric: str, out: Path | None, rounds: int = 5, **more: Any) -> dict[str, Any]:
    """Each round adds a tenth to the weight, which the evaluation reads as the number of the round."""

    def build(dataset: Any) -> Any:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, torch.utils.data.DataLoader(dataset, batch_size=4)

    def fit(model: Any, optimizer: Any, loader: Any) -> None:
        optimizer.zero_grad()
        (-model.weight.sum()).backward()
        optimizer.step()

    def evaluate(model: Any) -> dict[str, float]:
        return {metric: SCORES[metric][round(10 * float(model.weight.detach()))]}

    parties = {name: torch.utils.data.TensorDataset(torch.ones(4, 1)) for name in ("a", "b")}
    return {"build": build, "fit": fit, "evaluate": evaluate, "parties": parties, "rounds": rounds, "out": out, **more}


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_earliest_best_round_is_kept_beside_the_last(tmp_path: Path, metric: str, on_disk: bool) -> None:
    run = federate(**job(metric, tmp_path / "run" if on_disk else None))
    assert run.best_round == 2
    assert float(run.best["weight"]) == pytest.approx(0.2)
    assert float(run.state["weight"]) == pytest.approx(0.5)
    folder = tmp_path / "run" if on_disk else run.save(tmp_path / "saved")
    again = Run.load(folder)
    assert (again.best_round, float(again.best["weight"])) == (2, pytest.approx(0.2))


def test_a_resumed_run_keeps_what_was_best_before_and_after(tmp_path: Path) -> None:
    def stop(entry: RoundRecord) -> None:
        if entry.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(**job("accuracy", tmp_path / "run", on_round=stop))
    assert Run.load(tmp_path / "run").best_round == 1
    run = federate(**job("accuracy", tmp_path / "run", resume=True))
    assert (run.best_round, float(run.best["weight"])) == (2, pytest.approx(0.2))


def test_weights_of_another_round_are_not_taken_for_the_best(tmp_path: Path) -> None:
    federate(**job("accuracy", tmp_path / "run"))
    best, last = tmp_path / "run" / "best.safetensors", tmp_path / "run" / "model.safetensors"
    best.write_bytes(last.read_bytes())
    assert Run.load(tmp_path / "run").best == {}
    best.write_bytes(b"cut")
    with pytest.raises(RunFolderError, match=r"best\.safetensors is damaged"):
        Run.load(tmp_path / "run")
    best.unlink()
    assert Run.load(tmp_path / "run").best == {}


def test_nothing_is_best_before_an_evaluation() -> None:
    assert best_of([]) == 0
