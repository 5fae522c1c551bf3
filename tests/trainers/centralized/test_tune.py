"""Tuning: every combination once, chosen by held-out loss, never by the test set; recorded, billed, not for privacy."""

from __future__ import annotations

import json

import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Privacy, Run, compare
from choral.cli.command_line import main
from choral.errors import ConfigError
from choral.trainers import Task, TaskError, tune


@pytest.fixture
def make(job, parties):
    """The job's task with a learning rate and a batch size; its evaluate must not be called."""

    def task(learning_rate=0.2, batch_size=10):
        def build(dataset):
            model = nn.Linear(5, 2)
            loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
            return model, torch.optim.SGD(model.parameters(), lr=learning_rate), loader

        def evaluate(model):
            raise AssertionError("the test set was looked at")

        return Task(
            build=build,
            fit=job()["fit"],
            evaluate=evaluate,
            parties=parties,
            loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        )

    return task


def by(trainer, seen=None, **settings):
    def train(task):
        if seen is not None:
            seen.append(task)
        return trainer(
            build=task.build, fit=task.fit, evaluate=task.evaluate, parties=task.parties, rounds=2, **settings
        )

    return train


@pytest.mark.parametrize("trainer", [centralize, federate])
def test_every_combination_is_tried_once_and_the_least_held_out_loss_chosen(make, parties, trainer):
    seen = []
    grid = {"learning_rate": [1e-4, 0.5], "batch_size": [5, 20]}
    tuned = tune(make, grid, by(trainer, seen), seed=4, validation_fraction=0.25)
    tries = tuned.record["tries"]
    assert [(entry["learning_rate"], entry["batch_size"]) for entry in tries] == [
        (1e-4, 5),
        (1e-4, 20),
        (0.5, 5),
        (0.5, 20),
    ]
    assert tuned.chosen["learning_rate"] == 0.5
    assert min(tries, key=lambda entry: entry["loss"])["batch_size"] == tuned.chosen["batch_size"]
    assert tuned.record["seconds"] == pytest.approx(sum(entry["seconds"] for entry in tries))
    assert all(entry["seconds"] > 0 and entry["rounds"] == 2 for entry in tries)
    # The loss that is recorded is that of the records which were held out, and of no others.
    again = by(trainer)(seen[-1])
    weight, bias = again.state["weight"], again.state["bias"]
    held = []
    for name, whole in parties.items():
        kept = {tuple(row.tolist()) for row in seen[-1].parties[name].tensors[0]}
        rows = [index for index, row in enumerate(whole.tensors[0]) if tuple(row.tolist()) not in kept]
        assert len(rows) == round(0.25 * len(whole))
        assert len(rows) + len(kept) == len(whole)
        logits = whole.tensors[0][rows] @ weight.T + bias
        held.append(nn.functional.cross_entropy(logits, whole.tensors[1][rows], reduction="none"))
    assert tries[-1]["loss"] == pytest.approx(float(torch.cat(held).mean()), rel=1e-5)


def test_other_datasets_are_held_out_by_index(make, parties):
    class Rows(torch.utils.data.Dataset):
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            return self.data[index]

    import dataclasses

    def wrapped(**settings):
        task = make(**settings)
        return dataclasses.replace(task, parties={name: Rows(data) for name, data in task.parties.items()})

    first = tune(make, {"learning_rate": [0.1, 0.3]}, by(centralize)).record["tries"]
    second = tune(wrapped, {"learning_rate": [0.1, 0.3]}, by(centralize)).record["tries"]
    assert [entry["loss"] for entry in first] == pytest.approx([entry["loss"] for entry in second], rel=1e-6)


def test_a_try_that_diverges_is_counted_and_not_chosen(make):
    tuned = tune(make, {"learning_rate": [3.3e38, 0.1]}, by(centralize))
    assert [entry["loss"] is None for entry in tuned.record["tries"]] == [True, False]
    assert tuned.chosen == {"learning_rate": 0.1}
    with pytest.raises(TaskError, match="every try"):
        tune(make, {"learning_rate": [3.3e38]}, by(centralize))


@pytest.mark.parametrize(
    ("grid", "fraction", "message"),
    [
        ({}, 0.2, "nothing to tune"),
        ({"learning_rate": []}, 0.2, "nothing to tune"),
        ({"learning_rate": [0.1, 0.1]}, 0.2, "different"),
        ({"learning_rate": [-0.1]}, 0.2, "different finite values > 0"),
        ({"learning_rate": [float("nan")]}, 0.2, "finite"),
        ({"learning_rate": [0.1]}, 0.0, "validation_fraction"),
        ({"learning_rate": [0.1]}, 1.0, "validation_fraction"),
    ],
)
def test_bad_grids_are_refused(make, grid, fraction, message):
    with pytest.raises(ConfigError, match=message):
        tune(make, grid, by(centralize), validation_fraction=fraction)


def test_what_has_no_loss_or_no_second_record_is_refused(make):
    import dataclasses

    with pytest.raises(TaskError, match="the task has none"):
        tune(lambda **s: dataclasses.replace(make(**s), loss=None), {"learning_rate": [0.1]}, by(centralize))
    one = {"a": TensorDataset(torch.zeros(1, 5), torch.zeros(1, dtype=torch.long))}
    with pytest.raises(TaskError, match="no party has a record"):
        tune(lambda **s: dataclasses.replace(make(**s), parties=one), {"learning_rate": [0.1]}, by(centralize))


def test_private_runs_are_not_tuned(make, job):
    privacy = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(ConfigError, match="private training is not tuned"):
        tune(make, {"learning_rate": [0.1]}, by(centralize, privacy=privacy))
    tuned = tune(make, {"learning_rate": [0.1]}, by(centralize))
    for trainer in (centralize, federate):
        with pytest.raises(ConfigError, match="tuning with privacy"):
            trainer(**job(), privacy=privacy, tuning=tuned.record)


SETTINGS = """
task = "digits"
device = "cpu"
seeds = 1
[split]
parties = 3
alpha = 2.0
[training]
rounds = 2
hidden = 0
[arms.cloud]
centralized = true
tune = {learning_rate = [0.001, 0.5], batch_size = [32]}
[arms.federated]
secure_sum = "plain"
tune = {learning_rate = [0.5, 0.001]}
"""


def test_arms_are_tuned_recorded_and_billed(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SETTINGS)
    words = ["compare", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    assert main(words) == 0
    for arm in ("cloud", "federated"):
        run = Run.load(tmp_path / "out" / "arms" / arm / "seed-0")
        assert len(run.info.tuning["tries"]) == 2
        assert run.info.tuning["chosen"]["learning_rate"] == 0.5
        assert run.metrics["accuracy"] > 0.5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for bill in report["costs"]["bills"]:
        lines = {item["name"]: item for item in bill["items"]}
        assert lines["tuning"]["quantity"] == 2
        assert lines["tuning"]["usd"] > 0
    # Resumed, nothing is tried again; another grid is another run.
    assert main([*words, "--resume"]) == 0
    train = ["train", str(tmp_path / "small.toml"), "--arm", "cloud", "--out", str(tmp_path / "run"), "--quiet"]
    assert main(train) == 0
    before = Run.load(tmp_path / "run").info.tuning
    assert main([*train, "--resume"]) == 0
    assert Run.load(tmp_path / "run").info.tuning == before
    (tmp_path / "small.toml").write_text(SETTINGS.replace("[32]", "[64]"))
    assert main([*train, "--resume"]) == 2
    assert "cannot resume: tuning." in capsys.readouterr().err


def test_a_private_arm_is_not_tuned(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SETTINGS + "private = true\n[privacy]\nepsilon = 4\n")
    for command, *rest in (["compare"], ["train", "--arm", "federated"]):
        assert main([command, str(tmp_path / "small.toml"), *rest, "--out", str(tmp_path / command)]) == 2
        assert "tuning with privacy" in capsys.readouterr().err


def test_runs_without_tuning_have_no_such_line(job):
    comparison = compare({"cloud": centralize(**job())})
    assert all(item.name != "tuning" for bill in comparison.costs.bills for item in bill.items)
