"""A run's folder: what is in it, what survives an interruption, what is refused."""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
import warm_python
from flat_arguments import centralize, federate

from choral import Homomorphic, Masked, Privacy, Run, audit
from choral.errors import ConfigError
from choral.privacy import AdaptiveClip, PerLayerClip
from choral.privacy.dpsgd.clip_settings import settings_of
from choral.trainers import RunFolderError
from choral.trainers.run_folder import folder as folders
from choral.trainers.run_folder.algorithm_state import read_algorithm_state


def test_round_trip(job, tmp_path):
    run = federate(**job(), secure_sum=Masked(), privacy=Privacy(epsilon=4.0, delta=1e-3), out=tmp_path / "run")
    back = Run.load(tmp_path / "run")
    assert back.info == run.info
    assert back.history == run.history
    assert all(torch.equal(back.state[name], run.state[name]) for name in run.state)
    assert back.spent == run.spent
    copy = run.save(tmp_path / "copy")
    assert Run.load(copy).history == run.history
    with pytest.raises(RunFolderError, match="already holds a run"):
        run.save(copy)


class Stop(BaseException):
    pass


def interrupt(after):
    def on_round(entry):
        if entry.round == after:
            raise Stop

    return on_round


@pytest.mark.parametrize("trainer", [federate, centralize])
def test_resumed_equals_uninterrupted(job, tmp_path, trainer):
    def build(dataset):
        model, _, loader = job()["build"](dataset)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader

    whole = trainer(**job(build=build, rounds=5))
    with pytest.raises(Stop):
        trainer(**job(build=build, rounds=5), out=tmp_path / "run", on_round=interrupt(after=2))
    assert Run.load(tmp_path / "run").history[-1].round == 2
    resumed = trainer(**job(build=build, rounds=5), out=tmp_path / "run", resume=True)
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)
    assert [entry.metrics for entry in resumed.history] == [entry.metrics for entry in whole.history]
    again = trainer(**job(build=build, rounds=5), out=tmp_path / "run", resume=True)
    assert again.history == resumed.history


def test_resume_keeps_the_budget(job, tmp_path):
    """What the ledgers hold counts: a resumed run ends within the budget, with noise for what was left."""
    privacy = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(Stop):
        federate(**job(rounds=6), privacy=privacy, out=tmp_path / "run", on_round=interrupt(after=3))
    resumed = federate(**job(rounds=6), privacy=privacy, out=tmp_path / "run", resume=True)
    assert resumed.finished
    assert all(3.8 < spent.epsilon <= 4.0 for spent in resumed.info.spent.values())
    assert [spent.steps for spent in resumed.info.spent.values()] == [6 * 6, 6 * 4, 6 * 3]


@pytest.mark.parametrize("trainer", [federate, centralize])
def test_an_adaptive_clipping_norm_goes_on_where_it_was(job, tmp_path, trainer):
    """Of records, by data owner. run.json tells the clipping as data."""
    adaptive = AdaptiveClip(start=0.01, rate=1.0)
    privacy = Privacy(epsilon=4.0, delta=1e-3, max_grad_norm=adaptive)
    with pytest.raises(Stop):
        trainer(**job(rounds=4), privacy=privacy, out=tmp_path / "run", on_round=interrupt(after=2))
    halfway = read_algorithm_state(tmp_path / "run", 2).clips
    assert all(clip != 0.01 for clip in halfway.values())
    lost = (tmp_path / "run" / "algorithm_state.2.safetensors").read_bytes()
    (tmp_path / "run" / "algorithm_state.2.safetensors").unlink()
    with pytest.raises(RunFolderError, match="clipping norms were after round 2 is missing"):
        trainer(**job(rounds=4), privacy=privacy, out=tmp_path / "run", resume=True)
    (tmp_path / "run" / "algorithm_state.2.safetensors").write_bytes(lost)
    starts = []

    def fit(model, optimizer, loader):
        starts.append(optimizer.clipping.norm)
        job()["fit"](model, optimizer, loader)

    run = trainer(**job(rounds=4, fit=fit), privacy=privacy, out=tmp_path / "run", resume=True)
    assert set(halfway) == set(run.info.spent)
    assert sorted(starts[: len(halfway)]) == sorted(halfway.values())
    assert run.info.privacy["max_grad_norm"] == 0.01
    assert {"quantile": 0.5, "clip_rate": 1.0, "clip_share": 0.05}.items() <= run.info.privacy.items()


def test_clipping_by_layer_is_recorded_as_data(job):
    run = federate(
        **job(rounds=1), privacy=Privacy(epsilon=4.0, delta=1e-3, max_grad_norm=PerLayerClip(2.0)), secure_sum=Masked()
    )
    assert run.info.privacy["max_grad_norm"] == 2.0
    assert run.info.privacy["clipping"] == "by layer"
    named = settings_of(PerLayerClip({"a": 3.0, "b.c": 4.0}))
    assert named == {
        "max_grad_norm": 5.0,
        "clipping": "by layer",
        "max_grad_norm.a": 3.0,
        "max_grad_norm.b.c": 4.0,
    }


@pytest.fixture
def stopping_fit(job):
    """Stops in round 3, after two of three parties have been charged for it."""
    calls, plain = iter(range(1000)), job()["fit"]

    def fit(model, optimizer, loader):
        plain(model, optimizer, loader)
        if next(calls) == 7:
            raise Stop

    return fit


def test_a_round_that_is_repeated_is_paid_for_again(job, stopping_fit, tmp_path):
    """From the same plan, which then has one pass too few at the end: noise for more could only be chosen late."""
    privacy = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(Stop):
        federate(**job(rounds=6, fit=stopping_fit), privacy=privacy, out=tmp_path / "run")
    resumed = federate(**job(rounds=6), privacy=privacy, out=tmp_path / "run", resume=True)
    assert (resumed.finished, resumed.history[-1].round) == (True, 5)
    assert "budget of north is spent; ended after round 5" in resumed.info.ended
    assert all(3.99 < spent.guarantee <= 4.0 for spent in resumed.info.spent.values())
    assert [spent.steps for spent in resumed.info.spent.values()] == [6 * 6, 6 * 4, 5 * 3]
    assert resumed.info.spent["east"].epsilon < 3.8 < resumed.info.spent["north"].epsilon


def test_an_interruption_in_the_first_round_costs_one_round_too(job, tmp_path):
    """Nothing but the model before the first round is recorded then, and a pass of some parties is gone."""

    def stopping_fit(model, optimizer, loader):
        job()["fit"](model, optimizer, loader)
        raise Stop

    privacy = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(Stop):
        federate(**job(rounds=3, fit=stopping_fit), privacy=privacy, out=tmp_path / "run")
    resumed = federate(**job(rounds=3), privacy=privacy, out=tmp_path / "run", resume=True)
    assert (resumed.finished, resumed.history[-1].round) == (True, 2)
    assert "budget of north is spent; ended after round 2" in resumed.info.ended


def test_an_interruption_in_the_last_round_ends_the_run_at_the_round_before(job, stopping_fit, tmp_path):
    """The parties that had been charged cannot pay for the last round again: the run closes, and says why."""
    privacy = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(Stop):
        federate(**job(rounds=3, fit=stopping_fit), privacy=privacy, out=tmp_path / "run")
    resumed = federate(**job(rounds=3), privacy=privacy, out=tmp_path / "run", resume=True)
    assert resumed.history[-1].round == 2
    assert resumed.finished
    assert "budget of north is spent; ended after round 2" in resumed.info.ended
    assert Run.load(tmp_path / "run").finished
    assert [spent.steps for spent in resumed.info.spent.values()] == [3 * 6, 3 * 4, 2 * 3]
    assert audit(tmp_path / "run").verdict == "holds"
    assert federate(**job(rounds=3), privacy=privacy, out=tmp_path / "run", resume=True).history == resumed.history


def test_a_ledger_that_holds_less_than_the_run_is_refused(job, tmp_path):
    from choral.privacy import LedgerError

    privacy = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(Stop):
        federate(**job(rounds=6), privacy=privacy, out=tmp_path / "run", on_round=interrupt(after=3))
    (tmp_path / "run" / "ledger" / "south.jsonl").unlink()
    with pytest.raises(LedgerError, match="ledger of 'south' holds 0 noisy steps"):
        federate(**job(rounds=6), privacy=privacy, out=tmp_path / "run", resume=True)


def test_changed_settings_are_refused_on_resume_and_run_json_stays(job, tmp_path):
    federate(**job(), out=tmp_path / "run", config={"training": {"lr": 1}, "title": "a"})
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"training\.lr was 1, now it is 5"):
        federate(**job(), out=tmp_path / "run", config={"training": {"lr": 5}, "title": "a"}, resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    federate(**job(), out=tmp_path / "run", config={"training": {"lr": 1}, "title": "b"}, resume=True)


def test_a_folder_killed_before_its_first_round_resumes(job, tmp_path):
    (tmp_path / "run" / "ledger").mkdir(parents=True)
    (tmp_path / "run" / "run.json.tmp").write_text("{")
    with pytest.raises(RunFolderError):
        federate(**job(), out=tmp_path / "run", resume=True)
    (tmp_path / "run" / "ledger").rmdir()
    assert federate(**job(), out=tmp_path / "run", resume=True).finished


SCRIPT = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from choral import Keep, Privacy, Task, federate
points = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
data = TensorDataset(points, (points[:, 0] > 0).long())
def build(dataset):
    model = torch.nn.Linear(5, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)
def fit(model, optimizer, loader):
    for batch, target in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()
def evaluate(model):
    return (model(points).argmax(dim=1) == data.tensors[1]).float().mean().item()
run = federate(Task(build=build, fit=fit, evaluate=evaluate), {"a": data, "b": data}, rounds=ROUNDS,
               privacy=Privacy(epsilon=4.0, delta=1e-3), keep=Keep(out=sys.argv[1], resume=True))
print(run.spent.epsilon)
"""


def test_killed_process_loses_at_most_the_round_in_progress(tmp_path):
    folder, script = tmp_path / "run", SCRIPT.replace("ROUNDS", "400")
    process = warm_python.start(["-c", script, str(folder)], stdout=subprocess.DEVNULL)
    history = folder / "history.jsonl"
    deadline = time.monotonic() + 120
    while not (history.is_file() and len(history.read_bytes().splitlines()) > 4):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    lines = history.read_bytes().splitlines()
    kept = Run.load(folder)
    assert len(lines) - 1 <= len(kept.history) <= len(lines)
    before = {path.name: path.read_bytes() for path in (folder / "ledger").iterdir()}
    charged = [path.read_bytes().count(b"\n") for path in (folder / "ledger").iterdir()]
    assert min(charged) >= len(kept.history) - 1
    # To go on, the plan must be the same; what was charged before stays charged.
    done = warm_python.run(["-c", SCRIPT.replace("ROUNDS", "401"), str(folder)], capture_output=True, text=True)
    assert "cannot resume: rounds was 400, now it is 401" in done.stderr
    assert {path.name: path.read_bytes() for path in (folder / "ledger").iterdir()} == before


def test_other_settings_are_refused_on_resume(job, tmp_path):
    federate(**job(), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="seed was 0, now it is 1"):
        federate(**job(seed=1), out=tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="kind was federated"):
        centralize(**job(), out=tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="another secure sum"):
        federate(**job(), secure_sum=Masked(), out=tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="needs the folder"):
        federate(**job(), resume=True)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Masked(corrupt=0, min_survivors=2), "server was semi-honest, now it is malicious"),
        (Masked(corrupt=0, min_survivors=3, server="semi-honest", dropouts=0), "min_survivors was 2, now it is 3"),
        (Masked(corrupt=1, min_survivors=3, server="semi-honest", dropouts=0), "corrupt was 0, now it is 1"),
    ],
)
def test_what_run_json_says_of_all_rounds_is_said_of_none_by_a_resume(job, tmp_path, other, words):
    """A last round under better terms would lend them to those before it."""
    weak = Masked(corrupt=0, min_survivors=2, server="semi-honest")
    federate(**job(), secure_sum=weak, out=tmp_path / "run")
    more = job()["rounds"] + 1
    with pytest.raises(ConfigError, match=words):
        federate(**job(rounds=more), secure_sum=other, out=tmp_path / "run", resume=True)
    assert federate(**job(rounds=more), secure_sum=weak, out=tmp_path / "run", resume=True).history[-1].round == more


def test_a_used_folder_is_never_overwritten(job, tmp_path):
    federate(**job(), out=tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(RunFolderError, match="already holds another run"):
        federate(**job(), out=tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="other files"):
        federate(**job(), out=tmp_path / "notes")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="is a file"):
        federate(**job(), out=tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", b"{", "damaged"),
        ("run.json", b"[]", "damaged"),
        ("run.json", None, "not a run folder"),
        ("history.jsonl", b"", "does not hold rounds"),
        ("history.jsonl", b"{}\n", "line 1, is damaged"),
        ("history.jsonl", None, "no history.jsonl"),
        ("model.safetensors", b"\0" * 20, "damaged"),
        ("model.safetensors", None, "no model.safetensors"),
    ],
)
def test_damaged_folders_are_named(job, tmp_path, file, content, message):
    federate(**job(), out=tmp_path / "run")
    path = tmp_path / "run" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(RunFolderError, match=message):
        Run.load(tmp_path / "run")


def test_other_versions_and_unknown_fields_are_refused(job, tmp_path):
    federate(**job(), out=tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(RunFolderError, match="version 99"):
        Run.load(tmp_path / "run")
    path.write_text(json.dumps(content | {"epsilon": 0}))
    with pytest.raises(RunFolderError, match="damaged"):
        Run.load(tmp_path / "run")


def test_a_torn_history_line_is_dropped_on_resume(job, tmp_path):
    with pytest.raises(Stop):
        federate(**job(rounds=4), out=tmp_path / "run", on_round=interrupt(after=2))
    with (tmp_path / "run" / "history.jsonl").open("ab") as file:
        file.write(b'{"round":3,"metr')
    assert Run.load(tmp_path / "run").history[-1].round == 2
    assert federate(**job(rounds=4), out=tmp_path / "run", resume=True).finished
    assert Run.load(tmp_path / "run").history[-1].round == 4


def test_two_processes_never_write_to_one_folder(job, tmp_path):
    from choral.trainers.run_folder.folder import lock

    with lock(tmp_path / "run"), pytest.raises(RunFolderError, match="another process is writing"):
        federate(**job(), out=tmp_path / "run")
    assert federate(**job(), out=tmp_path / "run").finished
    with lock(tmp_path / "run"), pytest.raises(RunFolderError, match="another process is writing"):
        federate(**job(), out=tmp_path / "run", resume=True)


ASKING = """
import fcntl, sys
file = open(sys.argv[1], "ab")
try:
    fcntl.flock(file, (fcntl.LOCK_SH if sys.argv[2] == "shared" else fcntl.LOCK_EX) | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(7)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("trainer", [federate, centralize])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_is_another_processs_for_as_long_as_that_writes(job, tmp_path, trainer, resume):
    """Asked from other processes: nobody shares a folder that is written to, and what is shared is not written to."""
    place = tmp_path / "run" / ".lock"
    if resume:
        with pytest.raises(Stop):
            trainer(**job(), out=tmp_path / "run", on_round=interrupt(after=1))
    answers = []

    def ask(_):
        answers.append(warm_python.run(["-c", ASKING, place, "shared"], stdin=subprocess.DEVNULL).returncode)

    place.parent.mkdir(exist_ok=True)
    holder = warm_python.start(["-c", ASKING, place, "shared"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunFolderError, match="another process is writing"):
        trainer(**job(rounds=3), out=tmp_path / "run", resume=resume)
    holder.kill()  # whoever dies lets go
    holder.communicate()
    assert trainer(**job(rounds=3), out=tmp_path / "run", resume=resume, on_round=ask).finished
    assert set(answers) == {7}
    ask(None)
    assert answers[-1] == 0


def test_settings_are_recorded_as_they_are_read_back(job, tmp_path):
    """Numbers of numpy, tuples and paths: the run can be read, and resumed with the same settings."""
    config = {"rate": np.float32(0.5), "layers": (3, 4), "from": tmp_path, "count": np.int64(7)}
    with pytest.raises(Stop):
        federate(**job(rounds=np.int64(2)), out=tmp_path / "run", config=config, on_round=interrupt(after=1))
    run = federate(**job(rounds=2), out=tmp_path / "run", config=config, resume=True)
    assert run.info == Run.load(tmp_path / "run").info
    assert run.info.config == {"rate": 0.5, "layers": [3, 4], "from": str(tmp_path), "count": 7}


@pytest.mark.parametrize("bad", [float("nan"), object(), "\ud800", [np.inf]], ids=["NaN", "object", "text", "infinity"])
def test_settings_that_could_not_be_read_back_are_refused_before_training(job, tmp_path, bad):
    with pytest.raises(RunFolderError, match="settings"):
        federate(**job(), out=tmp_path / "run", config={"rate": bad})
    assert not (tmp_path / "run").exists()
    assert federate(**job(rounds=1), config={"rate": bad}).finished  # nothing is written of it


def test_a_round_that_could_not_be_read_back_is_not_written(job, tmp_path):
    run = federate(**job(rounds=1), out=tmp_path / "run")
    before = (tmp_path / "run" / "history.jsonl").read_bytes()
    for changes in ({"metrics": {"a": float("nan")}}, {"metrics": {"\ud800": 1.0}}, {"clip": np.float64(1.0)}):
        bad = msgspec.structs.replace(run.history[-1], round=2, **changes)
        with pytest.raises(RunFolderError, match="read back"):
            folders.append_round(tmp_path / "run", bad)
        with pytest.raises(RunFolderError, match="read back"):
            replace(run, history=(*run.history, bad)).save(tmp_path / "copy")
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == before
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("secure_sum", [Masked(), Homomorphic(), Homomorphic(key="shared")], ids=repr)
def test_no_secret_of_a_secure_sum_is_kept_in_the_folder(job, tmp_path, monkeypatch, secure_sum):
    """Identities, masks' and transport keys, seeds of encryption keys: all come from secrets.token_bytes."""
    drawn, real = [], secrets.token_bytes

    def recorded(size):
        drawn.append(real(size))
        return drawn[-1]

    monkeypatch.setattr(secrets, "token_bytes", recorded)
    federate(**job(), secure_sum=secure_sum, out=tmp_path / "run")
    audit(tmp_path / "run").save(tmp_path / "run" / "audit.html")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    secret = [draw for draw in drawn if len(draw) >= 32]
    assert len(secret) > 3
    for draw in secret:
        for form in (draw, draw.hex().encode(), base64.b64encode(draw)[:40]):
            assert form not in kept
    assert Run.load(tmp_path / "run").info.secure_sum["name"].encode() in kept
