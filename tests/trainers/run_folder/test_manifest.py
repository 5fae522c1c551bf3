"""A run's manifest: what it names, who signs it and after what, and when it is made anew."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from flat_arguments import centralize, federate

from choral import Masked
from choral.privacy import ClientPrivacy, Ledger, Privacy
from choral.protocols.crypto.identity import Identity
from choral.trainers import Run
from choral.trainers.run_folder.evidence.manifest import Manifest, Owned, code, countersign
from choral.trainers.run_folder.evidence.receipts import LedgerAt, read
from choral.trainers.run_folder.evidence.sealing import seal
from choral.trainers.run_folder.evidence.signed_lines import EvidenceError, body_of

Job = Callable[..., dict[str, Any]]


def manifest_of(folder: Path) -> Manifest:
    found = Manifest.read(folder)
    assert found is not None
    return found


def test_it_names_every_file_and_is_signed_by_all(job: Job, tmp_path: Path) -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3)
    run = federate(**job(out=tmp_path, secure_sum=Masked(), privacy=privacy, transcript="digests"))
    found = manifest_of(tmp_path)
    said = found.said
    assert found.signed == ("", "north", "south", "east")
    assert said["gone"] == []
    for name in ("run.json", "history.jsonl", "model.safetensors", "ledger/north.jsonl"):
        assert said["files"][name] == sha256((tmp_path / name).read_bytes()).hexdigest()
    assert not [name for name in said["files"] if "receipts" in name or "secret" in name or "transcript" in name]
    assert run.info.transcript is not None
    assert said["transcript"] == [run.info.transcript.entries, run.info.transcript.head]
    assert said["metrics"] == run.metrics
    for name, cost in said["ledgers"].items():
        ledger = Ledger(tmp_path / "ledger" / f"{name}.jsonl")
        assert (cost["head"], cost["events"]) == (ledger.head, len(ledger.events))
        assert cost["epsilon"] == run.info.spent[name].epsilon
        lines = list(read(tmp_path / "receipts" / f"{name}.jsonl"))
        assert said["parties"][name] == {"keys": [lines[0][0]["key"]], "receipts": 4, "head": lines[-1][1]}
        assert said["model"] == lines[-1][0]["came"]
    assert said["code"] == code()
    assert len(said["code"]["digest"]) == 64


@pytest.mark.parametrize("private", [None, Privacy(epsilon=3.0, delta=1e-3)], ids=["plain", "private"])
def test_a_run_on_pooled_data_has_one_too(private: Privacy | None, job: Job, tmp_path: Path) -> None:
    centralize(**job(out=tmp_path, privacy=private))
    found = manifest_of(tmp_path)
    assert found.signed == ("",)
    assert found.said["kind"] == "centralized"
    assert set(found.said["ledgers"]) == ({"pooled"} if private else set())


def test_the_clients_ledger_is_named(job: Job, tmp_path: Path) -> None:
    federate(**job(out=tmp_path, privacy=ClientPrivacy(epsilon=8.0, delta=1e-2, clip=1.0)))
    assert set(manifest_of(tmp_path).said["ledgers"]) == {"clients"}


def test_more_rounds_make_it_anew_and_a_finished_run_keeps_it(job: Job, tmp_path: Path) -> None:
    federate(**job(out=tmp_path, rounds=2))
    first = (tmp_path / "manifest.json").read_bytes()
    federate(**job(out=tmp_path, rounds=2, resume=True))
    assert (tmp_path / "manifest.json").read_bytes() == first
    federate(**job(out=tmp_path, rounds=3, resume=True))
    found = manifest_of(tmp_path)
    assert found.said["completed"] == 3
    assert [len(about["keys"]) for about in found.said["parties"].values()] == [2, 2, 2]
    assert found.said["gone"] == []


def test_who_is_not_there_in_the_end_is_named(job: Job, tmp_path: Path) -> None:
    """As after a kill between the last round and the manifest: the identities are gone with the process."""
    federate(**job(out=tmp_path))
    (tmp_path / "manifest.json").unlink()
    seal(Run.load(tmp_path))
    found = manifest_of(tmp_path)
    assert found.said["gone"] == ["east", "north", "south"]
    assert found.signed == ("",)
    assert found.said["model"] == [content for content, _ in read(tmp_path / "receipts" / "east.jsonl")][-1]["came"]


OWN = Owned(keys=("aa", Identity(b"1" * 32).public.hex()), receipts=4, head="h", ledger=LedgerAt("l", 3))


def said_of(**changed: Any) -> bytes:
    about = {"keys": list(OWN.keys), "receipts": 4, "head": "h", **changed.get("north", {})}
    ledger = {"head": "l", "events": 3, "epsilon": 1.0, "delta": 1e-5, **changed.get("ledger", {})}
    return body_of({"parties": {"north": about}, "ledgers": {"north": ledger} if changed.get("led", True) else {}})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"north": {"receipts": 3}}, "something else of the receipts of 'north'"),
        ({"north": {"head": "x"}}, "something else of the receipts of 'north'"),
        ({"north": {"keys": ["bb"]}}, "something else of the receipts of 'north'"),
        ({"ledger": {"head": "x"}}, "something else of the ledger of 'north'"),
        ({"ledger": {"events": 2}}, "something else of the ledger of 'north'"),
        ({"led": False}, "something else of the ledger of 'north'"),
    ],
)
def test_a_party_signs_nothing_that_it_knows_otherwise(changed: dict[str, Any], message: str) -> None:
    assert len(countersign(said_of(), "north", OWN, Identity(b"1" * 32))) == 128
    with pytest.raises(EvidenceError, match=message):
        countersign(said_of(**changed), "north", OWN, Identity(b"1" * 32))
    with pytest.raises(EvidenceError, match="not signed by this identity last"):
        countersign(said_of(), "north", OWN, Identity(b"2" * 32))


def test_it_takes_no_time(job: Job, parties: Mapping[str, Any], tmp_path: Path) -> None:
    """Of the size of the demo's federations: ten parties, and their ledgers. Measured: 20 ms."""
    ten = {f"party-{number:02}": parties["north"] for number in range(10)}
    run = federate(**job(out=tmp_path, parties=ten, rounds=2, privacy=Privacy(epsilon=3.0, delta=1e-3)))
    code()
    (tmp_path / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "receipts")
    started = time.process_time()
    seal(run)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.replace(b'"completed":3', b'"completed":4'), "the signature of the coordinator is not on"),
        (lambda raw: raw.replace(b'{"manifest":', b'{"manifesto":'), "is no manifest"),
        (lambda raw: raw[:-4], "is no manifest"),
        (lambda raw: raw.replace(b'"version":1', b'"version":2'), "another format or version"),
    ],
)
def test_no_edit_of_it_is_read(edit: Callable[[bytes], bytes], message: str, job: Job, tmp_path: Path) -> None:
    federate(**job(out=tmp_path))
    path = tmp_path / "manifest.json"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(EvidenceError, match=message):
        Manifest.read(tmp_path)


# ------------------------------------------------------------------------------------- ledgers for the life of the data


def test_runs_that_share_ledgers_share_a_budget(job: Job, tmp_path: Path) -> None:
    """The second promise holds for both runs together; a third under it is refused, and released nothing."""
    from choral.privacy import BudgetExceededError

    lasting = tmp_path / "ledgers"
    first = federate(**job(out=tmp_path / "1", ledgers=lasting, privacy=Privacy(epsilon=1.0, delta=1e-3)))
    kept = (lasting / "north.jsonl").read_bytes()
    second = federate(**job(out=tmp_path / "2", ledgers=lasting, privacy=Privacy(epsilon=3.0, delta=1e-3)))
    assert (lasting / "north.jsonl").read_bytes().startswith(kept)
    for name, ledger in ((name, Ledger(lasting / f"{name}.jsonl")) for name in ("north", "south", "east")):
        assert len(ledger.events) == 6
        assert first.info.spent[name].epsilon < second.info.spent[name].epsilon <= 3.0
        assert second.info.spent[name].epsilon == pytest.approx(ledger.epsilon(1e-3))
        copied = [Ledger(tmp_path / number / "ledger" / f"{name}.jsonl") for number in ("1", "2")]
        assert [len(each.events) for each in copied] == [3, 6]
        assert copied[0].head == ledger.head_after(3)
    before = {path.name: path.read_bytes() for path in lasting.iterdir()}
    with pytest.raises(BudgetExceededError, match="is spent"):
        federate(**job(out=tmp_path / "3", ledgers=lasting, privacy=Privacy(epsilon=3.0, delta=1e-3)))
    assert {path.name: path.read_bytes() for path in lasting.iterdir()} == before
    assert first.info.ledgers == "data"


def test_a_run_with_lasting_ledgers_is_resumed_with_them_alone(job: Job, tmp_path: Path) -> None:
    from choral.errors import ConfigError

    class Stop(Exception):
        pass

    def stop(entry: Any) -> None:
        if entry.round == 2:
            raise Stop

    given = job(out=tmp_path / "run", privacy=Privacy(epsilon=2.0, delta=1e-3), rounds=4)
    with pytest.raises(Stop):
        federate(**given, ledgers=tmp_path / "ledgers", on_round=stop)
    assert len(Ledger(tmp_path / "run" / "ledger" / "east.jsonl").events) == 2  # a copy, for an audit
    with pytest.raises(ConfigError, match="ledgers"):
        federate(**given, resume=True)
    run = federate(**given, ledgers=tmp_path / "ledgers", resume=True)
    assert len(Ledger(tmp_path / "ledgers" / "east.jsonl").events) == 4
    assert max(cost.epsilon for cost in run.info.spent.values()) <= 2.0


@pytest.mark.parametrize("kind", ["pooled", "clients"])
def test_pooled_data_and_clients_have_lasting_ledgers_too(kind: str, job: Job, tmp_path: Path) -> None:
    for number, epsilon in enumerate((2.0, 6.0)):
        out, lasting = tmp_path / str(number), tmp_path / "ledgers"
        if kind == "pooled":
            centralize(**job(out=out, ledgers=lasting, privacy=Privacy(epsilon=epsilon, delta=1e-3)))
        else:
            privacy = ClientPrivacy(epsilon=4 * epsilon, delta=1e-2, clip=1.0)
            federate(**job(out=out, ledgers=lasting, privacy=privacy))
    ledger = Ledger(tmp_path / "ledgers" / f"{kind}.jsonl")
    assert len(ledger.segments) == 2
    assert len(Ledger(tmp_path / "0" / "ledger" / f"{kind}.jsonl").segments) == 1


def test_the_command_reads_ledgers_and_finds_one_that_was_put_back(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from choral.cli import main

    lasting = tmp_path / "ledgers"
    federate(**job(out=tmp_path / "1", ledgers=lasting, privacy=Privacy(epsilon=1.0, delta=1e-3)))
    shutil.copy(lasting / "north.jsonl", tmp_path / "backup.jsonl")
    federate(**job(out=tmp_path / "2", ledgers=lasting, privacy=Privacy(epsilon=3.0, delta=1e-3)))
    north, runs = str(lasting / "north.jsonl"), [str(tmp_path / "1"), str(tmp_path / "2")]
    assert main(["ledger", "show", str(lasting)]) == 0
    said = capsys.readouterr().out
    assert "plan 2: epsilon 3 promised; 3 releases of 3 planned" in said
    assert "guaranteed" in said
    assert main(["ledger", "sum", north, str(tmp_path / "backup.jsonl")]) == 0
    together = float(capsys.readouterr().out.partition("epsilon ")[2].split()[0])
    events = (*Ledger(north).events, *Ledger(tmp_path / "backup.jsonl").events)
    assert Ledger(north).epsilon(1e-3) < together
    from choral.privacy.accounting import record_level

    assert together == pytest.approx(record_level.epsilon(events, 1e-3), abs=1e-4)
    assert main(["ledger", "head", north, "--against", *runs]) == 0
    assert f"{Ledger(north).head} after 6 events: north" in capsys.readouterr().out
    shutil.copy(tmp_path / "backup.jsonl", lasting / "north.jsonl")
    assert main(["ledger", "head", north, "--against", *runs]) == 1
    assert "the manifest has seen 6 events: this ledger is an older copy, or was cut" in capsys.readouterr().out
    assert main(["ledger", "head", north]) == 0
    assert main(["ledger", "head", north, "--against", str(tmp_path / "2" / "receipts" / "east.jsonl")]) == 1
    assert main(["ledger", "sum", str(tmp_path / "none.jsonl")]) == 2
    assert json.loads(((tmp_path / "1") / "run.json").read_bytes())["ledgers"] == "data"
