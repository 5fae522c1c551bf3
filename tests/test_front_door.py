"""Typical mistakes of a new user, at the command line and in Python: what is said, in the words of the door."""

from __future__ import annotations

import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_arguments import federate
from small_jobs import PROGRAM, SETTINGS
from torch.utils.data import DataLoader, TensorDataset

from choral.audits.costs.prices import read_prices
from choral.cli.command_line import main
from choral.errors import ChoralError, ConfigError
from choral.jobs.settings import Settings, read_settings
from choral.trainers.algorithms import FedProx

SMALL = (
    SETTINGS
    + """[arms.fed]
secure_sum = "plain"
"""
)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def said(capsys: Any, words: list[str], code: int = 2) -> str:
    assert main(words) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return str(error)


OWN = """
from choral.trainers import Task
from choral.trainers.data.sets.digits import load as digits

def load(split, training, seed):
    task = digits(split, training, seed)
    def evaluate(model):
        {body}
    return Task(build=task.build, fit=task.fit, evaluate=evaluate, parties=task.parties)
"""


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("file", "where", "what"),
    [
        (OWN.format(body="return 1 / 0"), "line 8, in evaluate: ", "ZeroDivisionError: division by zero"),
        (OWN.format(body="return open('visits.csv')"), "line 8, in evaluate: ", "FileNotFoundError"),
        (OWN.format(body="import torch; torch.zeros(2) @ torch.zeros(3)"), "line 8, in evaluate: ", "RuntimeError"),
        (OWN.format(body="import sys; sys.exit()"), "line 8, in evaluate: ", "SystemExit"),
        ("\nimport pandsa\n", "line 2: ", "ModuleNotFoundError: No module named 'pandsa'"),
        ("def load(:\n", "line 1: ", "SyntaxError"),
        ("import sys\nsys.exit('no')\n", "line 2: ", "SystemExit"),
        ("def load(split, training, seed):\n    return missing\n", "line 2, in load: ", "NameError"),
    ],
)
def test_an_error_of_ones_own_code_ends_with_2_and_its_line(
    command: str, file: str, where: str, what: str, config: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "mine.py").write_text(file)
    words = [command, config, "--task", str(tmp_path / "mine.py"), "--out", str(tmp_path / "out"), "--quiet"]
    error = said(capsys, [*words, *(("--workers", "1", "--seeds", "1") if command == "compare" else ())])
    assert f"mine.py, {where}{what}" in error
    assert len(error.splitlines()) == 2
    assert "choral/" not in error


def test_debug_shows_the_whole_traceback(config: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(OWN.format(body="return 1 / 0"))
    words = ["train", config, "--task", str(tmp_path / "mine.py"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*words, "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "command_line.py" in error
    assert error.splitlines()[-2].startswith("choral: ")
    assert main(["train", "no.toml", "--out", "x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_module_that_lies_beside_the_task_is_explained(config: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "mine.py").write_text("import helper\n")
    error = said(capsys, ["train", config, "--task", str(tmp_path / "mine.py"), "--out", str(tmp_path / "out")])
    assert f"PYTHONPATH={tmp_path}" in error


def test_a_fault_of_our_own_is_no_verdict(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delattr("choral.jobs.training.with_overrides")
    error = said(capsys, ["train", config, "--out", str(tmp_path / "out")])
    assert "stopped by NameError" in error
    assert "which is of no file of yours" in error


def test_ctrl_c_speaks_of_resume_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for command, resume in (("train", True), ("compare", True), ("audit", False), ("budget", False)):
        monkeypatch.setitem(sys.modules["choral.cli.command_line"]._COMMANDS, command, _interrupted)
        assert ("--resume" in said(capsys, [command], code=130)) == resume


def _interrupted(_: list[str]) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("edit", "message", "hint"),
    [
        ('task = "digit"', "no task 'digit'", "did you mean 'digits'?"),
        ('task = "visits.csv"', "'visits.csv', a file of data", "choral init --data"),
        ('task = "."', "'.', a folder", "Python file"),
        ('[secure_sum]\nkind = "mask"', "secure_sum.kind is 'mask', expected one of plain, masked", "'masked'?"),
        ('[arms.b]\nsecure_sum = "homomorph"', "arms.b.secure_sum is 'homomorph'", "did you mean 'homomorphic'?"),
        ('[arms.b]\nunit = "clients"', "arms.b.unit is 'clients', expected one of record, client", "'client'?"),
        ('[privacy]\nnoise = "server"', "expected one of distributed, local, central", "one of these words"),
        ('[algorithm]\nkind = "fedprx"', "algorithm.kind is 'fedprx', expected one of ", "did you mean 'fedprox'?"),
        ('device = "gpu"', "device is 'gpu', expected one of auto, cpu, cuda, mps", ""),
    ],
)
def test_words_of_settings_are_listed_with_the_nearest(
    edit: str, message: str, hint: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(SMALL.replace('device = "cpu"', edit) if "[" not in edit else SMALL + edit + "\n")
    error = said(capsys, ["compare", str(path), "--out", str(tmp_path / "out")])
    assert message in error
    assert hint in error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--epsilon", "--privacy.epsilon?"),
        ("--rounds", "--training.rounds?"),
        ("--batch_size=3", "--training.batch-size or --algorithm.batch-size?"),
        ("--alpha", "--split.alpha?"),
    ],
)
def test_a_flag_without_its_table_is_completed(flag: str, meant: str, config: str, tmp_path: Path, capsys: Any) -> None:
    error = said(capsys, ["train", config, "--out", str(tmp_path / "out"), flag, "3"])
    assert f"did you mean {meant}" in error
    assert len(error.splitlines()) == 2


def test_files_with_a_byte_order_mark_are_read(config: str, tmp_path: Path, capsys: Any) -> None:
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert read_settings(marked, Settings) == read_settings(config, Settings)
    marked.write_bytes(SMALL.encode("utf-16"))
    assert "not text in UTF-8" in said(capsys, ["train", str(marked), "--out", str(tmp_path / "out")])
    marked.write_bytes(b'\xef\xbb\xbf[kwh]\nvalue = 0.5\nsource = "a bill"\n')
    assert read_prices(marked).entries["kwh"].value == 0.5


def test_the_next_command_can_be_pasted_into_a_shell(config: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "my runs; $(boom)"
    assert main(["train", config, "--out", str(out)]) == 0
    assert f"next: choral audit '{out}'" in capsys.readouterr().out


def job() -> dict[str, Any]:
    parties = {name: TensorDataset(torch.randn(8, 2), torch.arange(8) % 2) for name in "ab"}

    def build(dataset: Any) -> Any:
        model = torch.nn.Linear(2, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=4)

    def fit(model: Any, optimizer: Any, loader: Any) -> None:
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return {"build": build, "fit": fit, "evaluate": lambda _: 0.5, "parties": parties, "rounds": 1}


def test_hints_speak_the_language_of_the_door(config: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert main(["train", config, "--out", str(out), "--quiet"]) == 0
    assert "--resume" in said(capsys, ["train", config, "--out", str(out)])
    refusals: list[Any] = [
        lambda: federate(**job(), out=out),
        lambda: federate(**job(), out=out, resume=True),
        lambda: federate(**job(), device="cuda:7"),
        lambda: federate(**{**job(), "parties": {"one": job()["parties"]["a"]}}),
    ]
    for refused in refusals:
        with pytest.raises(ChoralError) as error:
            refused()
        assert error.value.hint
        assert "--" not in error.value.hint
    assert "resume=True" in str(_hint(refusals[0]))
    one_class = {name: TensorDataset(torch.randn(8, 2), torch.zeros(8).long()) for name in "ab"}
    assert "min_classes=1" in _hint(lambda: federate(**{**job(), "parties": one_class}))
    flags = ["--split.parties", "9", "--split.alpha", "0.001"]
    assert "--split.min-classes 1" in said(capsys, ["train", config, "--out", str(tmp_path / "b"), *flags])


def _hint(refused: Any) -> str:
    with pytest.raises(ChoralError) as error:
        refused()
    return error.value.hint


def test_a_traceback_ends_with_the_hint() -> None:
    """What a script or a notebook shows of an error that nobody caught; also after it came from another process."""
    error = ConfigError("epsilon is 0", hint="Values from 1 to 8 are usual.")
    for shown in (error, pickle.loads(pickle.dumps(error))):  # noqa: S301
        assert shown.hint == error.hint
        assert traceback.format_exception(shown)[-1] == "hint: Values from 1 to 8 are usual.\n"
    assert traceback.format_exception(ConfigError("no hint"))[-1].endswith("no hint\n")


def test_an_algorithm_is_taken_by_its_name() -> None:
    assert federate(**job(), algorithm="fedprox").info.algorithm == FedProx().record()
    with pytest.raises(ConfigError, match="algorithm is 'fedprx', expected an Algorithm, or one of fedavg"):
        federate(**job(), algorithm="fedprx")
    with pytest.raises(ConfigError, match="algorithm is the class FedProx"):
        federate(**job(), algorithm=FedProx)  # type: ignore[arg-type]


WITHOUT_LOCKS = """
import os, signal, socket, sys
import torch
for name in ("fcntl", "msvcrt", "termios", "resource", "pwd", "grp"):
    sys.modules[name] = None  # as where there is none: importing it fails
for module, names in {  # what POSIX has and Windows has not
    os: ("fork", "geteuid", "getuid", "O_DIRECTORY", "O_NOFOLLOW", "sched_getaffinity", "memfd_create", "fchmod"),
    signal: ("SIGHUP",),
    socket: ("AF_UNIX",),
}.items():
    for name in names:
        delattr(module, name)
"""
LOCKING = """
from choral.locks import NoLocksError
from choral.privacy import Ledger
choral.audit(choral.federate(**job, secure_sum="masked")).save("report.html")
for needs_a_lock in (
    lambda: Ledger("ledger.jsonl"),
    lambda: choral.Privacy(3.0, 1e-5, ledger="ledger.jsonl"),
    lambda: choral.federate(**job, keep=choral.Keep(out="kept")),
):
    try:
        needs_a_lock()
    except NoLocksError as error:
        assert any(name in str(error) for name in ("ledger.jsonl", "kept")) and "WSL" in error.hint, error
    else:
        raise AssertionError
from choral.cli.command_line import main
for words in (["train", sys.argv[1], "--out", "run", "--quiet"], ["poc", sys.argv[1], "--out", "poc", "--quiet"]):
    code = main(words)
    assert code == 2, code
"""


def test_without_file_locks_all_works_that_needs_none(config: str, tmp_path: Path) -> None:
    """As on Windows: naming, wrapping, federating and auditing in memory work; what needs a lock says so."""
    words = [sys.executable, "-c", WITHOUT_LOCKS + PROGRAM + LOCKING, config]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this system has no POSIX file locks") == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ledger.jsonl").exists()
    assert (tmp_path / "report.html").exists()


NOTEBOOK = """
import sys, warnings
sys.ps1 = ">>> "  # at a prompt
import torch
from torch.utils.data import DataLoader, TensorDataset
from choral import Privacy
from choral.audits import probe

def cell(ledger=None):
    model = torch.nn.Linear(2, 2)
    data = TensorDataset(torch.randn(64, 2), torch.arange(64) % 2)
    Privacy(3.0, 1e-3, ledger=ledger).wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=8)
    )

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    probe(Privacy(3.0, 1e-5))
    cell("ledger.jsonl")
    assert not seen, seen
    cell()
    cell()
assert [str(each.category.__name__) for each in seen] == ["LedgerInMemoryWarning"], seen
assert "starts the budget at zero" in str(seen[0].message) and "ledger=FILE" in str(seen[0].message)
"""


def test_a_ledger_in_memory_is_noticed_once_at_a_prompt_and_never_in_a_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", NOTEBOOK], cwd=tmp_path, check=True, capture_output=True)
    script = NOTEBOOK.split("with warnings")[0].replace('sys.ps1 = ">>> "', "pass") + "cell()\n"
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, check=True, capture_output=True)
