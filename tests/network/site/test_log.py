"""The log of a site: a signed chain, whole after crashes and with several writers, and refused if it was changed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from site_folders import NOW, Sites, offer

from choral.network import SiteError, SiteFolder
from choral.network.site.approvals import approvals, revoke
from choral.network.site.files.log import LONGEST_FACT, SiteLine, SiteLog
from choral.privacy.ledgers.hash_chain import GENESIS, lines
from choral.protocols.crypto.identity import Identity

SEED = bytes(range(32))


@pytest.fixture
def log(tmp_path: Path) -> SiteLog:
    made = SiteLog(tmp_path / "log.jsonl", Identity(SEED).public, Identity(SEED))
    made.begin("north", NOW)
    made.append("pinned", {"name": "south", "pin": "ab"}, NOW)
    made.append("round", {"number": 1, "survived": True, "seconds": 0.5, "error": None}, NOW)
    return made


def again(log: SiteLog) -> SiteLog:
    """As another process reads it, with the public key alone."""
    return SiteLog(log.path, Identity(SEED).public)


def test_a_log_is_read_as_it_was_written_and_by_others_with_the_public_key(log: SiteLog) -> None:
    found = again(log).read()
    assert [line.event for line in found.entries] == ["begun", "pinned", "round"]
    assert found.entries[2].facts == {"number": 1, "survived": True, "seconds": 0.5, "error": None}
    assert (found.head, found.entries[0].when) == (found.digests[-1], NOW)
    assert log.read() == found
    with pytest.raises(SiteError, match="is only read here"):
        again(log).append("round", {})


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a fact": (
        lambda raw: [raw[0], raw[1].replace(b"south", b"sauth"), raw[2]],
        "line 2: the chain of hashes is broken",
    ),
    "a line left out": (lambda raw: [raw[0], raw[2]], "line 2: the chain of hashes is broken"),
    "another order": (lambda raw: [raw[0], raw[2], raw[1]], "line 2: the chain of hashes is broken"),
    "a line twice": (lambda raw: [*raw, raw[2]], "line 4: the chain of hashes is broken"),
    "no line": (lambda raw: [raw[0], b"{}\n", *raw[1:]], "line 2: not a line of a site's log"),
    "an empty file": (lambda _: [], "is empty"),
    "without its beginning": (lambda raw: raw[1:], "line 1: the chain of hashes is broken"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_log_that_was_changed_is_refused(log: SiteLog, what: str) -> None:
    """Whether it is read anew, or was read before by the same process."""
    change, message = CHANGES[what]
    log.path.write_bytes(b"".join(change(log.path.read_bytes().splitlines(keepends=True))))
    for reader in (again(log), log):
        with pytest.raises(SiteError, match=message):
            reader.read()
    with pytest.raises(SiteError, match=message):
        log.append("round", {})


def forged(previous: str, seed: bytes = bytes(32), **changed: Any) -> tuple[bytes, str]:
    """A line whose hash fits, made by somebody without the site's key."""
    signer = SiteLog(Path(), Identity(seed).public, Identity(seed))
    line = signer._signed(previous, "approved", {"digest": "0" * 64}, NOW)
    return lines(previous, [msgspec.structs.replace(line, **changed)])


def test_a_line_that_the_site_s_key_did_not_sign_is_refused(log: SiteLog) -> None:
    """Who can write the file, and not read the key, can hash as well as anybody."""
    head, whole = log.read().head, log.path.read_bytes()
    for line, _ in (
        forged(head),
        forged(head, SEED, facts={"digest": "1" * 64}),
        forged(head, SEED, at="2026-11-29T13:00:00+00:00"),
        forged(head, SEED, event="revoked"),
        forged(head, SEED, signature=""),
    ):
        log.path.write_bytes(whole + line)
        with pytest.raises(SiteError, match="line 4: it is not signed by this site's key"):
            again(log).read()
    moved = SiteLog(Path(), Identity(SEED).public, Identity(SEED))._signed(GENESIS, "approved", {}, NOW)
    log.path.write_bytes(whole + lines(head, [moved])[0])  # signed for another place of the chain
    with pytest.raises(SiteError, match="line 4: it is not signed by this site's key"):
        again(log).read()


def test_a_whole_log_of_another_key_is_refused(log: SiteLog, tmp_path: Path) -> None:
    other = SiteLog(tmp_path / "other.jsonl", Identity(bytes(32)).public, Identity(bytes(32)))
    other.begin("north", NOW)
    log.path.write_bytes(other.path.read_bytes())
    with pytest.raises(SiteError, match="line 1: it is not signed by this site's key"):
        again(log).read()


@pytest.mark.parametrize("event", ["begun", "other"])
def test_a_log_begins_once(log: SiteLog, event: str) -> None:
    if event == "begun":
        log.path.write_bytes(
            log.path.read_bytes() + lines(log.read().head, [log._signed(log.read().head, "begun", {}, NOW)])[0]
        )
    else:
        log.path.write_bytes(lines(GENESIS, [log._signed(GENESIS, "round", {}, NOW)])[0])
    with pytest.raises(SiteError, match="not a line of a site's log"):
        again(log).read()


def test_a_time_without_a_zone_is_no_time(log: SiteLog) -> None:
    from choral.network.site.files.log import _signed_bytes
    from choral.protocols.crypto.keys import ed25519_sign

    head = log.read().head
    signature = ed25519_sign(SEED, _signed_bytes(head, "2026-11-29T12:00:00", "round", {})).hex()
    bad = SiteLine(at="2026-11-29T12:00:00", event="round", facts={}, signature=signature)
    log.path.write_bytes(log.path.read_bytes() + lines(head, [bad])[0])
    with pytest.raises(SiteError, match="line 4: not a line of a site's log"):
        again(log).read()


def test_a_torn_last_line_goes_with_the_next_append(log: SiteLog) -> None:
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"previous":"ab')
    assert len(again(log).read().entries) == 3
    log.append("round", {"number": 2}, NOW)
    assert log.path.read_bytes().startswith(whole)
    assert [line.facts.get("number") for line in again(log).read().entries[2:]] == [1, 2]


def test_a_log_that_is_gone_is_not_begun_anew(log: SiteLog) -> None:
    """It would forget what was revoked."""
    log.path.unlink()
    for use in (log.read, lambda: log.append("round", {})):
        with pytest.raises(SiteError, match="is gone: approvals and revocations are lines of it"):
            use()


def test_long_words_of_a_coordinator_are_cut(log: SiteLog) -> None:
    line = log.append("refused", {"reasons": "x" * 10_000}, NOW)
    assert len(str(line.facts["reasons"])) == LONGEST_FACT


def test_what_cannot_be_read_back_is_not_written(log: SiteLog) -> None:
    before = log.path.read_bytes()
    for bad in (float("nan"), "\ud800", [1]):
        with pytest.raises((SiteError, TypeError, ValueError)):
            log.append("round", {"value": bad}, NOW)  # type: ignore[dict-item]
    assert log.path.read_bytes() == before


def writer(path: Path, name: str, count: int) -> None:
    log = SiteLog(path, Identity(SEED).public, Identity(SEED))
    for number in range(count):
        log.append("round", {"by": name, "number": number})


def test_two_processes_write_one_chain(log: SiteLog) -> None:
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=writer, args=(log.path, name, 15)) for name in ("a", "b")]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    found = log.read().entries[3:]
    for name in ("a", "b"):
        assert [line.facts["number"] for line in found if line.facts["by"] == name] == list(range(15))


def test_a_writer_that_is_killed_leaves_a_whole_log(log: SiteLog) -> None:
    context = multiprocessing.get_context("fork")
    for moment in (0.0, 0.003, 0.01, 0.03):
        process = context.Process(target=writer, args=(log.path, "killed", 10_000))
        process.start()
        process.join(moment + 0.05)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        before = len(again(log).read().entries)
        log.append("round", {"number": before}, NOW)
        assert len(again(log).read().entries) == before + 1


def test_approvals_are_what_the_log_says_last(sites: Sites) -> None:
    first, second = offer(), offer(job="other")
    sites.approve(first)
    sites.approve(second)
    revoke(sites.north, first.digest, by="officer", now=NOW)
    found = approvals(sites.north.log.read())
    assert {digest: approval.revoked for digest, approval in found.items()} == {
        first.digest: True,
        second.digest: False,
    }
    assert found[second.digest].by == "officer"
    with pytest.raises(SiteError, match="0 approvals of"):
        revoke(sites.north, first.digest, by="officer")
    with pytest.raises(SiteError, match="0 approvals of"):
        revoke(sites.north, "0" * 64, by="officer")


def test_a_directory_changes_with_a_line_of_the_log_or_not_at_all(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = sites.north.pinned.without("south")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(SiteError):
        sites.north.pin(without, "unpinned", name="south")
    assert "south" in SiteFolder.open(sites.path).parties
    monkeypatch.undo()
    stale = SiteFolder.open(sites.path)
    assert "south" not in sites.north.pin(without, "unpinned", name="south").parties
    with pytest.raises(SiteError, match="was changed meanwhile"):  # or it would come back with another's addition
        stale.pin(stale.pinned.without("east"), "unpinned", name="east")
    assert "south" not in SiteFolder.open(sites.path).parties
    assert sites.north.log.read().entries[-1].event == "unpinned"
