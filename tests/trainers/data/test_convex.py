"""Logistic regression with a known optimum: measured against scikit-learn and torch, trained by formula as by fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flat_arguments import federate
from sklearn.linear_model import LogisticRegression

from choral.errors import ConfigError
from choral.jobs.settings import Arm, PrivacySettings, Settings, SumSettings
from choral.jobs.training import trainer_of
from choral.trainers import Split, Training
from choral.trainers.data import TASKS
from choral.trainers.data.generators import sparse_posts
from choral.trainers.data.sets.convex import ERROR, GAP, Problem, convex_task, dealt_again

TRAINING = Training(hidden=0, weight_decay=0.01, learning_rate=0.3, batch_size=4, rounds=3)


@pytest.fixture(scope="module")
def made():
    posts = sparse_posts(parties=5, features=60, words=8, least=20, most=60, seed=3)
    tests = {name: data for name, data in posts.tests.items() if name != "party-0"} | {"new": posts.tests["party-0"]}
    return posts.parties, tests


def arrays(parties):
    rows = np.concatenate([data.rows.toarray() for data in parties.values()])
    return rows, torch.cat([data.targets for data in parties.values()]).numpy()


def test_measures_are_those_of_scikit_learn_and_torch(made):
    parties, tests = made
    problem = Problem(parties, tests, 0.01)
    (rows, labels), (test_rows, test_labels) = arrays(parties), arrays(tests)
    oracle = LogisticRegression(C=1 / (0.01 * len(labels)), fit_intercept=False, tol=1e-10, max_iter=2000)
    best = oracle.fit(rows, labels)
    assert problem.optimum[0] == pytest.approx(best.coef_[0], abs=1e-4)
    assert problem.references()[ERROR]["optimum"] == pytest.approx(1 - best.score(test_rows, test_labels))
    weights = np.random.default_rng(0).normal(size=60)
    margins = torch.from_numpy(rows @ weights)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(margins, torch.from_numpy(labels).double())
    found = problem.measured(weights)
    assert found[GAP] == pytest.approx(loss.item() + 0.005 * (weights**2).sum() - problem.optimum[1], rel=1e-9)
    assert found[ERROR] == pytest.approx(((test_rows @ weights > 0) != test_labels).mean())
    assert 0 <= problem.measured(problem.optimum[0])[GAP] < 1e-12


def test_levels_by_hand(made):
    """A party without records to train on gets everybody's answer."""
    parties, tests = made
    most = arrays(parties)[1].mean() > 0.5
    wrong = {"everybody": 0, "own": 0}
    for name, data in tests.items():
        own = parties[name].targets.double().mean().item() > 0.5 if name in parties else most
        labels = data.targets.numpy() == 1
        wrong["everybody"] += (labels != most).sum()
        wrong["own"] += (labels != own).sum()
    levels = Problem(parties, tests, 0.01).references()[ERROR]
    records = sum(map(len, tests.values()))
    assert levels["majority"] == pytest.approx(wrong["everybody"] / records)
    assert levels["each party's majority"] == pytest.approx(wrong["own"] / records)
    assert wrong["everybody"] != wrong["own"]


def test_the_formula_does_what_fit_does(made):
    parties, tests = made
    task = convex_task(Problem(parties, tests, 0.01), parties, TRAINING)
    job = {name: getattr(task, name) for name in ("build", "fit", "evaluate", "parties", "loss")}
    by_fit, by_formula = (federate(**job, rounds=3, min_classes=1, engine=engine) for engine in (None, task.engine))
    assert (by_fit.state["weight"] - by_formula.state["weight"]).abs().max() < 1e-6
    assert by_fit.state["weight"].abs().max() > 0.1
    assert by_formula.metrics[GAP] < by_formula.history[0].metrics[GAP]


def test_dealt_again_keeps_records_and_sizes(made):
    parties, _ = made
    dealt = dealt_again(parties, 1)
    assert {name: len(data) for name, data in dealt.items()} == {name: len(data) for name, data in parties.items()}
    before, after = (sorted(map(tuple, np.column_stack(arrays(each)).tolist())) for each in (parties, dealt))
    assert before == after
    assert (dealt["party-0"].rows != parties["party-0"].rows).nnz


def test_dealing_again_changes_no_measure():
    """The gap before training must be the same to the last bit: reports hold arms to that."""
    split = Split(kind="key", parties=4)
    tasks = [
        TASKS["posts-convex"](dataclasses.replace(split, reshuffle=each), TRAINING, 5, None) for each in (False, True)
    ]
    weights = torch.linspace(-1, 1, 20_002)
    found = []
    for task in tasks:
        model = task.build(task.parties["party-0"])[0]
        with torch.no_grad():
            model.weight[0] = weights
        found.append((task.evaluate(model), task.references()))
    assert found[0] == found[1]
    assert (tasks[0].parties["party-0"].rows != tasks[1].parties["party-0"].rows).nnz


@pytest.mark.parametrize(
    ("split", "training", "says"),
    [
        ({}, {"hidden": 8}, "hidden = 0"),
        ({}, {"weight_decay": 0.0}, "weight_decay = "),
        ({"kind": "iid"}, {}, 'split.kind = "key"'),
    ],
)
def test_refuses(split, training, says):
    with pytest.raises(ConfigError) as caught:
        TASKS["posts-convex"](
            Split(**({"kind": "key", "parties": 2} | split)), dataclasses.replace(TRAINING, **training), 0, None
        )
    assert says in caught.value.hint


@pytest.mark.parametrize(
    ("training", "privacy", "used"),
    [
        ({}, {}, True),
        ({"precision": "bf16"}, {}, False),
        ({}, {"unit": "record"}, False),
        ({}, {"unit": "client"}, True),
    ],
)
def test_the_engine_of_a_task_is_left_out_where_it_would_ignore_a_setting(made, training, privacy, used):
    parties, tests = made
    task = convex_task(Problem(parties, tests, 0.01), parties, TRAINING)
    asked, own = [], task.engine

    def engine(resident):
        asked.append(resident)
        return own(resident)

    task = dataclasses.replace(task, engine=engine)
    settings = Settings(
        training=dataclasses.replace(TRAINING, rounds=1, **training),
        split=Split(min_classes=1),
        privacy=PrivacySettings(epsilon=8.0, noise="central", **privacy),
        secure_sum=SumSettings(kind="plain"),
        device="cpu",
    )
    trainer_of(settings, Arm(private=bool(privacy)), 0, 8.0)(task)
    assert bool(asked) is used
