"""A federation over processes is the federation of one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import warm_python
from safetensors.torch import load_file

from choral.trainers import Run
from choral.trainers.algorithms.interface import Ascend, Batch, Done, Gradient, Minimise, Svrg, Touch, Train, Work
from choral.trainers.engines.rank_messages import (
    orders_as_message,
    packed,
    results_as_message,
    results_of,
    unpacked,
    work_of,
)
from choral.trainers.engines.sharded import _balanced, _kept

PROGRAM = Path(__file__).with_name("sharded_program.py")


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in there.items()} | {"OMP_NUM_THREADS": "1"}


def start(kind: str, folder: Path, size: int) -> list[subprocess.Popen[str]]:
    """The program in `size` processes; one runs it alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        warm_python.start(
            [str(PROGRAM), kind, str(folder)],
            env=environment(rank, size, port) if size > 1 else os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def finished(processes: list[subprocess.Popen[str]], *, codes: tuple[int, ...]) -> list[str]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert tuple(process.returncode for process in processes) == codes, "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    finished(start("all", folder, 1), codes=(0,))
    return folder


def states(folder: Path, kind: str) -> Mapping[str, torch.Tensor]:
    return load_file(folder / f"{kind}-rank-0.safetensors")


def test_two_processes_give_what_one_gives(alone: Path, tmp_path: Path) -> None:
    finished(start("all", tmp_path, 2), codes=(0, 0))
    for kind in ("masked", "scaffold", "fsvrg", "fedsgd", "virtual", "world"):
        for name, tensor in states(alone, kind).items():
            assert torch.equal(states(tmp_path, kind)[name], tensor), (kind, name)
            # and every rank has the run
            assert torch.equal(load_file(tmp_path / f"{kind}-rank-1.safetensors")[name], tensor)
    for name, tensor in states(alone, "epochs").items():  # the ranks may choose different engines
        torch.testing.assert_close(states(tmp_path, "epochs")[name], tensor, rtol=0, atol=1e-6)
    assert "trained at 1" in (tmp_path / "masked-rank-1.txt").read_text()

    # Record-level privacy: a party's ledger is written by one rank, and counts every round once.
    run, single = Run.load(tmp_path / "private"), Run.load(alone / "private")
    assert {name: spent.steps for name, spent in run.info.spent.items()} == {
        name: spent.steps for name, spent in single.info.spent.items()
    }
    for name, spent in run.info.spent.items():
        assert spent.epsilon == pytest.approx(single.info.spent[name].epsilon, rel=1e-9)
        assert spent.epsilon <= 3.0


def test_a_dead_rank_ends_the_run_and_the_run_resumes(alone: Path, tmp_path: Path) -> None:
    outputs = finished(start("dies", tmp_path, 2), codes=(1, -signal.SIGKILL))
    assert "ProcessError: rank 1 has gone in round 2" in outputs[0]
    assert Run.load(tmp_path / "masked").history[-1].round == 1
    finished(start("masked", tmp_path, 1), codes=(0,))
    for name, tensor in states(alone, "masked").items():
        assert torch.equal(states(tmp_path, "masked")[name], tensor)


def test_a_party_that_fails_at_any_rank_drops_out(tmp_path: Path) -> None:
    for size, codes in ((1, (0,)), (2, (0, 0))):
        (tmp_path / str(size)).mkdir()
        outputs = finished(start("fails", tmp_path / str(size), size), codes=codes)
        assert "ValueError: this party's table is odd" in outputs[0]
        run = Run.load(tmp_path / str(size) / "masked")
        assert [entry.dropped for entry in run.history[1:]] == 3 * [{"party-1": "its training failed"}]
        assert [entry.survivors for entry in run.history[1:]] == [4, 4, 4]
    for name, tensor in states(tmp_path / "1", "masked").items():
        assert torch.equal(states(tmp_path / "2", "masked")[name], tensor)


@pytest.mark.slow
def test_the_ranks_live_on_after_an_error(alone: Path, tmp_path: Path) -> None:
    finished(start("trials", tmp_path, 2), codes=(0, 0))

    def said(kind: str) -> list[str]:
        return [(tmp_path / f"{kind}-rank-{rank}.txt").read_text() for rank in (0, 1)]

    assert said("diverges")[0].startswith("DivergedError: no party could train in round 1: party-0: training at")
    assert said("diverges")[1].startswith("ProcessError: rank 0 has gone")
    assert said("unready")[0].startswith("ProcessError: rank 1 has gone")
    assert said("unready")[1].startswith("RuntimeError: no model here")
    # Rank 1 was given parties of other sizes, so it keeps the ledgers of others than rank 0 asks it to train.
    assert said("strangers")[0].startswith("TaskError: party 'party-2' has no privacy engine here")
    # The next federation of the same processes works, and rank 1 goes ahead of rank 0.
    for name, tensor in states(alone, "masked").items():
        assert torch.equal(states(tmp_path, "masked")[name], tensor)


def test_what_fails_at_all_of_three_ranks_is_the_runs_error_and_ends_all(tmp_path: Path) -> None:
    outputs = finished(start("diverges", tmp_path, 3), codes=(1, 1, 1))
    assert "DivergedError: no party could train in round 1: party-0: training at party 'party-0' div" in outputs[0]
    assert "party-1: training at party 'party-1' diverged in round 1" in outputs[0]
    assert all("ProcessError: rank 0 has gone" in output for output in outputs[1:])


@pytest.mark.slow  # the command line under torchrun is in the fast ones
def test_torchrun(alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, str(PROGRAM), "masked", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    for name, tensor in states(alone, "masked").items():
        assert torch.equal(states(tmp_path, "masked")[name], tensor)


def test_parties_are_balanced_by_examples() -> None:
    examples = {"a": 100, "b": 10, "c": 20, "d": 70, "e": 5, "f": 5}
    places = _balanced(examples, examples.__getitem__, 2)
    loads = [sum(examples[party] for party in places if places[party] == rank) for rank in (0, 1)]
    assert sorted(loads) == [105, 105]


@pytest.mark.parametrize(
    "work",
    [
        Train(shift=torch.arange(3.0), pull=0.5),
        Gradient(),
        Batch(rate=0.25, step=3, row=3),
        Minimise(direction=torch.ones(3), pull=0.5),
        Touch(),
        Svrg(direction=torch.ones(3), step=0.1, shares=torch.rand(3), passes=2),
        Ascend(dual=torch.rand(5, dtype=torch.float64), ridge=0.1, examples=7, slack=2.0),
    ],
)
def test_work_survives_the_way(work: Work) -> None:
    orders, tensors = orders_as_message([("a", work), ("b", work)])
    assert len(tensors) == sum(isinstance(part, torch.Tensor) for part in vars(work).values())  # shared ones once
    header, arrived = unpacked(packed({"orders": orders}, tensors))
    for order in header["orders"]:
        again = work_of(order, arrived)
        assert type(again) is type(work)
        for name, value in vars(work).items():
            same = torch.equal(getattr(again, name), value) if isinstance(value, torch.Tensor) else None
            assert same is True or getattr(again, name) == value


def test_results_that_travel_together_stay_apart() -> None:
    made = [
        ("north", Done(vector=torch.tensor([1.0, 2.0]), steps=3, path=0.3)),
        ("south", Done(vector=torch.tensor([4.0]), dual=torch.tensor([5.0, 6.0]))),
        ("east", Done(vector=torch.tensor([7.0, 8.0]), steps=2, path=None)),
    ]
    for (party, done), (expected, wanted) in zip(
        results_of(*unpacked(packed(*results_as_message(made)))), made, strict=True
    ):
        assert (party, done.steps, done.path) == (expected, wanted.steps, wanted.path)
        assert torch.equal(done.vector, wanted.vector)
        assert (done.dual is None) == (wanted.dual is None)
        assert done.dual is None or torch.equal(done.dual, torch.tensor([5.0, 6.0]))


@pytest.mark.parametrize(("length", "results"), [(1 << 20, 1), (1 << 16, 4), (2002, 130)])
def test_what_waits_is_bounded_in_bytes(length: int, results: int) -> None:
    assert _kept(Done(vector=torch.zeros(length))) == results
