"""Two real processes, as torchrun starts them, against one: the same batches, steps and weights up to rounding."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from flat_arguments import centralize

from choral import Privacy, Run
from choral.cli.command_line import main
from choral.errors import ConfigError
from choral.trainers.centralized.data_parallel import BatchShares, Workers
from choral.trainers.task.task import TaskError

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from choral import Compute, Keep, Task, centralize
torch.set_num_threads(1)
points = torch.randn(61, 5, generator=torch.Generator().manual_seed(0))
data = TensorDataset(points, (points[:, 0] > 0).long())
def build(dataset):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return model, optimizer, DataLoader(dataset, batch_size=12, shuffle=True)
def fit(model, optimizer, loader):
    for number, (batch, target) in enumerate(loader):
        if number % EVERY == 0:
            optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), target).backward()
        if (number + 1) % EVERY == 0 or number + 1 == len(loader):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
        MORE
def evaluate(model):
    return (model(points).argmax(dim=1) == data.tensors[1]).float().mean().item()
run = centralize(Task(build=build, fit=fit, evaluate=evaluate), {"a": data}, rounds=3,
                 data_parallel=len(sys.argv) > 2, compute=Compute(seed=2), keep=Keep(out=sys.argv[1]))
print(run.metrics["accuracy"])
"""


THREADS = """
import atexit, os, sys
atexit.register(lambda: print("threads", len(os.listdir("/proc/self/task")), file=sys.stderr))
"""


def script(tmp_path, every=1, more="pass"):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("EVERY", str(every)).replace("MORE", more))
    return str(path)


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two_processes(tmp_path, path, out):
    """Exit codes and errors of both, started with torchrun's variables on the loopback interface."""
    port = str(free_port())
    processes = [
        warm_python.start(
            [path, str(out), "parallel"],
            env=environment(
                RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def alone(path, out):
    """The same script in this process."""
    arguments, sys.argv = sys.argv, [path, str(out)]
    threads = torch.get_num_threads()
    try:
        runpy.run_path(path)
    finally:
        sys.argv = arguments
        torch.set_num_threads(threads)
    return Run.load(out)


def assert_close(first, second):
    for name, tensor in first.state.items():
        assert torch.allclose(tensor, second.state[name], atol=2e-6), name
    assert [entry.metrics for entry in first.history] == [entry.metrics for entry in second.history]


def test_two_processes_train_what_one_does(tmp_path):
    """61 records in batches of 12: the last one has a single record, so that one process has no share of it.

    Gradients are accumulated over two batches, then clipped: both must see those of the whole batch.
    """
    path = script(tmp_path, every=2)
    Path(path).write_text(THREADS + Path(path).read_text())
    codes, errors = in_two_processes(tmp_path, path, tmp_path / "two")
    assert codes == [0, 0], errors
    if sys.platform == "linux":  # a thread of the group that is left would abort a process as it exits, now and then
        assert ["threads 1" in error for error in errors] == [True, True]
    one, two = alone(path, tmp_path / "one"), Run.load(tmp_path / "two")
    assert_close(one, two)
    assert (one.info.processes, two.info.processes) == (1, 2)
    assert one.history[-1].metrics["accuracy"] > one.history[0].metrics["accuracy"]


@pytest.mark.slow  # torchrun is also that of the command line, below, and the script's processes those above
def test_under_torchrun(tmp_path):
    path = script(tmp_path)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, str(tmp_path / "two"), "p"]
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_close(alone(path, tmp_path / "one"), Run.load(tmp_path / "two"))


def test_the_command_line_under_torchrun(tmp_path):
    """One of the two processes speaks, and the cloud's arm is data-parallel; comparing is for one process."""
    settings = ROOT / "examples" / "digits.toml"
    words = [str(settings), "--arm", "cloud", "--training.rounds", "2", "--out"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "choral"]
    done = warm_python.run(
        [*start, "train", *words, str(tmp_path / "two")], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cloud: 2 rounds") == 1
    assert main(["train", *words, str(tmp_path / "one"), "--quiet"]) == 0
    one, two = Run.load(tmp_path / "one"), Run.load(tmp_path / "two")
    assert (one.info.processes, two.info.processes) == (1, 2)
    assert_close(one, two)


def test_comparing_is_for_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = str(ROOT / "examples" / "digits.toml")
    assert main(["compare", settings, "--out", str(tmp_path / "out")]) == 2
    assert "--workers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_drift_apart_end_the_run(tmp_path):
    """A fit that goes by its own process's records: each would have a model of its own, and one be recorded."""
    more = "optimizer.param_groups[0]['lr'] *= 0.5 if float(batch[0, 0]) > 0 else 1.5"
    codes, errors = in_two_processes(tmp_path, script(tmp_path, more=more), tmp_path / "two")
    assert codes == [1, 1]
    assert all("the models of the processes have drifted apart" in error for error in errors)
    assert len(Run.load(tmp_path / "two").history) == 1


def test_a_process_that_ends_ends_the_run(tmp_path):
    more = "import os; (os.environ.get('RANK') == '1' and number == 2) and os._exit(7)"
    codes, errors = in_two_processes(tmp_path, script(tmp_path, more=more), tmp_path / "two")
    assert codes == [1, 7]
    assert "another process of the run has ended or does not answer" in errors[0]


def test_shares_are_every_second_record_of_one_processes_batches(monkeypatch):
    loader = torch.utils.data.DataLoader(range(11), batch_size=4, shuffle=True)
    torch.manual_seed(3)
    whole = [[batch.tolist() for batch in loader] for _ in range(2)]
    for rank in range(2):
        workers = Workers(rank, 2)
        monkeypatch.setattr(workers, "from_first", lambda numbers: numbers)
        torch.manual_seed(3)
        shares = BatchShares(loader, workers)
        assert len(shares) == 3
        assert shares.batch_size == 4
        got = [[(batch.tolist(), workers.share) for batch in shares] for _ in range(2)]
        assert got == [[(batch[rank::2], len(batch[rank::2]) / len(batch)) for batch in epoch] for epoch in whole]


def test_what_cannot_be_divided_is_refused(job, parties, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"):
        centralize(**job(), data_parallel=True)
    with pytest.raises(ConfigError, match="data_parallel with privacy"):
        centralize(**job(), data_parallel=True, privacy=Privacy(epsilon=1.0, delta=1e-3))
    with pytest.raises(ConfigError, match="cannot be resumed"):
        centralize(**job(), data_parallel=True, out=tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TaskError, match="cannot divide the batches of a list"):
        Workers(0, 2).split([1, 2])
    layer = torch.nn.Linear(2, 1)
    with (
        Workers(0, 2).averaging(list(layer.parameters())),
        pytest.raises(TaskError, match="before it took a batch"),
    ):
        layer(torch.ones(1, 2)).sum().backward()


def test_a_data_parallel_round_costs_its_seconds_in_every_process(job):
    import msgspec

    from choral.audits.costs.bills import training_seconds

    run = centralize(**job())
    twice = Run(info=msgspec.structs.replace(run.info, processes=2), history=run.history, state=run.state)
    assert training_seconds([twice]) == pytest.approx(2 * training_seconds([run]))
    assert json.loads(msgspec.json.encode(twice.info))["processes"] == 2
