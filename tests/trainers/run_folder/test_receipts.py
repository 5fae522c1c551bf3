"""Receipts of a rehearsal: what each party's file tells of every round, and that no edit of it passes."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from flat_arguments import federate

from choral import Homomorphic, Masked, Plain
from choral.privacy import ClientPrivacy, Ledger, Privacy
from choral.protocols.crypto.identity import Identity
from choral.protocols.crypto.keys import ed25519_verify
from choral.protocols.masking import messages, signing
from choral.trainers import FSVRG, Dropouts, Participation
from choral.trainers.run_folder.evidence.receipts import (
    LedgerAt,
    Receipts,
    RoundEnd,
    RoundNotes,
    Signatory,
    model_digest,
    read,
)
from choral.trainers.run_folder.evidence.signed_lines import EvidenceError

Job = Callable[..., dict[str, Any]]


def receipts_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: [content for content, _ in read(path)] for path in sorted((folder / "receipts").iterdir())}


@pytest.mark.parametrize("secure_sum", [Masked(), Homomorphic(), Homomorphic(key="shared"), Plain()], ids=str)
def test_every_party_has_a_receipt_of_every_round(job: Job, secure_sum: Any, tmp_path: Path) -> None:
    run = federate(**job(out=tmp_path, secure_sum=secure_sum, privacy=Privacy(epsilon=3.0, delta=1e-3)))
    signed = secure_sum not in (Plain(), Homomorphic(key="shared"))
    weights = torch.cat([run.state["weight"].reshape(-1), run.state["bias"]])
    for name, (terms, *rounds) in receipts_of(tmp_path).items():
        assert terms["kind"] == "terms"
        assert terms["rehearsal"]
        hashed = hashlib.sha256(b"choral training terms 1" + terms["text"].encode()).hexdigest()
        assert [line["round"] for line in rounds] == [1, 2, 3]
        assert rounds[-1]["came"] == model_digest(weights)
        ledger = Ledger(tmp_path / "ledger" / f"{name}.jsonl")
        for before, after in pairwise(rounds):
            assert before["came"] == after["given"]
            assert before["ledger"]["after"] == after["ledger"]["before"]
        for number, line in enumerate(rounds, 1):
            assert (line["terms"], line["algorithm"]) == (hashed, "fedavg")
            assert line["promise"]["epsilon"] == 3.0
            assert line["ledger"]["after"] == ledger.head_after(number)
            (each,) = line["sums"]
            assert each["vector"]
            assert each["in_sum"]
            assert each["sent"]
            assert each["dropped"] == []
            assert bool(each["signatures"]) == signed
            assert bool(each["session"]) == (secure_sum != Plain())
        assert rounds[-1]["ledger"]["epsilon"] == run.info.spent[name].epsilon


def test_the_signatures_in_a_receipt_are_the_survivors_own_on_set_model_and_terms(job: Job, tmp_path: Path) -> None:
    federate(**job(out=tmp_path, secure_sum=Masked()))
    for lines in receipts_of(tmp_path).values():
        for line in lines[1:]:
            (each,) = line["sums"]
            begin = bytes.fromhex(each["begin"])
            found = messages.to_party(begin, limit=len(begin))
            assert isinstance(found, messages.Begin)
            assert (found.weights.hex(), found.terms.hex()) == (each["told"], line["terms"])
            bitmap = messages.to_bitmap(range(3), 3)
            for name, signature in each["signatures"].items():
                place = each["roster"].index(name)
                said = signing.confirm(bytes.fromhex(each["session"]), found.round, place, bitmap, signing.begun(begin))
                assert ed25519_verify(bytes.fromhex(each["keys"][name]), said, bytes.fromhex(signature))


def test_several_sums_of_a_round_stand_in_one_receipt(job: Job, tmp_path: Path) -> None:
    given = job(out=tmp_path, secure_sum=Masked(), rounds=2, algorithm=FSVRG(step=0.1), value_bound=64.0)
    federate(
        **given, loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    )
    for lines in receipts_of(tmp_path).values():
        assert [len(line["sums"]) for line in lines[1:]] == [3, 2]
        assert [each["exchange"] for each in lines[1]["sums"]] == [0, 1, 2]
        assert all(each["signatures"] and each["in_sum"] for line in lines[1:] for each in line["sums"])


def test_who_drops_out_has_a_receipt_that_says_so(job: Job, tmp_path: Path) -> None:
    often = Participation(dropouts=Dropouts(vector=0.4), patience=10)
    run = federate(**job(out=tmp_path, secure_sum=Masked(min_survivors=2), participation=often, rounds=8, seed=3))
    found = receipts_of(tmp_path)
    given_up = {entry.round for entry in run.history if entry.failed}
    assert given_up
    for lines in found.values():
        assert {line["round"] for line in lines[1:] if line["failed"]} == given_up
    out = [
        (name, line["round"], each)
        for name, lines in found.items()
        for line in lines[1:]
        for each in line["sums"]
        if not each["in_sum"]
    ]
    assert out
    for name, number, each in out:
        assert not each["signatures"]
        assert not each["vector"]
        for others in found.values():
            for line in others[1:]:
                if line["round"] == number and line["sums"]:
                    assert name in line["sums"][0]["dropped"]


def test_cohorts_and_promises_of_clients(job: Job, tmp_path: Path) -> None:
    """Who was not selected was told nothing, and has nothing to sign; the ledger of clients is no party's own."""
    half = Participation(cohort=2)
    federate(**job(out=tmp_path, participation=half, privacy=ClientPrivacy(epsilon=8.0, delta=1e-2, clip=1.0)))
    found = receipts_of(tmp_path)
    for number in (1, 2, 3):
        assert sum(line["round"] == number for lines in found.values() for line in lines[1:]) == 2
    assert all(line["ledger"] is None for lines in found.values() for line in lines[1:])


def test_a_resumed_run_goes_on_under_other_identities(job: Job, tmp_path: Path) -> None:
    federate(**job(out=tmp_path, rounds=2))
    before = (tmp_path / "receipts" / "north.jsonl").read_bytes()
    (tmp_path / "receipts" / "north.jsonl").write_bytes(before + b'{"receipt":{"half')
    federate(**job(out=tmp_path, rounds=4, resume=True))
    assert (tmp_path / "receipts" / "north.jsonl").read_bytes().startswith(before)
    lines = receipts_of(tmp_path)["north"]
    assert [line.get("round") for line in lines] == [None, 1, 2, None, 3, 4]
    assert len({line["key"] for line in lines}) == 2
    assert len({line["run"] for line in lines}) == 1
    assert not [path for path in tmp_path.rglob("*") if "secret" in path.name or "seed" in path.name]


def test_no_receipts_without_a_folder_or_of_too_many(job: Job, parties: Mapping[str, Any], tmp_path: Path) -> None:
    many = {f"{number}": parties["north"] for number in range(65)}
    federate(**job(out=tmp_path, parties=many, rounds=1))
    assert not (tmp_path / "receipts").exists()


def signatory(**changed: Any) -> Signatory:
    text = json.dumps({"algorithm": {"kind": "fedavg"}, "privacy": None})
    given = {"party": "north", "identity": Identity(b"1" * 32), "run": "a run", "rehearsal": False}
    return Signatory(**{**given, "terms": "00" * 32, "text": text, **changed})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.replace(b'"round":2', b'"round":3'), "line 3: the signature is not of these words"),
        (lambda raw: raw.replace(b'"round":2', b'"round":2,"round":3'), "a key stands in it twice"),
        (lambda raw: b"".join(raw.splitlines(True)[:2] + raw.splitlines(True)[3:]), "does not follow from the line"),
        (lambda raw: b"".join(raw.splitlines(True)[1:]), "line 1 does not follow"),
        (lambda raw: raw + raw, "line 5 does not follow"),
        (lambda raw: raw.replace(b'"}\n', b'0"}\n', 1), "a line that is no receipt"),
        (lambda raw: raw.replace(b"receipt", b"recipe", 1), "a line that is no receipt"),
    ],
)
def test_no_edit_of_a_receipt_is_read(edit: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "receipts" / "north.jsonl"
    file = Receipts(path, signatory())
    for number in (1, 2, 3):
        file.write(RoundNotes("north", number, "00" * 32, LedgerAt("0" * 64, 0)), RoundEnd())
    assert len(list(read(path))) == 4
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(EvidenceError, match=message):
        list(read(path))


def test_a_file_of_another_party_or_run_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "receipts" / "north.jsonl"
    Receipts(path, signatory())
    for changed in ({"party": "south"}, {"run": "another"}):
        with pytest.raises(EvidenceError, match="another party or run"):
            Receipts(path, signatory(**changed))


def test_a_receipt_of_ten_parties_is_short_and_made_in_no_time(
    job: Job, parties: Mapping[str, Any], tmp_path: Path
) -> None:
    """Measured: 3.3 kB, .4 ms. The limits are 5 kB, and 2 ms a party and round."""
    ten = {f"party-{number:02}": parties["north"] for number in range(10)}
    federate(**job(out=tmp_path, parties=ten, secure_sum=Masked(), rounds=2, privacy=Privacy(epsilon=3.0, delta=1e-3)))
    (path, *_) = (tmp_path / "receipts").iterdir()
    lines = path.read_bytes().splitlines()
    assert all(len(line) < 5000 for line in lines)
    (line,) = (content for content, _ in read(path) if content.get("round") == 2)
    file, ledger = Receipts(tmp_path / "receipts" / "x.jsonl", signatory(), fsync=False), LedgerAt("0" * 64, 0)
    notes = RoundNotes("north", 1, "00" * 32, ledger, sums=line["sums"])
    started = time.process_time()
    for _ in range(50):
        file.write(notes, RoundEnd(ledger=ledger))
    assert (time.process_time() - started) / 50 < 0.002
