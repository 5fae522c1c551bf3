"""Going on from a checkpoint: the noise and the passes that were planned, held against the ledger."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python

from choral.errors import ConfigError
from choral.privacy import (
    AdaptiveClip,
    BudgetExceededError,
    CorrelatedPrivacy,
    Ledger,
    LedgerError,
    Privacy,
    PrivacyError,
)
from choral.privacy.accounting import record_level, record_noise
from choral.privacy.dpsgd.engine import PrivacyEngine

PROMISE = {"epsilon": 3.0, "delta": 1e-3, "epochs": 6, "max_grad_norm": AdaptiveClip(start=2.0)}


def process(problem: Any, path: Path, passes: int, resume: Any = None, **changes: Any) -> tuple[Any, Privacy]:
    """Train as a fresh process would; return the private optimizer."""
    privacy = Privacy(**{**PROMISE, "ledger": path, **changes})
    model = problem.model()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    private, optimizer, loader = privacy.wrap(model, adam, problem.loader(), resume=resume)
    for _ in range(passes):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
    return optimizer, privacy


def test_a_fresh_process_goes_on_with_the_same_noise_for_the_passes_left(problem: Any, tmp_path: Path) -> None:
    ledger, file = tmp_path / "ledger.jsonl", tmp_path / "checkpoint.pt"
    first, _ = process(problem, ledger, 5)
    torch.save(first.state_dict(), file)
    state = torch.load(file, weights_only=True)
    assert {type(v) for v in state["privacy"].values()} == {float, int, str}
    second, privacy = process(problem, ledger, 1, state)  # only one pass is left: no budget for six
    assert second.noise_multiplier == first.noise_multiplier
    assert second.state_dict()["state"][0]["step"] == 60
    assert second.clipping.norm != 2.0
    assert 2.99 < privacy.spent().epsilon <= 3.0
    with pytest.raises(BudgetExceededError, match="planned for 0 passes"):
        process(problem, ledger, 1, second.state_dict())


def test_loading_after_wrap_is_the_same(problem: Any, tmp_path: Path) -> None:
    first, _ = process(problem, tmp_path / "a.jsonl", 2)
    with pytest.raises(BudgetExceededError, match="6 passes are asked for, but 4 are left") as caught:
        process(problem, tmp_path / "a.jsonl", 1)  # six passes more on top of two, which cost all that there is
    assert "epochs=4" in caught.value.hint
    second, _ = process(problem, tmp_path / "a.jsonl", 0)
    second.load_state_dict(first.state_dict())
    assert second.noise_multiplier == first.noise_multiplier
    assert second.clipping.norm == first.clipping.norm == second.max_grad_norm


@pytest.mark.parametrize("lost", ["all", "the last line", "in memory", "another"])
def test_a_ledger_that_does_not_go_on_from_the_checkpoint_is_refused(problem: Any, tmp_path: Path, lost: str) -> None:
    path = tmp_path / "a.jsonl"
    state = process(problem, path, 3)[0].state_dict()
    if lost == "the last line":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    elif lost == "all":
        path.unlink()
    elif lost == "another":
        path.unlink()
        process(problem, path, 4, epsilon=2.5)
    with pytest.raises(LedgerError, match="does not go on from"):
        process(problem, None if lost == "in memory" else path, 0, state)  # type: ignore[arg-type]


def test_what_was_paid_since_the_checkpoint_is_gone(problem: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    privacy = Privacy(**PROMISE, ledger=path)
    model = problem.model()
    private, optimizer, loader = privacy.wrap(model, torch.optim.Adam(model.parameters()), problem.loader())
    state = optimizer.state_dict()
    for _ in range(2):
        for x, y in loader:
            torch.nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
    again, later = process(problem, path, 4, state)
    assert again.noise_multiplier == optimizer.noise_multiplier
    assert [e.steps for e in later._open().events] == [10] * 6
    assert later.spent().epsilon <= 3.0


def test_a_process_killed_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    """kill -9 after a checkpoint: the pass that was begun is paid for and gone, and a fresh process trains the other
    four of six from the killed one's own checkpoint; the promise holds, and the ledger is whole.
    """
    ledger, file = tmp_path / "a.jsonl", tmp_path / "state.pt"
    code = f"""
import os, signal, sys, torch
from torch.utils.data import DataLoader, TensorDataset
from choral.privacy import Privacy
torch.manual_seed(0)
model = torch.nn.Linear(6, 3)
loader = DataLoader(TensorDataset(torch.randn(200, 6), torch.randint(3, (200,))), batch_size=20)
state = torch.load({str(file)!r}, weights_only=True) if "resume" in sys.argv else None
if state:
    model.load_state_dict(state["model"])
private, optimizer, loader = Privacy(epsilon=3.0, delta=1e-3, epochs=6, ledger={str(ledger)!r}).wrap(
    model, torch.optim.Adam(model.parameters(), lr=0.1), loader, resume=state and state["optimizer"])
for epoch in range(4 if state else 6):
    for number, (x, y) in enumerate(loader):
        if not state and (epoch, number) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
    torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}, {str(file)!r})
if state:
    next(iter(loader))
"""
    assert warm_python.run(["-c", code], check=False).returncode == -9
    state = torch.load(file, weights_only=True)["optimizer"]
    assert len(Ledger(ledger).events) == 2
    assert (state["privacy"]["events"], state["privacy"]["passes_left"], state["state"][0]["step"]) == (1, 5, 10)
    second = warm_python.run(["-c", code, "resume"], check=False, capture_output=True, text=True)
    assert "planned for 4 passes over the data, and all are used" in second.stderr  # the fifth, which it tries
    events = Ledger(ledger).events  # each line verified
    assert [e.steps for e in events] == [10] * 6
    assert {e.noise_multiplier for e in events} == {state["privacy"]["noise_multiplier"]}
    assert 2.99 < record_level.epsilon(events, 1e-3) <= 3.0
    end = torch.load(file, weights_only=True)["optimizer"]
    assert (end["privacy"]["events"], end["privacy"]["passes_left"], end["state"][0]["step"]) == (6, 0, 50)


def test_a_forged_checkpoint_cannot_spend_more(problem: Any, tmp_path: Path) -> None:
    state = process(problem, tmp_path / "a.jsonl", 1)[0].state_dict()
    for forged in ({"noise_multiplier": 0.5}, {"passes_left": 60}):
        with pytest.raises(BudgetExceededError, match="more passes as the checkpoint planned them"):
            process(problem, tmp_path / "a.jsonl", 1, {**state, "privacy": {**state["privacy"], **forged}})
    for forged in ({"noise_multiplier": -1.0}, {"passes_left": -1}, {"max_grad_norm": 0.0}, {"head": 3}, {"other": 1}):
        with pytest.raises(PrivacyError, match="damaged"):
            process(problem, tmp_path / "a.jsonl", 1, {**state, "privacy": {**state["privacy"], **forged}})


def test_a_refused_checkpoint_leaves_no_plan_behind(problem: Any) -> None:
    privacy = Privacy(**{**PROMISE, "epochs": 1})
    engine = PrivacyEngine(privacy, holder="a", ledger=Ledger(), passes=1)
    model = problem.model()

    def wrap(resume: Any) -> Any:
        return engine.wrap(model, torch.optim.Adam(model.parameters()), problem.loader(), resume=resume)[1]

    state = wrap(None).state_dict()
    other = PrivacyEngine(privacy, holder="a", ledger=Ledger(), passes=1)
    engine = other
    with pytest.raises(BudgetExceededError):
        wrap({**state, "privacy": {**state["privacy"], "noise_multiplier": 0.1}})
    event = record_noise.noise_multiplier(3.0, 1e-3, 0.1, 10, slack=1e-3)
    assert wrap(None).noise_multiplier == event


def test_what_is_no_state_is_refused_before_anything_is_planned(problem: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume is a PosixPath, expected the state_dict\(\)"):
        process(problem, tmp_path / "a.jsonl", 1, tmp_path / "state.pt")
    assert not (tmp_path / "a.jsonl").exists()


def test_another_sampling_is_refused(problem: Any, make_problem: Any, tmp_path: Path) -> None:
    state = process(problem, tmp_path / "a.jsonl", 1)[0].state_dict()
    with pytest.raises(PrivacyError, match="not of this loader"):
        process(make_problem(batch_size=40), tmp_path / "a.jsonl", 1, state)


def test_correlated_noise_is_planned_anew(problem: Any, tmp_path: Path) -> None:
    """It ended with its process; the optimizer's state goes on all the same."""
    privacy = CorrelatedPrivacy(epsilon=3.0, delta=1e-3, epochs=2, ledger=tmp_path / "a.jsonl")
    states = []
    for _ in range(2):
        model = problem.model()
        promise = dataclasses.replace(privacy, epsilon=3.0 * (1 + len(states)))
        private, optimizer, loader = promise.wrap(
            model, torch.optim.Adam(model.parameters()), problem.loader(), resume=states[0] if states else None
        )
        for x, y in loader:
            torch.nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
        states.append(optimizer.state_dict())
    assert states[1]["state"][0]["step"] == 20


def test_a_state_without_privacy_is_the_users_own(problem: Any) -> None:
    model = problem.model()
    adam = torch.optim.Adam(model.parameters(), lr=0.5)
    _, optimizer, _ = Privacy(epsilon=3.0, delta=1e-3).wrap(model, adam, problem.loader())
    plain = torch.optim.Adam(problem.model().parameters(), lr=0.25).state_dict()
    optimizer.load_state_dict(plain)
    assert adam.param_groups[0]["lr"] == 0.25
    adam.load_state_dict(optimizer.state_dict())  # and the other way round
