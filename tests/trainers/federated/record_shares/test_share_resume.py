"""Every step is paid for before its vector can leave a party, and a killed process never pays too little."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import warm_python
from torch import nn

from choral import ClientPrivacy, Keep, Masked, Participation, Plain, Privacy, audit, federate
from choral.privacy import BudgetExceededError, Ledger, LedgerError
from choral.privacy.accounting.filters import PrivacyFilter
from choral.protocols.errors import TooFewSurvivorsError
from choral.trainers import Dropouts, FedSGD, Run, Task

PROMISE = Privacy(4.0, 1e-4, noise="distributed")
STEPS = FedSGD(batch_size=40, steps_per_round=4, learning_rate=0.8, momentum=0.5)
Make = Callable[..., Task]
HERE = Path(__file__).parent

SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import conftest
from choral import Keep, Masked, Privacy, federate
from choral.privacy.record_shares.party import SharesParty
from choral.protocols.masking.in_process import MaskedSession
from choral.trainers import FedSGD
where, count, seen = sys.argv[2], int(sys.argv[3]), 0
def dying(real):
    def call(*args, **kwargs):
        global seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        made = real(*args, **kwargs)
        print(where, seen, flush=True)
        return made
    return call
if where == "take":
    SharesParty.take = dying(SharesParty.take)
else:
    MaskedSession.begin = dying(MaskedSession.begin)
steps = FedSGD(batch_size=40, steps_per_round=4, learning_rate=0.8, momentum=0.5)
federate(conftest.make_task(), rounds=3, algorithm=steps,
         privacy=Privacy(4.0, 1e-4, noise="distributed"), secure_sum=Masked(corrupt=1, dropouts=1, min_survivors=4),
         keep=Keep(out=sys.argv[1]))
"""


def resumed(task: Task, out: Path, **changes: Any) -> Run:
    given: dict[str, Any] = {
        "rounds": 3,
        "algorithm": STEPS,
        "privacy": PROMISE,
        "secure_sum": Masked(corrupt=1, dropouts=1, min_survivors=4),
        "keep": Keep(out=out, resume=True),
    }
    return federate(task, **given | changes)


def fit(model: Any, optimizer: Any, loader: Any) -> None:
    for batch, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()


def steps_of(folder: Path) -> dict[str, int]:
    return {
        path.stem: sum(event.steps for event in Ledger(path, holder=path.stem).events)
        for path in (folder / "ledger").glob("*.jsonl")
    }


@pytest.mark.parametrize(
    ("where", "count", "paid"),
    [("begin", 7, 6), ("take", 28, 6), ("begin", 3, 2)],
    ids=["between two steps", "between two parties", "in the first round"],
)
def test_a_killed_process_has_paid_for_every_vector_that_it_made(
    task: Make, tmp_path: Path, where: str, count: int, paid: int
) -> None:
    """Killed as its sixth sum was complete (or two of five vectors of it were still to be taken): paid for, and lost.

    Begun again, the round of those steps is made anew, and one round is missing in the end.
    """
    folder = tmp_path / "run"
    died = warm_python.run(["-c", SCRIPT, str(folder), where, str(count)], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    made = dict.fromkeys(task().parties, paid)
    if where == "take":  # the third party of the sixth step had paid, and its vector was not yet taken
        made |= {"west": paid - 1, "middle": paid - 1}
    assert steps_of(folder) == made
    rounds = (12 - paid) // 4 + paid // 4
    run = resumed(task(), folder)
    assert run.history[-1].round == rounds == 2
    assert "is spent; ended after round 2" in run.info.ended
    after = steps_of(folder)
    assert all(after[name] == made[name] + 4 * (rounds - paid // 4) <= 12 for name in made)
    assert run.spent is not None
    assert run.spent.epsilon <= 4.0
    found = audit(folder)
    assert found.verdict == "holds", found.sentence


def test_a_ledger_that_was_put_back_is_refused(task: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = [0]

    def stop(entry: Any) -> None:
        ended[0] = entry.round
        if entry.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumed(task(), folder, keep=Keep(out=folder, on_round=stop))
    ledger = folder / "ledger" / "north.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-3]))
    with pytest.raises(LedgerError, match="holds 5 noisy steps, but the run has recorded 8"):
        resumed(task(), folder)


def test_a_run_that_was_stopped_between_rounds_goes_on_to_its_end(task: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def stop(entry: Any) -> None:
        if entry.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumed(task(), folder, keep=Keep(out=folder, on_round=stop))
    run = resumed(task(), folder)
    assert run.history[-1].round == 3
    assert not run.info.ended
    assert set(steps_of(folder).values()) == {12}
    again = resumed(task(), folder)  # of a finished run nothing is left to do, and nothing is spent
    assert again.history == run.history
    assert set(steps_of(folder).values()) == {12}
    assert audit(folder).verdict == "holds"


def test_steps_whose_sum_was_not_opened_are_paid_for(task: Make, tmp_path: Path) -> None:
    """Two of five drop out after their vectors, so that the masked sum opens nothing: all have paid for the attempt."""
    lossy = Participation(dropouts=Dropouts(confirmation=0.9), draw="seed", patience=3)
    with pytest.raises(TooFewSurvivorsError):
        resumed(
            task(),
            tmp_path / "run",
            participation=Participation(dropouts=Dropouts(confirmation=0.9), draw="seed"),
            keep=Keep(out=tmp_path / "run"),
        )
    assert set(steps_of(tmp_path / "run").values()) == {1}
    run = resumed(task(), tmp_path / "patient", participation=lossy, keep=Keep(out=tmp_path / "patient"))
    assert all(entry.failed for entry in run.history[1:])
    assert set(steps_of(tmp_path / "patient").values()) == {3}
    assert run.spent is not None
    assert run.spent.steps == 3


def test_parties_that_never_uploaded_have_not_paid(task: Make, tmp_path: Path) -> None:
    """Lost before its vector: the others' ledgers count, its own does not. Ledgers differ, and each is right."""
    lossy = Participation(dropouts=Dropouts(keys=0.12), draw="seed")
    run = resumed(
        task(),
        tmp_path / "run",
        rounds=4,
        algorithm=FedSGD(batch_size=40, steps_per_round=1),
        secure_sum=Plain(),
        participation=lossy,
        keep=Keep(out=tmp_path / "run"),
    )
    steps = steps_of(tmp_path / "run")
    assert sum(steps.values()) == sum(entry.survivors for entry in run.history) < 20
    assert max(steps.values()) == 4
    assert audit(tmp_path / "run").verdict == "holds"


def test_a_new_folder_on_the_same_ledgers_goes_on_with_what_is_left_of_the_plan(task: Make, tmp_path: Path) -> None:
    """A run was stopped after one of three rounds. Begun again elsewhere, on the ledgers of the data: two are left."""
    (ledgers := tmp_path / "ledgers").mkdir()

    def stop(entry: Any) -> None:
        if entry.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumed(task(), tmp_path, keep=Keep(out=tmp_path / "one", ledgers=ledgers, on_round=stop))
    run = resumed(task(), tmp_path, keep=Keep(out=tmp_path / "two", ledgers=ledgers))
    assert run.history[-1].round == 2
    assert "is spent; ended after round 2" in run.info.ended
    assert run.spent is not None
    assert run.spent.epsilon <= 4.0
    north = Ledger(next(ledgers.rglob("north*.jsonl")), holder="north")
    assert sum(event.steps for event in north.events) == 12


def test_another_job_that_does_not_fit_what_its_ledgers_hold_is_refused_by_name(task: Make, tmp_path: Path) -> None:
    """Nothing is trained or spent: a filter counts more for the first job alone."""
    (ledgers := tmp_path / "ledgers").mkdir()
    resumed(task(), tmp_path, rounds=1, keep=Keep(out=tmp_path / "one", ledgers=ledgers))
    for epsilon in (4.0, 5.0):
        other = Privacy(epsilon, 1e-4, noise="distributed")
        with pytest.raises(BudgetExceededError, match=r"more than the|nothing is left|is spent"):
            resumed(task(), tmp_path, privacy=other, keep=Keep(out=tmp_path / f"at {epsilon}", ledgers=ledgers))
    north = Ledger(next(ledgers.rglob("north*.jsonl")), holder="north")
    assert sum(event.steps for event in north.events) == 4


def test_a_second_job_under_a_larger_promise_has_the_noise_that_its_ledgers_ask_for(task: Make, tmp_path: Path) -> None:
    """Solved by the filter, for the ledger that leaves least; stopped, it goes on with the same plan; then no third."""
    (ledgers := tmp_path / "ledgers").mkdir()
    first = resumed(task(), tmp_path, rounds=1, keep=Keep(out=tmp_path / "one", ledgers=ledgers))
    wider = {"privacy": Privacy(9.0, 1e-4, noise="distributed"), "rounds": 2}

    def stop(entry: Any) -> None:
        if entry.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumed(task(), tmp_path, keep=Keep(out=tmp_path / "two", ledgers=ledgers, on_round=stop), **wider)
    again = resumed(task(), tmp_path, keep=Keep(out=tmp_path / "two", ledgers=ledgers, resume=True), **wider)
    assert again.history[-1].round == 2
    assert audit(tmp_path / "two").verdict == "holds"
    assert first.spent is not None
    assert again.spent is not None
    assert first.spent.epsilon < again.spent.epsilon <= 9.0
    for name in ("north", "south"):
        events = Ledger(next(ledgers.rglob(f"{name}*.jsonl")), holder=name).events
        assert [event.noise_multiplier for event in events[4:]] == [events[4].noise_multiplier] * 8
        assert PrivacyFilter(9.0, 1e-4).admits(events)
        assert not PrivacyFilter(9.0, 1e-4).admits([msgspec.structs.replace(e, share=0.97 * e.share) for e in events])
    with pytest.raises(BudgetExceededError, match="is spent"):
        resumed(task(), tmp_path, keep=Keep(out=tmp_path / "three", ledgers=ledgers), **wider | {"rounds": 3})


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (Privacy(4.0, 1e-4), Privacy(9.0, 1e-4, noise="distributed"), "noise of another kind"),
        (ClientPrivacy(4.0, 1e-3), ClientPrivacy(4.0, 1e-3), "is spent"),
    ],
    ids=["own noise, then shares", "clients, twice"],
)
def test_what_its_ledgers_cannot_carry_is_refused_by_name(
    task: Make, tmp_path: Path, before: Any, after: Any, words: str
) -> None:
    """Before anything is trained, drawn or written."""
    (ledgers := tmp_path / "ledgers").mkdir()
    given: dict[str, Any] = {"rounds": 1, "secure_sum": Masked(corrupt=1, dropouts=1, min_survivors=4)}
    federate(task(fit=fit), privacy=before, keep=Keep(out=tmp_path / "one", ledgers=ledgers), **given)
    held = {path: path.read_bytes() for path in ledgers.rglob("*.jsonl")}
    steps = {"algorithm": STEPS} if isinstance(after, Privacy) else {}
    with pytest.raises(BudgetExceededError, match=words):
        federate(task(fit=fit), privacy=after, keep=Keep(out=tmp_path / "two", ledgers=ledgers), **given, **steps)
    assert {path: path.read_bytes() for path in ledgers.rglob("*.jsonl")} == held
