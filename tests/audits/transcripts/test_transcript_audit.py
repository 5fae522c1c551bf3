"""What the server saw: real runs, honest and deliberately broken; and the statistics against exact laws.

False alarms: an honest run raises one with a probability of at most 1e-3 by construction; seven honest masked runs are
audited here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from flat_arguments import federate
from msgspec.structs import replace as replaced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Homomorphic, Masked, Plain, audit
from choral.audits import Audit
from choral.audits.transcripts import independence
from choral.audits.transcripts.independence import phases, smallest_of_known, smallest_of_pairs
from choral.errors import ConfigError
from choral.privacy.ledgers.hash_chain import GENESIS, lines
from choral.protocols import wire_format
from choral.protocols.homomorphic.split import party_and_server as split
from choral.protocols.homomorphic.split import party_driver as split_party
from choral.protocols.in_process import ByteCounter
from choral.protocols.masking import messages, party_round
from choral.protocols.masking.in_process import MaskedSession
from choral.protocols.masking.mask_addition import masked
from choral.protocols.masking.server import unmasking
from choral.protocols.tap import show, watched_by
from choral.trainers import Dropouts, Participation, RunFolderError
from choral.trainers.run_folder.transcript import ObservedMessage, Opened, Recorded, SumBegun, Transcript, Vector

torch.set_num_threads(1)
Job = Mapping[str, Any]


@pytest.fixture(scope="module")
def job() -> Job:
    """Five parties, three rounds, a model of a few hundred weights."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(5 * 20, 30, generator=generator)
    labels = (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long()

    def build(dataset: TensorDataset) -> Any:
        model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4))
        return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size=10)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    parts = {f"p{i}": TensorDataset(points[20 * i : 20 * i + 20], labels[20 * i : 20 * i + 20]) for i in range(5)}
    return {"build": build, "fit": fit, "evaluate": lambda model: 0.5, "parties": parts, "rounds": 3}


def rehearse(job: Job, folder: Path, **changes: Any) -> Audit:
    federate(**{**job, "secure_sum": Masked(), "transcript": "rehearsal", **changes}, out=folder)
    return audit(folder)


def check(report: Audit, part: str) -> tuple[str, str]:
    found = next(check for check in report.checks if part in check.name)
    return found.verdict, found.finding


def verdicts(report: Audit) -> set[str]:
    return {check.verdict for check in report.checks}


@pytest.mark.parametrize("dropouts", [0.0, 0.2])
@pytest.mark.parametrize("server", ["malicious", "semi-honest"])
def test_an_honest_masked_run_holds(job: Job, tmp_path: Path, dropouts: float, server: str) -> None:
    report = rehearse(job, tmp_path / "run", dropout_rate=dropouts, secure_sum=Masked(server=server), seed=4)
    assert verdicts(report) == {"holds"}
    assert (report.verdict, report.exit_code) == ("holds", 0)
    seen = report.transcript
    assert seen is not None
    present = [entry.survivors for entry in trained_rounds(tmp_path / "run")]
    assert seen.uploads == seen.vectors == sum(present)
    # Pairs as sent (difference and sum) and peeled; both against each vector of their round, by two tests.
    pairs = seen.uploads * (seen.uploads - 1) // 2
    assert seen.tests == 3 * pairs + 2 * 2 * sum(count * count for count in present)
    assert seen.detectable is not None
    assert 0.1 < seen.detectable < 0.3
    assert seen.unread == 0
    assert "with the self-mask off" in check(report, "single party's vector")[1]


def trained_rounds(folder: Path) -> Any:
    from choral.trainers import Run

    return [entry for entry in Run.load(folder).history if entry.round]


def test_bytes_of_failed_rounds_alone_are_compared_with_nothing(job: Job, tmp_path: Path) -> None:
    lossy = Participation(dropouts=Dropouts(vector=0.99), patience=5)
    report = rehearse(job, tmp_path / "run", secure_sum=Masked(min_survivors=4), participation=lossy, seed=1)
    assert all(entry.failed for entry in trained_rounds(tmp_path / "run"))
    verdict, finding = check(report, "bytes that were counted")
    assert (verdict, report.exit_code) == ("unverified", 1)
    assert "nothing could be compared" in finding


def test_a_session_per_cohort_is_read_as_such(job: Job, tmp_path: Path) -> None:
    report = rehearse(job, tmp_path / "run", cohort=4, secure_sum=Masked(server="semi-honest"))
    assert verdicts(report) == {"holds"}
    assert report.transcript is not None
    assert report.transcript.sessions == 1 + 3  # the first is opened to see whether there can be one
    assert report.transcript.uploads == 3 * 4


def renamed(entry: Any, old: str, new: str) -> Any:
    message = isinstance(entry, ObservedMessage) and (entry.way, entry.party) == ("up", old)
    return msgspec.structs.replace(entry, party=new) if message else entry


def rewrite(run: Path, change: Callable[[list[Any]], list[Any]], *, head: bool = True) -> None:
    """Write another whole chain, as whoever writes the folder can, and (head) its head into run.json."""
    content, last = lines(GENESIS, changed := change(list(Recorded(run).entries)))
    (run / "transcript" / "index.jsonl").write_bytes(content)
    if head:
        info = json.loads((run / "run.json").read_text())
        info["transcript"] = {"entries": len(changed), "head": last}
        (run / "run.json").write_text(json.dumps(info))


def test_a_message_of_somebody_else_is_caught(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "run", rounds=1)
    rewrite(tmp_path / "run", lambda entries: [renamed(entry, "p3", "p9") for entry in entries])
    verdict, finding = check(audit(tmp_path / "run"), "not declared")
    assert verdict == "violated"
    assert "up, p9: not a party of this session" in finding


def test_client_level_noise_in_a_sum_that_wraps_holds(job: Job, tmp_path: Path) -> None:
    privacy = ClientPrivacy(epsilon=50.0, delta=1e-3, min_survivors=3, bits=16)
    report = rehearse(job, tmp_path / "run", privacy=privacy, secure_sum=Masked(min_survivors=3))
    assert verdicts(report) == {"holds"}


@pytest.mark.parametrize("masks", ["none", "self", "pairs"])
def test_parties_that_leave_masks_out_are_caught(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: str
) -> None:
    """Every sum is right, only the masks are not there. none: updates in the clear. self: the self-mask alone, which
    the server learns. pairs: the pairwise masks alone, which hide the vector while nobody drops out."""

    def broken(vector: Any, bits: int, added: Any, subtracted: Any) -> bytes:
        kept = {"none": [], "self": added[:1], "pairs": added[1:]}[masks]
        return masked(vector, bits, kept, subtracted if masks == "pairs" else [])

    monkeypatch.setattr(party_round, "masked", broken)
    if masks != "self":
        monkeypatch.setattr(unmasking, "add_mask", lambda *_, **__: None)
    report = rehearse(job, tmp_path / "run")
    verdict, finding = check(report, "single party's vector")
    if masks == "pairs":
        assert verdict == "holds"
        return
    assert (verdict, report.exit_code) == ("violated", 1)
    assert ("self-mask taken off" in finding) == (masks == "self")


def test_one_update_of_many_sent_unmasked_is_caught_and_named(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[bytes] = []

    def spied(vector: Any, bits: int, added: Any, subtracted: Any) -> bytes:
        plain.append(masked(vector, bits, [], []))
        return masked(vector, bits, added, subtracted)

    def change(way: str, party: str, raw: bytes) -> bytes:
        message = messages.to_server(raw, sender=party, limit=len(raw)) if (way, party) == ("up", "p2") else None
        if not isinstance(message, messages.Upload) or message.round != 2:
            return raw
        return messages.encode(messages.Upload(message.session, 2, (plain[-1],)))

    monkeypatch.setattr(party_round, "masked", spied)
    tampered(monkeypatch, change)
    report = rehearse(job, tmp_path / "run")
    verdict, finding = check(report, "single party's vector")
    assert (verdict, report.exit_code) == ("violated", 1)
    assert "p2 in round 2" in finding
    assert "p2's vector" in finding


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_a_part_of_an_update_left_unmasked_is_caught_if_it_is_large_enough(share: float) -> None:
    rng = np.random.default_rng(0)
    length, bits = 2000, 40
    known = [rng.integers(-1000, 1000, length) for _ in range(3)]
    rows = rng.integers(0, 1 << bits, (3, length), dtype=np.uint64)
    leaked = int(share * length)
    rows[1, :leaked] = (known[1][:leaked] % (1 << bits)).astype(np.uint64)
    found = smallest_of_known(phases(list(rows), bits), known, bits)
    assert (found.p_value * found.tests < 1e-3) == (share == 0.5)
    assert independence.detectable_share(length, found.tests, 1e-3) < 0.5
    if share == 0.5:
        assert (found.one, found.other) == (1, 1)


def test_masks_that_are_used_again_are_caught(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairwise masks are those of the first round, forever. Every sum is right, the self-masks are fresh: only with
    those off, as the server has it, do two rounds of a party cancel."""
    kept: dict[int, tuple[Any, Any]] = {}
    calls = {"count": 0}

    def stale(vector: Any, bits: int, added: Any, subtracted: Any) -> bytes:
        place = calls["count"] % 5
        calls["count"] += 1
        pairs = kept.setdefault(place, (added[1:], subtracted))
        return masked(vector, bits, [added[0], *pairs[0]], pairs[1])

    monkeypatch.setattr(party_round, "masked", stale)
    report = rehearse(job, tmp_path / "run", transcript="messages")
    verdict, finding = check(report, "mask was used twice")
    assert verdict == "violated"
    assert "cancel" in finding


def test_keys_that_are_used_again_are_caught(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parties' randomness repeats itself: the same keys in each round."""
    from choral.protocols.masking.party import Member

    advertise = Member.advertise

    def again(self: Any, number: int, *, randomness: Any) -> Any:
        return advertise(self, number, randomness=lambda size: b"7" * size)

    monkeypatch.setattr(Member, "advertise", again)
    report = rehearse(job, tmp_path / "run", transcript="messages")
    verdict, finding = check(report, "nonce, commitment")
    assert verdict == "violated"
    assert "key of" in finding


@pytest.mark.parametrize("what", ["key", "nonce"])
def test_what_a_party_uses_again_in_another_session_is_caught(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """With a cohort every round is the first of a session of its own, so that place and party are the same again."""
    from choral.protocols.masking.party import Member, join

    def fixed(name: str) -> Callable[[int], bytes]:
        count = iter(range(9))
        return lambda size: f"{name} {next(count)}".encode().ljust(size, b".")

    if what == "key":
        advertise = Member.advertise

        def again(self: Any, number: int, *, randomness: Any) -> Any:
            (member, _last), *_ = self._content
            return advertise(self, number, randomness=fixed(str(member.index)))

        monkeypatch.setattr(Member, "advertise", again)
    else:
        monkeypatch.setattr(
            "choral.protocols.masking.party_driver.join",
            lambda setup, **own: join(setup, **{**own, "randomness": fixed(own["name"])}),
        )
    report = rehearse(job, tmp_path / "run", transcript="messages", cohort=4)
    verdict, finding = check(report, "nonce, commitment")
    assert verdict == "violated"
    assert "session 2" in finding


def tampered(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, str, bytes], bytes]) -> None:
    """What the wire (and so the recorder) sees is changed; the protocol's own copy is not."""

    def up(self: ByteCounter, party: str, raw: bytes) -> bytes:
        self._up[party] += len(raw)
        show("up", party, change("up", party, raw))
        return raw

    def down(self: ByteCounter, party: str, raw: bytes) -> None:
        self._down[party] += len(raw)
        show("down", party, change("down", party, raw))

    monkeypatch.setattr(ByteCounter, "up", up)
    monkeypatch.setattr(ByteCounter, "down", down)


def test_bytes_that_are_not_declared_are_caught(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tampered(monkeypatch, lambda way, party, raw: raw + b"secret" if (way, party) == ("up", "p1") else raw)
    report = rehearse(job, tmp_path / "run", rounds=1, transcript="messages")
    assert check(report, "not declared")[0] == "violated"
    assert check(report, "bytes that were counted")[0] == "violated"


def test_a_list_longer_than_the_terms_allow_is_caught(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel in a message of the right form: accusations of parties that there are not."""

    def change(way: str, party: str, raw: bytes) -> bytes:
        message = messages.to_server(raw, sender=party, limit=len(raw)) if way == "up" else None
        if not isinstance(message, messages.Confirm):
            return raw
        return messages.encode(messages.Confirm(message.session, message.round, message.signature, tuple(range(100))))

    tampered(monkeypatch, change)
    report = rehearse(job, tmp_path / "run", rounds=1, transcript="messages")
    verdict, finding = check(report, "not declared")
    assert verdict == "violated"
    assert "belong to it" in finding


def test_two_models_in_one_sum_are_caught(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(way: str, party: str, raw: bytes) -> bytes:
        message = messages.to_party(raw, limit=len(raw)) if (way, party) == ("down", "p1") else None
        if not isinstance(message, messages.Bundle):
            return raw
        parts = [messages.to_party(part, limit=len(part)) for part in message.parts]
        shown = [replaced(p, weights=b"x" * 32) if isinstance(p, messages.Begin) else p for p in parts]
        return messages.encode(messages.Bundle(tuple(map(messages.encode, shown))))

    tampered(monkeypatch, change)
    report = rehearse(job, tmp_path / "run", rounds=1, transcript="messages")
    verdict, finding = check(report, "shown the same model")
    assert verdict == "violated"
    assert "2 different ones were shown" in finding


def test_a_transcript_of_another_protocol_version_is_said_to_be_one(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier Choral recorded it: not read, and no violation either."""
    with monkeypatch.context() as then:
        then.setattr(wire_format, "VERSION", 1)
        rehearse(job, tmp_path / "run", rounds=1, transcript="messages")
    shutil.rmtree(tmp_path / "run" / "receipts")  # which no earlier Choral kept
    (tmp_path / "run" / "manifest.json").unlink()
    report = audit(tmp_path / "run")
    verdict, finding = check(report, "not declared")
    assert verdict == "unverified"
    assert "of protocol version 1; this Choral reads 2" in finding
    assert "violated" not in verdicts(report)


def test_a_history_with_other_survivors_than_the_wire_is_caught(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "run", transcript="messages")
    replace(tmp_path / "run" / "history.jsonl", '"survivors":5', '"survivors":4')
    verdict, finding = check(audit(tmp_path / "run"), "told the same survivors")
    assert verdict == "violated"
    assert "5 survivors on the wire, 4 in the history" in finding


def test_a_message_in_another_than_its_canonical_form_is_caught(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The array's length written in three bytes instead of one: a channel for a bit per message."""
    tampered(
        monkeypatch,
        lambda way, _, raw: raw[:1] + b"\xdc\x00" + bytes([raw[1] & 0x0F]) + raw[2:] if way == "up" else raw,
    )
    report = rehearse(job, tmp_path / "run", rounds=1, transcript="messages")
    verdict, finding = check(report, "not declared")
    assert verdict == "violated"
    assert "canonical" in finding


def test_survivors_told_differently_or_too_few_are_caught(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partial(bitmap: bytes) -> Callable[[str, str, bytes], bytes]:
        def change(way: str, party: str, raw: bytes) -> bytes:
            if way == "down" and (party == "p0" or bitmap == b"\x03"):
                message = messages.to_party(raw, limit=len(raw))
                if isinstance(message, messages.Survivors):
                    return messages.encode(messages.Survivors(message.session, message.round, bitmap))
            return raw

        return change

    tampered(monkeypatch, partial(b"\x0f"))
    verdict, finding = check(rehearse(job, tmp_path / "one", rounds=1), "told the same survivors")
    assert verdict == "violated"
    assert "different sets" in finding
    tampered(monkeypatch, partial(b"\x03"))
    verdict, finding = check(rehearse(job, tmp_path / "two", rounds=1), "told the same survivors")
    assert verdict == "violated"
    assert "2 parties" in finding


def test_a_history_that_counts_other_bytes_is_caught(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "run", transcript="digests")
    path = tmp_path / "run" / "history.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"bytes_up":', '"bytes_up":1')
    path.write_text("\n".join(lines) + "\n")
    assert check(audit(tmp_path / "run"), "bytes that were counted")[0] == "violated"


def test_digests_say_what_digests_can(job: Job, tmp_path: Path) -> None:
    report = rehearse(job, tmp_path / "run", transcript="digests")
    assert not (tmp_path / "run" / "transcript" / "messages.bin").read_bytes()
    assert {check.name for check in report.checks} >= {"The bytes that were counted are those of the messages"}
    assert not any("declared" in check.name for check in report.checks)
    assert report.exit_code == 0
    assert report.transcript is not None
    assert report.transcript.unread == report.transcript.messages


def test_a_plain_sum_is_called_what_it_is(job: Job, tmp_path: Path) -> None:
    report = rehearse(job, tmp_path / "run", secure_sum=Plain())
    verdict, finding = check(report, "single party's vector")
    assert verdict == "holds"
    assert "All 15 do" in finding
    idle = {check.name.partition(" ")[2] for check in report.checks if not check.refutable}
    assert idle == {
        "message says anything of a single party's vector",
        "key, nonce, commitment or message was used twice",
    }
    assert not any("shown the same model" in check.name for check in report.checks)


def test_a_model_shown_to_one_party_alone_was_compared_with_nothing(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "run", rounds=1, transcript="messages")
    rewrite(
        tmp_path / "run",
        lambda entries: [e for e in entries if not isinstance(e, ObservedMessage) or e.party in ("p0", "")],
    )
    assert not any("shown the same model" in check.name for check in audit(tmp_path / "run").checks)


@pytest.mark.parametrize("key", ["split", "shared"])
def test_homomorphic_runs_are_read_as_far_as_can_be(job: Job, tmp_path: Path, key: str) -> None:
    report = rehearse(job, tmp_path / "run", rounds=2, secure_sum=Homomorphic(key=key))
    assert verdicts(report) == {"holds"}
    assert report.transcript is not None
    assert (report.transcript.unread > 0) == (key == "shared")
    assert (report.transcript.uploads == 10) == (key == "split")  # the masked sum of the keys
    tested = [check.name for check in report.checks if "single party's vector" in check.name]
    assert len(tested) == (key == "split")
    assert (report.transcript.detectable is not None) == (key == "split")


def test_ciphertexts_under_no_key_are_caught(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum is right: the parties encrypt, and mask, a key that is zero."""

    def keyless(vector: Any, terms: Any, *, randomness: Any) -> split.Encrypted:
        key = np.zeros(terms.parameters.degree, np.int64)
        return split.Encrypted(key, split._messages(vector, terms, key, randomness(32), os.getpid()))

    monkeypatch.setattr(split_party, "encrypt", keyless)
    report = rehearse(job, tmp_path / "run", rounds=2, secure_sum=Homomorphic())
    verdict, finding = check(report, "single party's vector")
    assert (verdict, report.exit_code) == ("violated", 1)
    assert "vector" in finding


def test_only_a_rehearsal_keeps_vectors(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "messages", transcript="messages")
    rehearse(job, tmp_path / "rehearsal")
    kept = {name: Recorded(tmp_path / name) for name in ("messages", "rehearsal")}
    vectors = [sum(isinstance(entry, Vector) for entry in recorded.entries) for recorded in kept.values()]
    assert vectors == [0, 15]


def test_a_resumed_run_has_two_sessions(job: Job, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(entry: Any) -> None:
        if entry.round == 1:
            raise Stop

    with pytest.raises(Stop):
        rehearse(job, tmp_path / "run", on_round=stop)
    assert verdicts(audit(tmp_path / "run")) == {"holds"}
    report = rehearse(job, tmp_path / "run", resume=True)
    assert report.transcript is not None
    assert report.transcript.sessions == 2
    assert verdicts(report) == {"holds"}
    assert "in one chain of hashes" in check(report, "as it was written")[1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: edit(folder, lambda all: all[:-2]), "its end is cut off"),
        (lambda folder: edit(folder, lambda all: [*all[:3], *all[4:]]), "line 4, does not follow"),
        (lambda folder: shutil.rmtree(folder), "is gone"),
    ],
)
def test_a_run_does_not_go_on_from_a_damaged_transcript(job: Job, tmp_path: Path, damage: Any, said: str) -> None:
    """It would vouch for the damage with a new head."""
    rehearse(job, tmp_path / "run", rounds=1)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"rounds": 3}))
    before = (tmp_path / "run" / "run.json").read_bytes()
    damage(tmp_path / "run" / "transcript")
    with pytest.raises(RunFolderError, match=said):
        rehearse(job, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_round_that_was_killed_leaves_a_half_line_and_is_gone_on_from(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "run", rounds=1)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"rounds": 3}))
    with (tmp_path / "run" / "transcript" / "index.jsonl").open("ab") as file:
        file.write(b'{"previous":"')
    report = rehearse(job, tmp_path / "run", resume=True)
    assert verdicts(report) == {"holds"}
    assert report.transcript is not None
    assert report.transcript.sessions == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "index.jsonl").unlink(), "no index.jsonl"),
        (lambda folder: (folder / "messages.bin").write_bytes(b"short"), "shorter than its index"),
        (lambda folder: flip(folder / "messages.bin"), "not what was recorded"),
        (lambda folder: (folder / "index.jsonl").write_text('{"is":"message"}\n'), "line 1, is damaged"),
        (lambda folder: (folder / "index.jsonl").write_text(""), "does not begin"),
        (lambda folder: rewrite(folder.parent, of_version_7), "of version 7"),
        (lambda folder: edit(folder, lambda all: [*all[:4], all[4].replace(b"up", b"down"), *all[5:]]), "line 5, does"),
        (lambda folder: edit(folder, lambda all: [*all[:4], all[5], all[4], *all[6:]]), "line 5, does not follow"),
        (lambda folder: edit(folder, lambda all: [*all[:4], *all[5:]]), "line 5, does not follow"),
        (lambda folder: edit(folder, lambda all: [*all[:4], all[4], *all[4:]]), "line 6, does not follow"),
        (lambda folder: edit(folder, lambda all: all[:-2]), "its end is cut off"),
        (lambda folder: edit(folder, lambda all: [*all[:-1], all[-1][:-1]]), "its end is cut off"),
        (lambda folder: rewrite(folder.parent, lambda all: [*all[:4], *all[5:], all[4]], head=False), "another transc"),
        (lambda folder: rewrite(folder.parent, lambda all: [*all, all[-1]], head=False), "of round 1, which was compl"),
    ],
)
def test_a_damaged_transcript_is_refused(job: Job, tmp_path: Path, damage: Any, said: str) -> None:
    rehearse(job, tmp_path / "run", rounds=1)
    damage(tmp_path / "run" / "transcript")
    with pytest.raises(RunFolderError, match=said):
        audit(tmp_path / "run")


def edit(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = folder / "index.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def of_version_7(entries: list[Any]) -> list[Any]:
    return [msgspec.structs.replace(entries[0], version=7), *entries[1:]]


def test_lines_of_another_run_are_not_this_one(job: Job, tmp_path: Path) -> None:
    """Spliced line by line, and whole: the same job, another run."""
    for name in ("run", "other"):
        rehearse(job, tmp_path / name, rounds=1)
    mine, other = ((tmp_path / name / "transcript" / "index.jsonl").read_bytes().splitlines(keepends=True)
                   for name in ("run", "other"))  # fmt: skip
    edit(tmp_path / "run" / "transcript", lambda _: [*mine[:9], *other[9:]])
    with pytest.raises(RunFolderError, match="line 10, does not follow"):
        audit(tmp_path / "run")
    for name in ("index.jsonl", "messages.bin"):
        shutil.copy(tmp_path / "other" / "transcript" / name, tmp_path / "run" / "transcript" / name)
    with pytest.raises(RunFolderError, match="another transcript"):
        audit(tmp_path / "run")


def test_a_vector_that_was_changed_is_found_where_no_test_reads_it(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "run", rounds=1, secure_sum=Plain())
    vector = next(entry for entry in Recorded(tmp_path / "run").entries if isinstance(entry, Vector))
    flip(tmp_path / "run" / "transcript" / "messages.bin", vector.at)
    with pytest.raises(RunFolderError, match="not what was recorded"):
        audit(tmp_path / "run")


def test_a_chain_written_anew_with_its_head_is_not_found_but_by_a_head_kept_elsewhere(job: Job, tmp_path: Path) -> None:
    """What no chain without a key can show, said in the finding."""
    kept = rehearse(job, tmp_path / "run", transcript="digests").transcript
    rewrite(tmp_path / "run", lambda entries: entries[:-1])
    found = audit(tmp_path / "run").transcript
    assert kept is not None
    assert found is not None
    assert found.checks[0].verdict == "holds"
    assert "whoever writes the folder can write another chain" in found.checks[0].finding
    assert found.head in found.checks[0].finding
    assert found.head != kept.head


def test_a_transcript_without_a_chain_is_read_and_unverified(job: Job, tmp_path: Path) -> None:
    """As version 1 wrote it: bare entries, and no head in run.json."""
    rehearse(job, tmp_path / "run")
    old = [msgspec.structs.replace(entry, **({"version": 1} if isinstance(entry, Opened) else {}))
           for entry in Recorded(tmp_path / "run").entries if not isinstance(entry, SumBegun)]  # fmt: skip
    index = tmp_path / "run" / "transcript" / "index.jsonl"
    index.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in old))
    with pytest.raises(RunFolderError, match="has no chain of hashes, and run"):
        audit(tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    del info["transcript"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    report = audit(tmp_path / "run")
    verdict, finding = check(report, "as it was written")
    assert (verdict, report.exit_code) == ("unverified", 1)
    assert "version 1" in finding
    assert check(report, "single party's vector")[0] == "holds"
    with pytest.raises(RunFolderError, match="no chain of hashes to go on with"):
        rehearse(job, tmp_path / "run", resume=True)


def test_a_head_that_is_nowhere_leaves_it_unverified(job: Job, tmp_path: Path) -> None:
    rehearse(job, tmp_path / "run", transcript="digests")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    head = info.pop("transcript")
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    assert check(audit(tmp_path / "run"), "as it was written")[0] == "unverified"
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"transcript": head}))
    shutil.rmtree(tmp_path / "run" / "transcript")
    report = audit(tmp_path / "run")
    assert report.transcript is None
    verdict, finding = check(report, "as it was written")
    assert (verdict, report.exit_code) == ("unverified", 1)
    assert "not in the run's folder" in finding


def flip(path: Path, at: int | None = None) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 1
    path.write_bytes(raw)


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_bad_settings_are_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of digests"):
        federate(**job, out=tmp_path / "run", transcript="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="in the run's folder"):
        federate(**job, transcript="digests")


def test_nobody_is_shown_anything_unasked(tmp_path: Path) -> None:
    seen: list[bytes] = []
    with watched_by(lambda way, party, raw: seen.append(raw)):
        show("up", "a", b"1")
        with watched_by(None):
            show("up", "a", b"2")
    show("up", "a", b"3")
    assert seen == [b"1"]
    assert Transcript(None, None).watcher is None


# -- the statistics -------------------------------------------------------------------------------------------------


def test_the_bounds_are_bounds_under_the_null() -> None:
    """2000 draws of d = 60: P[p <= x] <= x for x = .5, .1, .01, up to five standard deviations."""
    rng = np.random.default_rng(5)
    known = [rng.integers(-500, 500, 60)]
    draws = rng.integers(0, 1 << 20, (2000, 60), dtype=np.uint64)
    differences = [smallest_of_known(phases([row], 20), known, 20).p_value for row in draws]
    pairs = [
        smallest_of_pairs(phases([one, other], 20), sums=True).p_value
        for one, other in zip(draws[::2], draws[1::2], strict=True)
    ]
    for values, tests in ((differences, 2), (pairs, 2)):
        for x in (0.5, 0.1, 0.01):
            allowed = min(1.0, tests * x)
            slack = 5 * math.sqrt(allowed * (1 - allowed) / len(values) + 1e-9)
            assert np.mean(np.array(values) <= x) <= allowed + slack


def tail_of_sum(values: np.ndarray[Any, Any], count: int, step: float) -> tuple[np.ndarray[Any, Any], Any]:
    """The law of a sum of ``count`` independent draws from ``values``, on a lattice: points and P[sum >= point]."""
    places = np.rint(values / step).astype(int)
    low = places.min()
    law = np.bincount(places - low) / len(places)
    size = count * (len(law) - 1) + 1
    total = np.fft.irfft(np.fft.rfft(law, 2 * size) ** count, 2 * size)[:size]
    return (np.arange(size) + count * low) * step, total[::-1].cumsum()[::-1]


def test_the_bounds_against_the_exact_laws() -> None:
    """No bound is below the exact tail, computed by convolution, nor more than a hundred times above it."""
    angles = (np.arange(100_000) + 0.5) / 100_000
    points, tail = tail_of_sum(np.cos(2 * math.pi * angles), 40, 1e-3)
    for wanted in (5.0, 10.0, 15.0, 18.0):
        exact = tail[np.searchsorted(points, wanted)]
        assert exact <= independence._cosine_bound(wanted, 40) <= 100 * exact
    points, tail = tail_of_sum(2 * angles - 1, 40, 1e-3)  # 40 equal weights of norm 1: L = sum / sqrt(40)
    for wanted in (1.0, 1.5, 2.0, 2.5):
        exact = 2 * tail[np.searchsorted(points, wanted * math.sqrt(40))]
        assert exact <= independence._line_bound(wanted) <= 100 * exact


def test_the_tests_see_what_they_are_for() -> None:
    rng = np.random.default_rng(6)
    known = [rng.integers(-(1 << 16), 1 << 16, 400) for _ in range(2)]
    mask = rng.integers(0, 1 << 32, 400, dtype=np.uint64)
    one = (mask + (known[0] % (1 << 32)).astype(np.uint64)) & np.uint64(0xFFFFFFFF)
    again = (mask + (known[1] % (1 << 32)).astype(np.uint64)) & np.uint64(0xFFFFFFFF)
    negative = (-mask.astype(np.int64) + known[1]).astype(np.uint64) & np.uint64(0xFFFFFFFF)
    assert smallest_of_pairs(phases([one, again], 32), sums=False).p_value < 1e-100
    assert smallest_of_pairs(phases([one, negative], 32), sums=False).p_value > 1e-3
    assert smallest_of_pairs(phases([one, negative], 32), sums=True).p_value < 1e-100
    scaled = ((known[1] * 9000) % (1 << 32)).astype(np.uint64)  # follows at another scale: the linear test's case
    found = smallest_of_known(phases([scaled], 32), known, 32)
    assert (found.p_value < 1e-20, found.other) == (True, 1)


def test_a_session_of_masked_sums_names_its_terms() -> None:
    """The audit reads the terms from the wire, where Setup is the first message."""
    seen: list[bytes] = []
    with watched_by(lambda way, party, raw: seen.append(raw)):
        from choral.protocols.interface import SumSpec

        MaskedSession(Masked(), SumSpec(parties=("a", "b", "c"), length=5, bound=9))
    assert isinstance(messages.to_party(seen[0], limit=len(seen[0])), messages.SumSetup)
