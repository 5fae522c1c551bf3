"""The command line as its users meet it: help, errors with a hint, exit codes, the whole job at a small size."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from choral.cli.command_line import main

SMALL = """
title = "A small comparison"
seeds = 2
epsilons = [2, 8]
device = "cpu"
[split]
parties = 3
alpha = 2.0
[training]
rounds = 3
batch_size = 64
hidden = 0
[privacy]
epsilon = 8
[arms.cloud]
centralized = true
[arms.cloud-dp]
centralized = true
private = true
[arms.federated]
secure_sum = "plain"
[arms.federated-masked]
secure_sum = "masked"

[arms.federated-homomorphic]
secure_sum = "homomorphic"
[arms.federated-dp]
private = true
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "small.toml").write_text(SMALL)
    assert main(["compare", str(folder / "small.toml"), "--out", str(folder / "out"), "--quiet"]) == 0
    return folder


def test_compare_writes_everything(finished, capsys):
    out = finished / "out"
    report = json.loads((out / "report.json").read_text())
    text = json.dumps(report)
    for arm in ("cloud", "cloud-dp", "federated", "federated-masked", "federated-homomorphic", "federated-dp"):
        assert arm in text
        assert (out / "arms" / arm).is_dir()
    assert "</html>" in (out / "report.html").read_text()
    assert len(list((out / "arms" / "cloud-dp").iterdir())) == 4
    masked, homomorphic, plain = (
        (out / "arms" / arm / "seed-0" / "model.safetensors").read_bytes()
        for arm in ("federated-masked", "federated-homomorphic", "federated")
    )
    assert masked == homomorphic == plain


def test_finished_comparison_is_not_overwritten_and_resumes(finished, capsys):
    config, out = str(finished / "small.toml"), str(finished / "out")
    before = (finished / "out" / "arms" / "cloud" / "seed-0" / "run.json").read_bytes()
    assert main(["compare", config, "--out", out]) == 2
    assert "already holds" in capsys.readouterr().err
    assert main(["compare", config, "--out", out, "--resume", "--training.rounds", "4"]) == 2
    assert "cannot resume" in capsys.readouterr().err
    weights = {path: path.stat().st_mtime_ns for path in Path(out).rglob("model.safetensors")}
    assert main(["compare", config, "--out", out, "--resume", "--price.kwh", "9"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("model.safetensors")} == weights
    assert "given as price.kwh" in (Path(out) / "report.json").read_text()
    assert "federated-masked" in capsys.readouterr().out
    assert (finished / "out" / "arms" / "cloud" / "seed-0" / "run.json").read_bytes() == before


def test_a_finished_comparison_is_evaluated_per_party_without_training(finished, capsys):
    out = finished / "out"
    words = ["compare", str(finished / "small.toml"), "--out", str(out), "--resume"]
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    ledgers = {path: path.read_bytes() for path in out.rglob("ledger/*.jsonl")}
    assert main([*words, "--evaluation.per-party"]) == 0
    assert "Worst party" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")} == weights
    assert {path: path.read_bytes() for path in out.rglob("ledger/*.jsonl")} == ledgers
    arms = json.loads((out / "report.json").read_text())["arms"]
    assert all(arm["fairness"]["listed"] == 3 for arm in arms)
    worst = {arm["name"]: next(each for each in arm["fairness"]["measures"] if each["name"] == "worst") for arm in arms}
    assert worst["federated-masked"] == worst["federated"] != worst["cloud"]
    run = json.loads((out / "arms" / "federated" / "seed-0" / "run.json").read_text())
    assert worst["federated"]["estimate"]["values"][0] == min(
        metrics["accuracy"] for metrics in run["per_party"]["metrics"].values()
    )


ATTACKED = """
seeds = 1
device = "cpu"
[split]
parties = 3
alpha = 2.0
[training]
rounds = 2
batch_size = 64
hidden = 0
[privacy]
epsilon = 2
[secure_sum]
corrupt = 1
dropouts = 0
min_survivors = 3
[audit]
canaries = 60
probe = true
[arms.cloud]
centralized = true
[arms.federated-dp]
private = true
[arms.federated-dp-shares]
private = true
algorithm = {kind = "fedsgd", batch_size = 256, steps_per_round = 2}
[arms.federated-client]
private = true
unit = "client"
"""


def test_compare_attacks_its_arms_once_and_finds_an_edited_ledger(tmp_path, capsys):
    config, out = tmp_path / "attacked.toml", tmp_path / "out"
    config.write_text(ATTACKED)
    words = ["compare", str(config), "--out", str(out), "--workers", "1"]
    assert main(words) == 0
    assert "canary records against the final model" in " ".join(capsys.readouterr().out.split())
    report = json.loads((out / "report.json").read_text())
    audits = {arm["name"]: arm["audit"] for arm in report["arms"]}
    assert {name: len(each["attacks"]) for name, each in audits.items()} == {
        "cloud": 1, "federated-dp": 1, "federated-dp-shares": 1, "federated-client": 0
    }  # fmt: skip
    attack = audits["federated-dp"]["attacks"][0]
    assert attack["scores"] == 60
    assert 1.9 < attack["claimed"] <= 2
    assert attack["finding"] == "not violated"
    assert 0 < attack["bounds"][0]["ceiling"] < 4
    assert audits["cloud"]["attacks"][0]["claimed"] is None
    assert {audits[name]["probe"]["violated"] for name in ("federated-dp", "federated-dp-shares")} == {False}
    assert {name: each["probe"] is None for name, each in audits.items()} == {
        "cloud": True, "federated-dp": False, "federated-dp-shares": False, "federated-client": True
    }  # fmt: skip
    shares = json.loads(next((out / "arms" / "federated-dp-shares").glob("*/run.json")).read_bytes())
    assert shares["privacy"].items() >= {"noise": "distributed", "colluders": 1, "min_survivors": 3}.items()
    assert "noise" not in json.loads(next((out / "arms" / "federated-dp").glob("*/run.json")).read_bytes())["privacy"]
    claim = next(arm for arm in report["arms"] if arm["name"] == "federated-dp-shares")["claim"]
    assert "a share of the noise" in claim["sentence"]
    kept = {path: path.read_bytes() for path in (out / "evidence").iterdir()}
    assert len(kept) == 3
    ledger = next((out / "arms" / "federated-dp").glob("*/ledger/*.jsonl"))
    ledger.write_bytes(ledger.read_bytes().replace(b'"steps":', b'"steps":1', 1))
    for workers in ("1", "2"):
        assert main([*words[:-1], workers, "--resume"]) == 1
        assert "VIOLATED  federated-dp, 1 run audited" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (out / "evidence").iterdir()} == kept
    page = (out / "report.html").read_text()
    assert "does not verify" in page
    assert str(tmp_path) not in page


def test_an_attack_that_cannot_be_made_leaves_its_arm_unverified(tmp_path, capsys):
    (tmp_path / "task.py").write_text(
        TASK.format(
            body="class Whole(torch.utils.data.Dataset):\n"
            "        def __init__(self, data): self.data = data\n"
            "        def __len__(self): return len(self.data)\n"
            "        def __getitem__(self, index): return self.data[index]\n"
            "    return Task(build=task.build, fit=task.fit, evaluate=task.evaluate,"
            " parties={name: Whole(data) for name, data in task.parties.items()})"
        )
    )
    config = tmp_path / "attacked.toml"
    small = ATTACKED.split("[arms.cloud]")[0].replace("probe = true", "probe = false")
    config.write_text(f'task = "{tmp_path / "task.py"}"\n{small}[arms.cloud]\ncentralized = true\n')
    assert main(["compare", str(config), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "unverified cloud, 1 run audited" in printed
    assert "these records are not (float tensor, class)" in printed


def test_too_few_canaries_are_refused_before_anything(config, tmp_path, capsys):
    assert main(["compare", config, "--out", str(tmp_path / "out"), "--audit.canaries", "7"]) == 2
    assert "expected audit.canaries >= 20, got 7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_train_audit_and_tampering(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", config, "--privacy.epsilon", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"accuracy 0\.\d+; epsilon (2\.99|3\.000)", printed)
    assert main(["audit", str(out)]) == 0
    assert (out / "report.html").is_file()
    content = json.loads((out / "run.json").read_text())
    first = next(iter(content["spent"]))
    content["spent"][first]["epsilon"] = 1.0
    (out / "run.json").write_text(json.dumps(content))
    assert main(["audit", str(out), "--out", str(tmp_path / "second")]) == 1
    ledger = next((out / "ledger").iterdir())
    ledger.write_bytes(ledger.read_bytes()[:-20] + b"x" * 20)
    assert main(["audit", str(out), "--out", str(tmp_path / "third")]) in {1, 2}


def test_train_one_arm_and_centralized(config, tmp_path, capsys):
    assert main(["train", config, "--arm", "cloud", "--out", str(tmp_path / "a"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    words = ["train", config, "--centralized", "--privacy.epsilon", "None", "--out", str(tmp_path / "b"), "--quiet"]
    assert main(words) == 0
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in "ab")
    assert first["kind"] == second["kind"] == "centralized"
    assert first["privacy"] is None
    assert (first["precision"], first["compile"]) == ("float32", False)
    for arm in ("cloud", "federated", "federated-dp"):
        out = tmp_path / f"reduced {arm}"
        words = ["train", config, "--arm", arm, "--training.precision", "bf16", "--out", str(out), "--quiet"]
        assert main(words) == 0
        assert json.loads((out / "run.json").read_text())["precision"] == "bf16"
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("command", ["compare", "train", "audit", "verify", "ledger", "export", "budget", "sums"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"choral {command}" in text


def test_help_explains_flags(capsys):
    main(["compare", "--help-all"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "--privacy.epsilon" in text
    assert "Budget of each data owner for the whole run" in text
    assert "Clipping norm of each record's gradient" in text


def test_top_level(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "choral compare examples/digits.toml" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert main(["sing"]) == 2
    hint = capsys.readouterr().err.partition("hint: one of: ")[2].partition(";")[0].split(", ")
    known = {"compare", "train", "audit", "verify", "ledger", "export", "serve", "join", "budget", "sums", "site"}
    assert set(hint) >= known


@pytest.mark.parametrize(
    ("edit", "message", "hint"),
    [
        ("epsilonn = 3\n" + SMALL, "unknown key epsilonn", "epsilons"),
        (SMALL.replace("epsilon = 8", "epsilonn = 8"), "unknown key privacy.epsilonn", "did you mean privacy.epsilon?"),
        (
            SMALL.replace("private = true", "privat = true", 1),
            "unknown key arms.cloud-dp.privat",
            "arms.cloud-dp.private",
        ),
        (
            SMALL.replace("epsilon = 8", 'epsilon = "much"'),
            "privacy.epsilon: expected `float | null`, got `str`",
            "",
        ),
        (SMALL.replace("epsilon = 8", "epsilon = -1"), "epsilon", ""),
        (SMALL.replace("epsilon = 8", "epsilon = nan"), "epsilon", ""),
        (SMALL.replace("epsilon = 8", "epsilon = 8\ndelta = 0.5"), "delta", ""),
        (SMALL.replace("parties = 3", "parties = 1"), "at least 2 parties", "centralize"),
        (SMALL.replace("parties = 3", "parties = 0"), "split.parties >= 1", ""),
        (SMALL.replace("alpha = 2.0", "alpha = 0"), "alpha > 0", ""),
        (SMALL.replace("parties = 3\nalpha = 2.0", "parties = 9\nalpha = 0.001"), "has 1 class", "alpha"),
        (SMALL.replace("rounds = 3", "rounds = 0"), "training.rounds >= 1", ""),
        (SMALL.replace("rounds = 3", 'rounds = 3\nprecision = "fp16"'), "training.precision", ""),
        (
            SMALL.replace("rounds = 3", "rounds = 3\ncompile = true"),
            "arm 'cloud-dp': compile with record-level",
            "private",
        ),
        (SMALL.replace("seeds = 2", "seeds = 0"), "seeds >= 1", ""),
        (SMALL.replace("seeds = 2", 'seeds = 2\ntask = "nothing.py"'), "no file", "Python file"),
        (SMALL.replace("epsilons = [2, 8]", "epsilons = [0]"), "epsilons > 0", ""),
        (SMALL.replace("[privacy]\nepsilon = 8", ""), "privacy.epsilon is not set", ""),
        (SMALL.split("[arms")[0], "nothing to compare", "examples/digits.toml"),
        ("title = ", "not valid TOML", ""),
        (SMALL + "[participation]\ncohorts = 2", "unknown key participation.cohorts", "participation.cohort?"),
        (SMALL + "[participation]\npatience = -1", "participation.patience >= 0", ""),
        (SMALL + "[participation.dropouts]\nvector = 2", "chances in [0, 1)", ""),
        (SMALL + "[participation]\ncohort = 4", "arm 'federated': expected a cohort of 2 to 3", ""),
        (SMALL + '[participation]\ncohort = 2\n[algorithm]\nkind = "scaffold"', "scaffold needs every party", "FedAvg"),
        ("dropout_rate = 0.1\n" + SMALL, "unknown key dropout_rate", "did you mean participation.dropouts.vector?"),
    ],
)
def test_bad_settings_end_with_2_and_one_line(edit, message, hint, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(edit)
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("choral: ")
    assert message in error
    assert hint in error
    assert len(error.strip().splitlines()) <= 2
    assert "Traceback" not in error


def test_missing_files(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "no.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "nothing")]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_bad_flags(config, tmp_path, capsys):
    assert main(["compare", config, "--out", str(tmp_path / "out"), "--privacy.epsilonn", "3"]) == 2
    assert "--privacy.epsilon" in capsys.readouterr().err
    assert main(["compare", config]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["train", config, "--arm", "nobody", "--out", str(tmp_path / "out")]) == 2
    assert "cloud, cloud-dp" in capsys.readouterr().err


def test_own_task_file(tmp_path):
    (tmp_path / "mine.py").write_text("from choral.trainers.data.sets.digits import load\n")
    (tmp_path / "mine.toml").write_text(SMALL.replace("seeds = 2", f'seeds = 2\ntask = "{tmp_path / "mine.py"}"'))
    assert main(["train", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0


def test_a_budget_where_one_record_is_replaced(capsys):
    words = ["budget", "--delta", "1e-5", "--sample-rate", "0.05", "--steps", "400", "--noise-multiplier", "1.1"]
    assert main([*words, "--neighbours", "replace one record"]) == 0
    said = capsys.readouterr().out
    assert "epsilon           9.247" in said
    assert "neighbours: replace one record" in said
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "epsilon           5.597" in said
    assert "neighbours: zero out one record" in said
    assert main([*words, "--neighbours", "add or remove one record"]) == 2


def test_budget(capsys):
    """The published setting of 10,000 steps at rate 0.01 with noise multiplier 4: epsilon 0.947 (PLD)."""
    words = ["--delta", "1e-5", "--sample-rate", "0.01", "--steps", "10000"]
    started = time.monotonic()
    assert main(["budget", *words, "--noise-multiplier", "4"]) == 0
    assert time.monotonic() - started < 10
    assert "0.9470  (PLD; RDP, the looser bound: 1.0355)" in capsys.readouterr().out
    assert main(["budget", *words, "--epsilon", "0.947"]) == 0
    assert re.search(r"(4\.000|3\.999)", capsys.readouterr().out)
    assert main(["budget", *words]) == 2
    known = ["--delta", "1e-5", "--epsilon", "3", "--noise-multiplier", "1"]
    capsys.readouterr()
    assert main(["budget", *known, "--sample-rate", "0.01"]) == 0
    assert "steps             2666 at sample rate 0.01," in capsys.readouterr().out
    assert main(["budget", *known, "--epochs", "10"]) == 0
    assert "steps             439 at sample rate 0.0227926," in capsys.readouterr().out
    assert main(["budget", *known]) == 2
    assert main(["budget", *known, "--epochs", "10", "--steps", "5"]) == 2
    assert "expected all but exactly one" in capsys.readouterr().err
    assert main(["budget", *words, "--epsilon", "-1"]) == 2
    assert main(["budget", "--delta", "2", "--sample-rate", "0.01", "--steps", "10", "--epsilon", "1"]) == 2
    capsys.readouterr()


TASK = """
import torch
from choral.trainers import Task
from choral.trainers.data.sets.digits import load as digits

def load(split, training, seed):
    task = digits(split, training, seed)
    {body}
"""
EMPTY = "empty = torch.utils.data.TensorDataset(torch.zeros(0, 64), torch.zeros(0).long()); "
NORM = "torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))"


def _replace(**parts: str) -> str:
    fields = {name: f"task.{name}" for name in ("build", "fit", "evaluate", "parties")} | parts
    return "return Task(" + ", ".join(f"{name}={value}" for name, value in fields.items()) + ")"


@pytest.mark.parametrize(
    ("body", "flags", "message"),
    [
        (EMPTY + _replace(parties="task.parties | {'late': empty}"), [], "'late' has no records"),
        (_replace(parties="{'one': task.parties['party-1']}"), [], "at least 2 parties"),
        (f"model = {NORM}; " + _replace(build="lambda d: (model, *task.build(d)[1:])"), [], "trainable parameter"),
        (
            f"model = {NORM}; opt = torch.optim.SGD(model.parameters(), lr=0.1); "
            + _replace(build="lambda d: (model, opt, task.build(d)[2])"),
            [],
            "BatchNorm1d",
        ),
        (
            _replace(fit="lambda m, o, l: [p.data.mul_(float('nan')) for p in m.parameters()]"),
            [],
            "diverged in round 1",
        ),
        (_replace(), ["--participation.dropouts.vector", "0.99"], "needed"),
        (_replace(), ["--privacy.delta", "0.01"], "not below 1/n"),
        (_replace(), ["--privacy.epsilon", "0"], "epsilon"),
        (_replace(), ["--secure-sum.min-survivors", "9"], "min_survivors"),
        (_replace(), ["--device", "cuda"], "not available"),
        (_replace(), ["--evaluation.per-party"], "holds out no records by party"),
        (
            _replace(held_out="task.parties", evaluate_party="task.evaluate_party"),
            ["--evaluation.per-party"],
            "has records that were trained on",
        ),
    ],
)
def test_bad_tasks_and_flags_name_the_fault_and_hint(body, flags, message, tmp_path, capsys):
    (tmp_path / "task.py").write_text(TASK.format(body=body))
    path = tmp_path / "bad.toml"
    path.write_text(SMALL.replace("seeds = 2", f'seeds = 1\ntask = "{tmp_path / "task.py"}"'))
    out = tmp_path / "out"
    assert main(["train", str(path), "--out", str(out), "--quiet", "--privacy.epsilon", "8", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "\n  hint: " in error
    assert len(error.strip().splitlines()) == 2
    assert not (out / "model.safetensors").exists() or "round" in error or "needed" in error


@pytest.mark.parametrize("workers", ["1", "2"])
def test_errors_of_a_worker_reach_the_user(workers, config, tmp_path, capsys):
    words = ["compare", config, "--out", str(tmp_path / "out"), "--quiet", "--participation.dropouts.vector", "0.99"]
    assert main([*words, "--workers", workers]) == 2
    error = capsys.readouterr().err
    assert re.search("needed|submitted", error)
    assert "Traceback" not in error


def test_killed_workers_end_the_job_with_2(config, tmp_path, capsys):
    (tmp_path / "task.py").write_text(TASK.format(body=_replace(evaluate="lambda m: __import__('os')._exit(9)")))
    path = tmp_path / "dies.toml"
    two = SMALL.split("[arms.cloud-dp]")[0] + "[arms.federated]\nsecure_sum = 'plain'"
    path.write_text(two.replace("seeds = 2", f'seeds = 1\ntask = "{tmp_path / "task.py"}"'))
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--quiet", "--workers", "2"]) == 2
    assert "a worker process died" in capsys.readouterr().err


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
@pytest.mark.parametrize("sign", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
def test_no_worker_outlives_the_command_and_the_rest_resumes(sign, tmp_path):
    two = SMALL.split("[arms")[0].replace("[2, 8]", "[]").replace("rounds = 3", "rounds = 40")
    (tmp_path / "two.toml").write_text(two + "[arms.federated]\nsecure_sum = 'plain'\n[arms.cloud]\ncentralized = true")
    words = ["compare", str(tmp_path / "two.toml"), "--out", str(tmp_path / "out"), "--workers", "2"]
    slow = [sys.executable, "-m", "choral", *words]
    # A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start would inherit that.
    process = subprocess.Popen(
        slow,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "out").glob("arms/*/*/model.safetensors")):
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = _children(process.pid)
    assert workers
    process.send_signal(sign)
    assert process.wait(timeout=60) == (130 if sign == signal.SIGINT else -9)
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert main([*words[:-1], "1", "--resume", "--quiet"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_secure_sum_flags_reach_the_setup(config, tmp_path):
    words = ["train", config, "--arm", "federated-masked", "--split.parties", "6", "--training.rounds", "1", "--quiet"]
    flags = ["--secure-sum.corrupt", "0", "--secure-sum.dropouts", "2", "--secure-sum.server", "semi-honest"]
    assert main([*words, *flags, "--secure-sum.min-survivors", "4", "--out", str(tmp_path / "run")]) == 0
    stated = json.loads((tmp_path / "run" / "run.json").read_text())["secure_sum"]
    assert {key: stated[key] for key in ("corrupt", "dropouts", "server", "min_survivors")} == {
        "corrupt": 0,
        "dropouts": 2,
        "server": "semi-honest",
        "min_survivors": 4,
    }


WORLD = """
[participation]
cohort = 4
least = 2
deadline = 40
patience = 2
availability = {peak = 0.9, trough = 0.8, zones = [-8, 0, 5.5]}
device = {start = 20, spread = 0.5}
dropouts = {unmasking = 0.01}
clock = {first = 7200, period = 86400}
"""


def test_participation_in_settings_and_flags(tmp_path):
    path = tmp_path / "world.toml"
    path.write_text(SMALL.replace("parties = 3", "parties = 8") + WORLD)
    words = ["train", str(path), "--arm", "federated", "--quiet", "--participation.deadline", "50"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["participation"] == {
        "cohort": 4,
        "draw": "system",
        "rate": None,
        "least": 2,
        "availability": {"peak": 0.9, "trough": 0.8, "hour": 2.0, "zones": [-8.0, 0.0, 5.5]},
        "device": {"start": 20.0, "per_example": 0.0, "spread": 0.5},
        "deadline": 50.0,
        "dropouts": {"keys": 0.0, "shares": 0.0, "vector": 0.0, "confirmation": 0.0, "unmasking": 0.01},
        "clock": {"first": 7200.0, "period": 86400.0},
        "patience": 2,
    }
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()][1:]
    assert [entry["simulated_start"] for entry in history] == [7200 + 86400 * day for day in range(3)]
    assert all(entry["asked"] <= 4 for entry in history)
