"""``choral audit``: exit codes, scores and callables, summaries, prices, and what it says to bad input."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flat_arguments import federate
from torch.utils.data import TensorDataset

from choral import Masked
from choral.audits import Audit
from choral.cli.command_line import main
from choral.trainers import Run

torch.set_num_threads(1)
MakeRun = Callable[..., Run]
MODEL = """
import random

canaries = list(range(600))


def train(members):
    return set(members)


def score(model, canaries):
    return [{score} for canary in canaries]
"""


NO_NOISE = """
from choral.privacy.accounting.events import PoissonSampledGaussian


def wrap(privacy):
    def careless(model, optimizer, loader):
        ledger = privacy._open()
        ledger.bind("data", privacy.delta)
        ledger.append(PoissonSampledGaussian(sample_rate=0.4, noise_multiplier=4.0, steps=24), after=0)
        return model, optimizer, loader

    return careless
"""
COINS = ("--design", "coins", "--scores")


@pytest.fixture
def scores(tmp_path: Path) -> Callable[..., str]:
    """A file of scores of canaries that moved by ``shift`` where they were in."""

    def make(shift: float, count: int = 1000, name: str = "scores.csv") -> str:
        rng = np.random.default_rng(4)
        members = rng.integers(0, 2, count)
        values = rng.normal(size=count) + shift * members
        path = tmp_path / name
        rows = "\n".join(f"{value},{member}" for value, member in zip(values, members, strict=True))
        path.write_text(f"score,member\n{rows}\n")
        return str(path)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real federated run of four parties, with its transcript."""
    points = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    parties = {f"p{i}": TensorDataset(points[i::4], (points[i::4, 0] > 0).long()) for i in range(4)}

    def build(data):  # type: ignore[no-untyped-def]
        model = torch.nn.Linear(6, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.utils.data.DataLoader(data, batch_size=10)

    def fit(model, optimizer, loader):  # type: ignore[no-untyped-def]
        for batch, target in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    out = tmp_path_factory.mktemp("runs") / "run"
    federate(
        build=build, fit=fit, evaluate=lambda _: 0.5, parties=parties, rounds=2, secure_sum=Masked(), out=out,
        transcript="rehearsal",
    )  # fmt: skip
    return out


def test_scores_within_the_claim_exit_0_and_beyond_it_1(
    scores: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--epsilon", "3", "--delta", "1e-5", "--design", "coins"]
    assert main(["audit", "--scores", scores(0.3), *flags]) == 0
    assert "could have detected up to" in capsys.readouterr().out
    assert main(["audit", "--scores", scores(8.0), *flags, "--out", str(tmp_path / "out")]) == 1
    assert "Violated at 95" in capsys.readouterr().out
    held = Audit.load(tmp_path / "out" / "report.json")
    assert held.attacks[0].finding == "violated"
    assert held.attacks[0].bounds[0].epsilon > 3
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(("score", "code"), [("float(canary in model)", 1), ("random.random()", 0)])
def test_a_users_own_training_by_two_callables(tmp_path: Path, score: str, code: int) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MODEL.replace("{score}", score))
    assert main(["audit", "--model", str(path), "--epsilon", "2", "--delta", "1e-5", "--quiet"]) == code


def test_a_finished_run_is_audited_in_seconds_without_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.process_time()
    assert main(["audit", str(folder), "--markdown", str(tmp_path / "card.md")]) == 0
    assert time.process_time() - started < 20
    assert "No violation found" in (tmp_path / "card.md").read_text()
    report = Audit.load(folder / "report.json")
    assert report.transcript is not None
    assert report.costs is not None


def test_scores_and_prices_go_with_a_run(folder: Path, tmp_path: Path, scores: Callable[..., str]) -> None:
    out = str(tmp_path / "out")
    flags = [
        "--scores",
        scores(0.2),
        "--design",
        "coins",
        "--delta",
        "1e-5",
        "--price.kwh",
        "9",
        "--out",
        out,
        "--quiet",
    ]
    assert main(["audit", str(folder), *flags]) == 0
    report = Audit.load(tmp_path / "out" / "report.json")
    assert (report.attacks[0].finding, report.run is not None) == ("no claim", True)
    assert report.costs is not None
    assert report.costs.prices["kwh"].value == 9


def test_a_file_may_state_its_design_and_what_follows_depends_on_it(scores: Callable[..., str], tmp_path: Path) -> None:
    """The same scores: as coins a bound by one run, as runs by two sides, as a split none."""
    text = Path(scores(2.0)).read_text()
    rows = [line.split(",") for line in text.splitlines()[1:]]
    values, members = [float(row[0]) for row in rows], [int(row[1]) for row in rows]
    decisive = {}
    for design in ("coins", "runs", "split"):
        csv, jsons = tmp_path / f"{design}.csv", tmp_path / f"{design}.json"
        csv.write_text(f"# design: {design}\n{text}")
        jsons.write_text(json.dumps({"scores": values, "members": members, "design": design}))
        found = []
        for path in (csv, jsons):
            flags = ["--scores", str(path), "--delta", "1e-5", "--epsilon", "8", "--quiet", "--out", str(tmp_path)]
            assert main(["audit", *flags]) == (design == "split")  # which could not have refuted the claim
            found.append(Audit.load(tmp_path / "report.json").attacks[0])
        assert found[0] == found[1]
        assert found[0].design == design
        decisive[design] = found[0].decisive
    assert decisive == {"coins": "one run", "runs": "Clopper-Pearson", "split": ""}


def test_few_canaries_without_a_claim_or_against_one_that_none_could_refute_are_audited(
    scores: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    few = scores(0.1, count=60)
    assert main(["audit", *COINS, few, "--delta", "1e-5"]) == 0
    assert main(["audit", *COINS, few, "--delta", "1e-5", "--epsilon", "9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no attack here could have refuted it" in said
    assert "note: The ceiling, 2.58, is not above the claim" in said


def test_the_help_says_what_each_design_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("by a fair coin of its own", "a training of its own", "fresh ones; this gives an ROC, and no bound"):
        assert part in said


# -- evidence that the command gathers itself -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of the command line: with a promise to each record, to each client, and of a task in a Python file."""
    root = tmp_path_factory.mktemp("digits")
    task = root / "own.py"
    task.write_text("from choral.trainers.data.sets.digits import load\n")
    shared = "rounds = 1\nhidden = 0\nbatch_size = 32\n[split]\nparties = 4\nkind = 'iid'\n"
    texts = {
        "record": f"[privacy]\nepsilon = 3.0\n[training]\n{shared}",
        "client": f"[privacy]\nepsilon = 8.0\nunit = 'client'\ndelta = 1e-3\n[training]\n{shared}",
        "own": f"task = {str(task)!r}\n[training]\n{shared}",
    }
    for name, text in texts.items():
        (root / f"{name}.toml").write_text(text)
        assert main(["train", str(root / f"{name}.toml"), "--out", str(root / name), "--quiet"]) == 0
    return {name: root / name for name in texts} | {"own.py": task}


def test_a_run_is_probed_under_its_own_promise_and_its_update_inverted(digits: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--probe", "--inversion", "--out", str(tmp_path), "--quiet"]
    assert main(["audit", str(digits["record"]), *flags]) == 0
    report = Audit.load(tmp_path / "report.json")
    assert report.probe is not None
    assert report.probe.canaries.claimed == pytest.approx(3.0, rel=2e-3)
    assert report.inversion is not None
    assert (report.inversion.shape, report.inversion.method) == ((8, 8), "exact (linear first layer)")
    assert [view.recovered for view in report.inversion.views] == [True, False, False, False]
    assert not {"One-run audit with canaries", "Gradient inversion"} & {left.name for left in report.not_run}


def test_an_inversion_alone_is_called_what_it_is(digits: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--inversion", "--out", str(tmp_path), "--quiet"]
    assert main(["audit", str(digits["client"]), *flags]) == 0
    assert "No attack that bounds ε was run" in Audit.load(tmp_path / "report.json").sentence


def test_a_broken_wrapper_of_ones_own_is_found_by_the_probe(tmp_path: Path) -> None:
    """The library's own, and one that pays in the ledger and then trains without noise."""
    path = tmp_path / "mine.py"
    path.write_text("def wrap(privacy):\n    return privacy.wrap\n")
    flags = ["--probe", "--wrap", str(path), "--epsilon", "2", "--delta", "1e-5", "--quiet", "--out", str(tmp_path)]
    assert main(["audit", *flags]) == 0
    assert "ε\u00a0=\u00a01.9" in Audit.load(tmp_path / "report.json").claim
    path.write_text(NO_NOISE)
    assert main(["audit", *flags]) == 1
    faulty = {check.name for check in Audit.load(tmp_path / "report.json").checks if check.verdict == "violated"}
    assert faulty >= {"Probe: Noise is as large as claimed", "Probe: Every record is clipped"}


def test_an_error_in_ones_own_code_is_not_taken_for_a_violation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's own exit code for an error is 1, which here says that a claim is violated."""
    path = tmp_path / "mine.py"
    path.write_text(MODEL.replace("{score}", "1 / 0"))
    assert main(["audit", "--model", str(path), "--epsilon", "2", "--delta", "1e-5"]) == 2
    assert "ZeroDivisionError" in (said := capsys.readouterr().err)
    assert "your own code" in said
    path.write_text("def wrap(privacy):\n    return lambda model, optimizer, loader: (model, optimizer, loader)\n")
    assert main(["audit", "--probe", "--wrap", str(path), "--epsilon", "2", "--delta", "1e-5"]) == 2
    assert "claims nothing that could be probed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "flags", "said"),
    [
        ("client", ["--probe"], "promises to each record, and this run's is to each client"),
        ("own", ["--probe"], "promises no privacy"),
        ("own", ["--inversion"], "code is not run because a folder says so"),
    ],
)
def test_what_a_run_is_no_subject_for_is_refused(
    digits: dict[str, Path], run: str, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(digits[run]), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_task_of_ones_own_is_inverted_if_it_is_named(digits: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--inversion", "--task", str(digits["own.py"]), "--out", str(tmp_path), "--quiet"]
    assert main(["audit", str(digits["own"]), *flags]) == 0
    assert Audit.load(tmp_path / "report.json").inversion is not None


def test_a_run_of_the_api_has_no_task_to_invert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folder), "--inversion"]) == 2
    assert "in Python: audit(run, inversion=" in capsys.readouterr().err


def test_a_folder_of_a_comparison_is_told_from_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "arms" / "federated" / "seed-0")
    assert main(["audit", str(tmp_path)]) == 2
    assert f"such as {tmp_path / 'arms' / 'federated' / 'seed-0'}" in capsys.readouterr().err


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--schema"]) == 0
    assert "$defs" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to audit"),
        ([*COINS, "nowhere.csv", "--delta", "1e-5"], "no file of scores"),
        ([*COINS, "{few}", "--epsilon", "3", "--delta", "1e-5"], "too few"),
        ([*COINS, "{some}", "--epsilon", "3", "--delta", "1e-5"], "60 canaries can refute at most epsilon = 2.58"),
        ([*COINS, "{some}", "--epsilon", "3", "--delta", "1e-5"], "91 canaries are needed"),
        ([*COINS, "{nan}", "--epsilon", "3", "--delta", "1e-5"], "not finite"),
        ([*COINS, "{short}", "--delta", "1e-5"], "line 3"),
        ([*COINS, "{same}", "--epsilon", "3", "--delta", "1e-5"], "equal|constant|same"),
        ([*COINS, "{good}"], "at some delta"),
        ([*COINS, "{good}", "--delta", "2"], "delta"),
        ([*COINS, "{good}", "--delta", "1e-5", "--epsilon", "-1"], "claimed epsilon"),
        (["--model", "nowhere.py", "--delta", "1e-5"], "no file"),
        (["--model", "{empty}", "--delta", "1e-5"], "no function train"),
        (["--model", "{bare}", "--delta", "1e-5"], "no canaries"),
        (["--model", "{tiny}", "--delta", "1e-5", "--epsilon", "3"], "can refute at most"),
        ([*COINS, "{good}", "--delta", "1e-5", "--markdown", "card.txt"], "Markdown"),
        (["nowhere"], "not a run folder"),
        (["--scores", "{good}", "--delta", "1e-5"], "nothing says where the memberships"),
        ([*COINS, "{runs}", "--delta", "1e-5"], "states the design 'runs', and --design is 'coins'"),
        (["--scores", "{odd}", "--delta", "1e-5"], "line 1: design is 'dice'"),
        ([*COINS, "{many}", "--delta", "1e-5"], "700 of 1000 canaries are members, which fair coins do not give"),
        (["--design", "coins", "--probe", "--delta", "1e-5", "--epsilon", "1"], "--design belongs to --scores"),
        (["--inversion"], "nothing to audit"),
        (["--inversion", "--probe"], "a run's model"),
        (["--wrap", "mine.py", *COINS, "{good}"], "--wrap belongs to --probe"),
        (["--probe"], "no run whose promise could be probed"),
        (["--probe", "--epsilon", "0", "--delta", "1e-5"], "epsilon"),
        (["--probe", "--epsilon", "1", "--delta", "1e-5", "--wrap", "{empty}"], "no function wrap"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], said: str, tmp_path: Path, scores: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    good = scores(0.1)
    files = {
        "few": "score,member\n1.0,1\n0.5,0\n0.7,1\n0.1,0\n",
        "some": "score,member\n" + "".join(f"{i % 7},{i * i % 3 % 2}\n" for i in range(60)),
        "nan": "score,member\n1.0,1\nnan,0\n",
        "short": "score,member\n1.0,1\n0.5\n",
        "same": "score,member\n" + "1.0,1\n1.0,0\n" * 200,
        "runs": "# design: runs\nscore,member\n1.0,1\n0.5,0\n",
        "odd": "# design: dice\nscore,member\n1.0,1\n0.5,0\n",
        "many": "score,member\n" + "".join(f"{i % 97},{int(i < 700)}\n" for i in range(1000)),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    modules = {
        "empty": "",
        "bare": "def train(m): ...\ndef score(m, c): ...\n",
        "tiny": "canaries = [1, 2]\ndef train(m): ...\ndef score(m, c): ...\n",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    places = {name: str(tmp_path / f"{name}.csv") for name in files} | {"good": good}
    places |= {name: str(tmp_path / f"{name}.py") for name in modules}
    assert main(["audit", *(word.format(**places) for word in words)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_the_hint_says_how_many_canaries_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scores: Callable[..., str]
) -> None:
    path = tmp_path / "tiny.py"
    path.write_text("canaries = range(8)\ndef train(m): ...\ndef score(m, c): ...\n")
    assert main(["audit", "--model", str(path), "--delta", "1e-5", "--epsilon", "3"]) == 2
    assert "canaries are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "history.jsonl").unlink(), "no history.jsonl"),
        (lambda run: (run / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda run: swap(run / "run.json", '"version": 1', '"version": 9'), "of format version 9"),
        (lambda run: swap(run / "run.json", '"rounds": 2', '"rounds": "two"'), "damaged"),
        (lambda run: swap(run / "run.json", '"rounds": 2', '"rounds": 2, "bonus": 1'), "damaged"),
        (lambda run: swap(run / "history.jsonl", '"round":1', '"round":5'), "does not hold rounds"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x" * 40), "damaged"),
        (lambda run: (run / "transcript" / "index.jsonl").write_text("hello\n"), "damaged"),
    ],
)
def test_a_run_folder_that_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    damage(copy)
    assert main(["audit", str(copy)]) == 2
    assert said in capsys.readouterr().err


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
