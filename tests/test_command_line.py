"""The command line's words: short help without torch, errors in one style, figures as JSON, reports drawn again."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from choral.cli.arguments import flags_of
from choral.cli.command_line import main
from choral.cli.short_help import SHORT
from choral.cli.sites.poc import PocFlags
from choral.cli.sites.serve import ServeFlags
from choral.cli.train import CompareFlags, TrainFlags
from choral.privacy import Ledger
from choral.privacy.accounting.events import PoissonSampledGaussian

DIGITS = "examples/digits.toml"
FLAGS = {"compare": CompareFlags, "train": TrainFlags, "serve": ServeFlags, "poc": PocFlags}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


class TestHelp:
    @pytest.mark.parametrize("command", SHORT)
    def test_the_first_page_names_flags_that_there_are(self, command: str, capsys: Any) -> None:
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        named = set(re.findall(r"^ +--([a-z.-]+)", text, re.MULTILINE))
        assert len(named) > 8
        assert named - {"help-all"} <= set(flags_of(FLAGS[command]))
        assert max(map(len, text.splitlines())) <= 80
        assert len(text.splitlines()) <= 40

    @pytest.mark.parametrize("command", ["compare", "audit"])
    def test_every_flag_is_on_the_other(self, command: str, capsys: Any) -> None:
        assert main([command, "--help-all"]) == 0
        text = capsys.readouterr().out
        assert "Raises" not in text
        assert max(map(len, text.splitlines())) <= 80
        if command == "compare":
            missing = [flag for flag in flags_of(CompareFlags) if f"--{flag}" not in text and flag != "config"]
            assert missing == ["arms"]  # of which CONFIG has tables

    def test_it_takes_no_torch_and_half_a_second(self) -> None:
        code = "import sys; from choral.cli.command_line import main; main(['compare', '--help']);"
        code += "main(['train', '--help']); sys.exit('torch' in sys.modules)"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5

    def test_every_flag_takes_no_torch_either(self) -> None:
        code = "import sys; from choral.cli.command_line import main; main(['compare', '--help-all']);"
        code += "sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([DIGITS, "--out", "x", "--privacy.epsilonn", "3"], "unknown flag --privacy.epsilonn", "--privacy.epsilon?"),
        ([DIGITS, "--out", "x", "--privacy.epsilon", "three"], "--privacy.epsilon is 'three', expected a number", ""),
        ([DIGITS, "--out", "x", "--seeds", "2.5"], "--seeds is '2.5', expected a whole number", ""),
        (
            [DIGITS, "--out", "x", "--secure-sum.kind", "mask"],
            "expected one of homomorphic, masked, plain",
            "mean masked?",
        ),
        ([DIGITS, "--out", "x", "--qqq"], "unknown flag --qqq", "--help-all lists every flag"),
        ([DIGITS], "--out is not given", "Folder for the runs"),
        ([DIGITS, "--out"], "--out needs a value", ""),
        ([DIGITS, "more", "--out", "x"], "unexpected word 'more'", "choral compare --help"),
        (["--out", "x"], "CONFIG is not given", "TOML file"),
        (["--out", "x", DIGITS], f"{DIGITS} must come before the flags", f"choral compare {DIGITS}"),
    ],
)
def test_flags_that_are_not_understood(words: list[str], message: str, hint: str, capsys: Any) -> None:
    assert main(["compare", *words]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("choral: ")
    assert message in first
    assert second.startswith("  hint: ")
    assert hint in second


def test_a_near_miss_of_a_command_is_named(capsys: Any) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["verify"]) == 2
    assert "choral: FILE is not given" in capsys.readouterr().err


def test_the_holder_of_a_ledger_does_not_steer_the_terminal(tmp_path: Path, capsys: Any) -> None:
    kept = Ledger(tmp_path / "ledger.jsonl", holder="north\x1b[2J")
    kept.bind("north\x1b[2J", 1e-5)
    kept.append(PoissonSampledGaussian(sample_rate=0.5, noise_multiplier=2.0, steps=1), after=0)
    for action in ("show", "sum", "head"):
        assert main(["ledger", action, str(tmp_path / "ledger.jsonl")]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "north\\x1b[2J" in shown


def test_figures_as_json(tmp_path: Path, capsys: Any) -> None:
    small = ["--training.rounds", "1", "--privacy.epsilon", "8", "--split.parties", "3"]
    assert main(["train", DIGITS, "--arm", "federated-dp", "--out", str(tmp_path / "run"), "--json", *small]) == 0
    shown = capsys.readouterr()
    run = json.loads(shown.out)
    assert (run["rounds"], sorted(run["spent"])) == (1, ["party-1", "party-2", "party-3"])
    assert "federated-dp: round 1 of 1, accuracy" in shown.err  # no terminal: a line in the log
    assert main(["audit", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run/report.json").read_text())
    assert main(["ledger", "show", str(tmp_path / "run/ledger"), "--json"]) == 0
    ledgers = json.loads(capsys.readouterr().out)
    assert {each["holder"]: each["epsilon"] for each in ledgers} == {
        name: pytest.approx(spent["epsilon"]) for name, spent in run["spent"].items()
    }
    assert main(["ledger", "sum", str(tmp_path / "run/ledger"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] > max(each["epsilon"] for each in ledgers)
    assert main(["ledger", "head", str(tmp_path / "run/ledger"), "--json"]) == 0
    heads = json.loads(capsys.readouterr().out)
    assert ([len(each["head"]) for each in heads["heads"]], heads["holds"]) == ([64] * 3, None)

    (tmp_path / "run/report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    assert "no violation found" in capsys.readouterr().out
    page, made = tmp_path / "run" / "report.html", tmp_path / "run" / "report.json"
    check, drawn, saved = ["report", str(tmp_path / "run"), "--check"], page.read_bytes(), made.read_bytes()
    assert main(check) == 0
    for path, edited, said in (
        (page, drawn.replace(b"</h1>", b" (held)</h1>", 1), "report.html is not the page that is drawn from"),
        (page, drawn + b"<script>1</script>", "report.html is not the page that is drawn from"),
        (made, saved.replace(b'"title"', b'"title": "Another", "title"', 1), "report.json is not as Choral writes it"),
    ):
        capsys.readouterr()
        path.write_bytes(edited)
        assert main(check) == 1
        assert said in capsys.readouterr().out
        page.write_bytes(drawn)
        made.write_bytes(saved)
    assert main(check) == 0
    page.unlink()
    assert main(check) == 2
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "card.md"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "choral-report"
    assert (tmp_path / "card.md").read_text().startswith("#")


def test_no_report_to_draw(tmp_path: Path, capsys: Any) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no report at" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("[]")
    assert main(["report", str(tmp_path)]) == 2
    assert "is no report" in capsys.readouterr().err


def test_a_budget_as_json(capsys: Any) -> None:
    words = ["--epsilon", "3", "--delta", "1e-5", "--sample-rate", "0.01", "--steps", "200"]
    assert main(["budget", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] <= 3


@pytest.mark.parametrize("command", ["compare", "train", "serve", "poc", "stats"])
def test_no_command_overlooks_a_settings_file_behind_the_flags(command: str, tmp_path: Path, capsys: Any) -> None:
    """It would run with defaults, as if the file said nothing."""
    needed = {"serve": ["--directory", str(tmp_path / "d.toml")]}.get(command, [])
    assert main([command, "--out", str(tmp_path / "x"), *needed, DIGITS]) == 2
    assert f"{DIGITS} must come before the flags" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
