"""Algorithms chosen in settings, by TOML and by flag."""

from __future__ import annotations

import dataclasses

import pytest

from choral.cli.command_line import main
from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings, read_settings
from choral.jobs.training import algorithm_of
from choral.trainers import Run
from choral.trainers.algorithms import GD, KINDS, CoCoA, FedAdam, FedAvg, FedProx, Scaffold
from choral.trainers.task.settings import AlgorithmSettings, Training


def test_settings_have_every_hyper_parameter_of_every_algorithm():
    of_kinds = {field.name for kind in KINDS.values() for field in dataclasses.fields(kind)}
    assert of_kinds | {"kind"} == {field.name for field in dataclasses.fields(AlgorithmSettings)}
    for name, kind in KINDS.items():
        said = {field.name: field.default for field in dataclasses.fields(kind)}
        chosen = algorithm_of(Settings(algorithm=AlgorithmSettings(kind=name, **said)), Arm())
        assert chosen == kind()


def test_an_arm_sets_its_own(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(
        '[algorithm]\nkind = "fedprox"\nmu = 0.5\n[arms.a]\n[arms.b]\nalgorithm = {mu = 0.1}\n'
        '[arms.c]\nalgorithm = {kind = "fedadam", tau = 0.1}\n'
    )
    settings = read_settings(path, Settings)
    made = [algorithm_of(settings, arm) for arm in settings.arms.values()]
    assert made == [FedProx(mu=0.5), FedProx(mu=0.1), FedAdam(tau=0.1)]
    assert algorithm_of(Settings(), Arm()) == FedAvg()


def test_a_setting_of_another_algorithm_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm\.mu is set, which fedadam does not have"):
        algorithm_of(Settings(algorithm=AlgorithmSettings(kind="fedadam", mu=0.1)), Arm())


def test_the_command_line_trains_one(tmp_path, capsys):
    path = tmp_path / "job.toml"
    path.write_text('task = "digits"\n[split]\nparties = 3\n[training]\nrounds = 2\n')
    words = ["train", str(path), "--out", str(tmp_path / "run"), "--quiet", "--device", "cpu"]
    assert main([*words, "--algorithm.kind", "scaffold", "--algorithm.server-rate", "0.9"]) == 0
    assert Run.load(tmp_path / "run").info.algorithm == Scaffold(server_rate=0.9).record()
    words[3] = str(tmp_path / "other")
    assert main([*words, "--algorithm.kind", "dane", "--privacy.epsilon", "4"]) == 2
    assert "dane also releases" in capsys.readouterr().err


def test_weight_decay_is_the_ridge_of_algorithms_that_have_one():
    settings = Settings(training=Training(weight_decay=0.02))
    assert algorithm_of(settings, Arm(algorithm=AlgorithmSettings(kind="gd"))) == GD(ridge=0.02)
    assert algorithm_of(settings, Arm(algorithm=AlgorithmSettings(kind="gd", ridge=0.5))) == GD(ridge=0.5)
    assert algorithm_of(settings, Arm(algorithm=AlgorithmSettings(kind="fedavg"))) == FedAvg()
    assert algorithm_of(Settings(), Arm(algorithm=AlgorithmSettings(kind="cocoa"))) == CoCoA()
