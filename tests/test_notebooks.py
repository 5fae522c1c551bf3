"""A run in Python and in a notebook: short, with its model, its history, its curves; progress and callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from choral import Keep, Run, Task, audit, centralize, compare, federate
from choral.callbacks import MLflow, TensorBoard
from choral.errors import ConfigError


def job() -> dict[str, Any]:
    torch.manual_seed(0)
    parties = {}
    for name in ("north", "south"):
        x = torch.randn(40, 3)
        parties[name] = TensorDataset(x, (x[:, 0] > 0).long())

    def build(dataset: Any) -> Any:
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.3), DataLoader(dataset, batch_size=8)

    def fit(model: Any, optimizer: Any, loader: Any) -> None:
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def evaluate(model: Any) -> float:
        x, y = parties["north"].tensors
        return float((model(x).argmax(1) == y).float().mean())

    return {"task": Task(build=build, fit=fit, evaluate=evaluate), "parties": parties, "rounds": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    seen: list[int] = []
    told: tuple[Any, ...] = (lambda entry: seen.append(entry.round), TensorBoard(folder / "logs"))
    made = federate(**job(), keep=Keep(out=folder / "run", on_round=told))
    assert seen == [1, 2, 3]
    return {"federated": made, "cloud": centralize(**job())}


def test_a_run_is_short(runs: dict[str, Run]) -> None:
    run = runs["federated"]
    assert repr(run).startswith("<Run federated: 3 of 3 rounds, accuracy ")
    assert len(repr(run)) < 300
    assert "<td>none promised</td>" in run._repr_html_()
    assert len(repr(audit(run))) < 200
    comparison = compare(runs)
    assert "cloud" in repr(comparison)
    assert len(repr(comparison)) < 300
    for shown in (comparison, audit(run)):
        assert shown._repr_html_().startswith("<table>")
        assert shown._repr_html_().count("<tr>") >= 3


def test_the_model_is_the_one_that_was_trained(runs: dict[str, Run]) -> None:
    run = runs["federated"]
    model = run.model
    assert not model.training
    assert job()["task"].evaluate(model) == run.metrics["accuracy"]
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert any(tensor.any() for tensor in run.model.state_dict().values())  # each is a copy
    with pytest.raises(ConfigError, match="no code"):
        _ = Run.load(run.folder or "").model


def test_the_history_as_a_frame_and_as_curves(runs: dict[str, Run]) -> None:
    run = runs["federated"]
    frame = run.history_frame()
    assert list(frame.index) == [0, 1, 2, 3]
    assert frame.loc[3, "accuracy"] == run.metrics["accuracy"]
    assert frame["bytes_up"].iloc[-1] == run.history[-1].bytes_up
    times = run.history[-1].times
    assert times is not None
    assert frame["seconds of training"].iloc[-1] == times.training
    import matplotlib as mpl

    mpl.use("Agg")
    axes = run.plot()
    assert list(axes.lines[0].get_ydata()) == list(frame["accuracy"])
    with pytest.raises(ConfigError, match="no metric 'loss'"):
        run.plot("loss")


def test_progress_in_a_log(capsys: Any) -> None:
    federate(**job(), keep=Keep(progress=True))
    centralize(**job(), keep=Keep(progress=True))
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in said] == ["federated: round 3 of 3", "cloud: round 3 of 3"]
    federate(**job())
    assert capsys.readouterr().err == ""


def test_tensorboard_has_every_round(runs: dict[str, Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert runs["federated"].folder is not None
    events = EventAccumulator(str(runs["federated"].folder.parent / "logs"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("accuracy")]
    history = runs["federated"].history[1:]
    assert found == [(entry.round, pytest.approx(entry.metrics["accuracy"])) for entry in history]


def test_mlflow_is_given_every_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: dict[str, Run]) -> None:
    mlflow = pytest.importorskip("mlflow")
    logged: list[Any] = []

    class Info:
        run_id = "1"

    class Active:
        info = Info()

    monkeypatch.setattr(mlflow, "active_run", lambda: Active())
    monkeypatch.setattr(mlflow, "log_metrics", lambda figures, step, run_id: logged.append((step, run_id, figures)))
    callback = MLflow()
    for entry in runs["federated"].history[1:]:
        callback(entry)
    assert [(step, run_id) for step, run_id, _ in logged] == [(1, "1"), (2, "1"), (3, "1")]
    assert {"accuracy", "choral/seconds", "choral/bytes_up"} <= set(logged[0][2])


def test_keep_refuses_what_is_no_callback() -> None:
    with pytest.raises(ConfigError, match="on_round"):
        Keep(on_round=(print, 3))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="progress"):
        Keep(progress="yes")  # type: ignore[arg-type]
