"""The final model at each party, on what each holds out: only when asked for, and never on what was trained on."""

from __future__ import annotations

import json
from itertools import count as counter

import numpy as np
import pytest
import torch
from flat_arguments import centralize, federate
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from choral import Privacy
from choral.errors import ConfigError, DataError
from choral.privacy import ClientPrivacy
from choral.trainers import Run, TaskError, VirtualParties
from choral.trainers.data import TASKS
from choral.trainers.data.partition import split_alike
from choral.trainers.data.tables import DataTable, held_out_of, parties_of
from choral.trainers.task.per_party import LEAST_RECORDS, NOTE
from choral.trainers.task.settings import Split, Training

PROMISES = [None, Privacy(epsilon=8.0, delta=1e-3, max_grad_norm=1.0, epochs=1)]


def accuracy(model, dataset):
    assert not model.training
    assert not torch.is_grad_enabled()
    points, labels = dataset.tensors
    return (model(points).argmax(dim=1) == labels).double().mean()


@pytest.fixture
def held_out():
    """Fewer than five records for east: it is counted and not evaluated."""
    generator = torch.Generator().manual_seed(8)
    made = {}
    for name, count in {"north": 40, "south": 7, "east": LEAST_RECORDS - 1}.items():
        points = torch.randn(count, 5, generator=generator)
        made[name] = TensorDataset(points, (points @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) > 0.5).long())
    return made


@pytest.mark.parametrize("privacy", PROMISES)
@pytest.mark.parametrize("train", [federate, centralize])
def test_each_party_is_evaluated_with_the_final_weights_on_its_own_held_out_records(
    job, held_out, tmp_path, train, privacy
):
    run = train(**job(), privacy=privacy, held_out=held_out, evaluate_party=accuracy, out=tmp_path / "run")
    weight, bias = (run.state[name].double().numpy() for name in ("weight", "bias"))
    expected = {}
    for name in ("north", "south"):
        points, labels = (tensor.numpy() for tensor in held_out[name].tensors)
        expected[name] = float(np.mean(np.argmax(points @ weight.T + bias, axis=1) == labels))
    found = run.info.per_party
    assert {name: metrics["accuracy"] for name, metrics in found.metrics.items()} == pytest.approx(expected)
    assert found.records == {"north": 40, "south": 7, "east": 4}
    assert found.least == LEAST_RECORDS
    assert Run.load(tmp_path / "run").info.per_party == found
    assert json.loads((tmp_path / "run" / "run.json").read_text())["per_party"]["note"] == NOTE
    assert "no privacy promise" in NOTE


def test_nothing_is_recorded_unasked(job):
    assert federate(**job()).info.per_party is None


def test_several_metrics_per_party_keep_their_names(job, held_out):
    run = federate(
        **job(), held_out=held_out, evaluate_party=lambda model, dataset: {"error": 0.25, "size": len(dataset)}
    )
    assert run.info.per_party.metrics["south"] == {"error": 0.25, "size": 7.0}


@pytest.mark.parametrize("privacy", [None, PROMISES[1], ClientPrivacy(8.0, 1e-3, min_survivors=3, colluders=0)])
def test_a_run_killed_before_the_evaluation_is_evaluated_when_it_is_resumed(job, held_out, tmp_path, privacy):
    """The budget is spent by then: nothing may be trained, or planned, again."""
    if isinstance(privacy, ClientPrivacy):
        from choral import Masked

        again = {"secure_sum": Masked(min_survivors=3)}
    else:
        again = {}
    asked = {"held_out": held_out, "evaluate_party": accuracy, "out": tmp_path / "run"}
    whole = federate(**job(), **asked, **again, privacy=privacy)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["per_party"] = None
    path.write_text(json.dumps(record))
    assert Run.load(tmp_path / "run").info.per_party is None
    resumed = federate(**job(), **asked, **again, privacy=privacy, resume=True)
    assert resumed.info.per_party == whole.info.per_party
    assert resumed.history == whole.history
    assert resumed.info.spent == whole.info.spent
    kept = federate(**job(), out=tmp_path / "run", **again, privacy=privacy, resume=True)
    assert kept.info.per_party == whole.info.per_party


@pytest.mark.parametrize("privacy", PROMISES)
def test_pooled_training_killed_before_the_evaluation_is_evaluated_too(job, held_out, tmp_path, privacy):
    asked = {"held_out": held_out, "evaluate_party": accuracy, "out": tmp_path / "run", "privacy": privacy}
    whole = centralize(**job(), **asked)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"per_party": None}))
    resumed = centralize(**job(), **asked, resume=True)
    assert resumed.info.per_party == whole.info.per_party is not None
    assert (resumed.history, resumed.info.spent, resumed.info.ended) == (whole.history, whole.info.spent, "")


@pytest.mark.parametrize("train", [federate, centralize])
def test_a_run_that_its_budget_ended_early_stays_so_and_is_not_evaluated(job, held_out, tmp_path, train):
    """Its last round was cut short and is paid for: however often it is resumed, nothing is left to be done."""
    calls, fit = counter(), job()["fit"]

    def stops(model, optimizer, loader):
        fit(model, optimizer, loader)
        if next(calls) == (7 if train is federate else 2):
            raise KeyboardInterrupt

    asked = {"held_out": held_out, "evaluate_party": accuracy, "out": tmp_path / "run", "privacy": PROMISES[1]}
    with pytest.raises(KeyboardInterrupt):
        train(**job(rounds=3, fit=stops), **asked)
    ended, again = (train(**job(rounds=3, fit=stops), **asked, resume=True) for _ in range(2))
    assert "is spent; ended after round 2" in ended.info.ended
    assert (ended.history[-1].round, ended.info.per_party, ended.finished) == (2, None, True)
    assert (again.history, again.info) == (ended.history, ended.info)


@pytest.mark.parametrize("result", [float("nan"), "good"])
def test_results_that_are_no_finite_numbers_are_refused_by_party(job, held_out, result):
    with pytest.raises(TaskError, match="evaluate_party at 'north'"):
        federate(**job(), held_out=held_out, evaluate_party=lambda model, dataset: result)


def never(dataset):
    raise AssertionError("nothing is built before the refusal")


@pytest.mark.parametrize("train", [federate, centralize])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held, own: {"held_out": None}, "held_out is not given"),
        (lambda held, own: {"evaluate_party": None}, "evaluate_party is not given"),
        (lambda held, own: {"held_out": held | {"west": held["north"]}}, "'west', which is no party"),
        (lambda held, own: {"held_out": {"north": held["north"]}}, "1 of 3 parties have 5"),
        (lambda held, own: {"held_out": held | {"south": own["south"]}}, "trained on; the privacy promise would not"),
        (lambda held, own: {"held_out": held | {"south": own["north"]}}, "of party 'south' has records"),
        (lambda held, own: {"held_out": held | {"south": Subset(own["south"], range(28, 33))}}, "were trained on"),
        (lambda held, own: {"held_out": held | {"south": ConcatDataset([held["south"], own["east"]])}}, "trained on"),
        (
            lambda held, own: {"held_out": held | {"south": TensorDataset(*(t.clone() for t in own["south"].tensors))}},
            "trained on",
        ),
        (
            lambda held, own: {"held_out": held | {"south": TensorDataset(*(t[:9] for t in own["south"].tensors))}},
            "trained on",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused_before_training(job, parties, held_out, train, change, message):
    asked = {"held_out": held_out, "evaluate_party": accuracy} | change(held_out, parties)
    with pytest.raises(ConfigError, match=message):
        train(**job(build=never), privacy=PROMISES[1], **asked)


def test_without_a_promise_training_records_are_refused_for_what_they_tell(job, parties, held_out):
    with pytest.raises(ConfigError, match="learnt by heart"):
        federate(**job(build=never), held_out=held_out | {"east": parties["east"]}, evaluate_party=accuracy)


def test_parts_of_one_dataset_are_told_apart_by_their_indices(job):
    points = torch.randn(60, 5)
    labels = (points[:, 0] > 0).long()

    def part(*indices):
        return Subset(TensorDataset(points, labels), indices)

    parties = {"north": part(*range(20)), "south": Subset(part(*range(20, 50)), range(20))}
    held = {"north": part(*range(40, 50)), "south": part(*range(50, 60))}
    asked = {"parties": parties, "evaluate": lambda model: 0.5, "evaluate_party": lambda model, dataset: 0.5}
    assert federate(**(job() | asked), held_out=held).info.per_party.records == {"north": 10, "south": 10}
    with pytest.raises(ConfigError, match="'south' has records that were trained on"):
        federate(**(job() | asked), held_out=held | {"south": part(*range(39, 50))})


def test_a_dataset_without_a_length_is_refused(job, held_out):
    with pytest.raises(DataError, match="held_out of party 'east' has no length"):
        federate(**job(build=never), held_out=held_out | {"east": iter([])}, evaluate_party=accuracy)


def test_records_are_dealt_by_label_in_the_proportions_of_the_shares():
    trained = torch.tensor([0] * 10 + [1] * 10)
    shares = [torch.arange(0, 8), torch.tensor([8, 9, *range(10, 15)]), torch.arange(15, 20)]
    labels = torch.tensor([1, 0] * 50 + [2] * 20)
    dealt = split_alike(labels, trained, shares, seed=3)
    assert sorted(torch.cat(dealt).tolist()) == list(range(120))
    counts = [torch.bincount(labels[part], minlength=3).tolist() for part in dealt]
    assert counts == [[40, 0, 8], [10, 25, 7], [0, 25, 5]]  # of label 2: by 8, 7 and 5 of 20
    assert all(torch.equal(a, b) for a, b in zip(dealt, split_alike(labels, trained, shares, seed=3), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(dealt, split_alike(labels, trained, shares, seed=4), strict=True))


def table(count, seed, owners):
    random = np.random.default_rng(seed)
    return DataTable(
        features=torch.from_numpy(random.standard_normal((count, 3))).float(),
        labels=torch.from_numpy(random.integers(4, size=count)),
        keys=np.array([owners[number] for number in random.integers(len(owners), size=count)]),
    )


def test_with_a_key_each_party_holds_out_what_is_its_own():
    train, test = table(200, 1, ["a", "b", "c"]), table(90, 2, ["b", "c", "new"])
    held = held_out_of(train, test, Split(kind="key", min_records=1), 0)
    assert list(held) == list(parties_of(train, Split(kind="key", min_records=1), 0)) == ["a", "b", "c"]
    assert len(held["a"]) == 0
    for name in ("b", "c"):
        assert torch.equal(held[name].tensors[0], test.features[torch.from_numpy(test.keys == name)])


@pytest.mark.parametrize("kind", ["dirichlet", "shards", "iid"])
def test_otherwise_the_test_records_are_all_dealt_out_as_the_training_records_are(kind):
    split = Split(kind=kind, parties=4, alpha=0.3, min_records=5)
    train, test = table(400, 1, ["a"]), table(200, 2, ["a"])
    parties, held = parties_of(train, split, 5), held_out_of(train, test, split, 5)
    assert list(held) == list(parties)
    assert sum(map(len, held.values())) == 200
    for name, dataset in parties.items():
        for label in range(4):
            share = float((dataset.tensors[1] == label).sum() / (train.labels == label).sum())
            mine = int((held[name].tensors[1] == label).sum())
            assert mine == pytest.approx(share * int((test.labels == label).sum()), abs=1.0 + 1e-9)


def test_the_digits_hold_out_no_record_that_any_party_trains_on():
    task = TASKS["digits"](Split(parties=10, alpha=0.5), Training(), 0, None)
    trained = {point.numpy().tobytes() for dataset in task.parties.values() for point in dataset.tensors[0]}
    held = [point.numpy().tobytes() for dataset in task.held_out.values() for point in dataset.tensors[0]]
    assert len(held) == 359
    assert len(set(held)) == 359
    assert not trained & set(held)


@pytest.mark.parametrize("privacy", PROMISES)
def test_so_is_a_pooled_run(job, held_out, tmp_path, privacy):
    asked = {"held_out": held_out, "evaluate_party": accuracy, "out": tmp_path / "run", "privacy": privacy}
    whole = centralize(**job(), **asked)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"per_party": None}))
    resumed = centralize(**job(), **asked, resume=True)
    assert resumed.info.per_party == whole.info.per_party
    assert resumed.info.spent == whole.info.spent


def test_virtual_parties_have_no_numbers_each(job, parties, held_out):
    many = VirtualParties(1000, lambda number: parties["north"], 60)
    with pytest.raises(ConfigError, match="would touch every one of them"):
        federate(**job(parties=many, build=never), cohort=3, held_out=held_out, evaluate_party=accuracy)


def test_the_convex_task_counts_each_authors_errors_on_its_own_later_posts():
    task = TASKS["posts-convex"](Split(kind="key", parties=6), Training(hidden=0, weight_decay=1e-3), 0, None)
    run = federate(
        build=task.build, fit=task.fit, evaluate=task.evaluate, parties=task.parties, rounds=1,
        held_out=task.held_out, evaluate_party=task.evaluate_party,
    )  # fmt: skip
    weights = run.state["weight"][0].double().numpy()
    found = run.info.per_party
    wrong = 0
    for name, data in task.held_out.items():
        margins = np.array([float(point.double().numpy() @ weights) for point, _ in data])
        mine = int(((margins > 0) != (data.targets.numpy() == 1)).sum())
        assert found.metrics[name]["test error"] == pytest.approx(mine / len(data))
        wrong += mine
    assert len(found.metrics) == 6
    assert run.metrics["test error"] == pytest.approx(wrong / sum(found.records.values()))
