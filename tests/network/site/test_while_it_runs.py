"""What a site's files say while a job runs: an approval that is taken back, and how far the ledger has come."""

from __future__ import annotations

from pathlib import Path

from site_federation import Direct, Federation, offer_for, served

from choral.jobs.settings import PrivacySettings
from choral.network.site.approvals import revoke
from choral.network.site.budget import check_ledger, open_ledger

PROMISE = "[data.points.promise]\nepsilon = 4.0\ndelta = 1e-3\nmax_grad_norm = 1.0"


def test_a_job_whose_approval_is_taken_back_goes_on_without_that_site(tmp_path: Path) -> None:
    """In the middle of the second round; the coordinator reads "refused", and nobody is told of the revocation."""
    federation = Federation(tmp_path)
    carrier = Direct(federation)
    settings = federation.settings()
    digest = offer_for(federation, settings).digest
    replies: list[bytes] = []

    def before(name: str, _: bytes) -> None:
        trained = [line for line in federation.site("east").log.read().entries if line.event == "trained"]
        if name == "east" and len(trained) == 1 and not revoked:
            revoke(federation.site("east"), digest, by="officer")
            revoked.append(True)

    def after(name: str, reply: bytes) -> bytes:
        if name == "east" and revoked:
            replies.append(reply)
        return reply

    revoked: list[bool] = []
    carrier.before, carrier.after = before, after
    run, _ = served(carrier, settings)
    assert [entry.survivors for entry in run.history[1:]] == [3, 2, 2]
    *refusals, last = replies
    assert refusals
    assert all(b"JobRefused" in reply and len(reply) < 40 for reply in refusals)
    assert b"JobOver" in last  # what it had signed before, as every site says at the end
    assert b"revoked" not in last
    lines = federation.site("east").log.read().entries
    assert [line.facts["round"] for line in lines if line.event == "trained"] == [1]
    assert "its approval was revoked" in str([line.facts for line in lines if line.event == "out"])


def test_each_round_s_line_says_how_far_the_ledger_has_come(tmp_path: Path) -> None:
    federation = Federation(tmp_path, promise=PROMISE)
    settings = federation.settings(privacy=PrivacySettings(epsilon=4.0, delta=1e-3))
    run, _ = served(Direct(federation), settings)
    assert run.history[-1].survivors == 3
    folder = federation.site("north")
    ledger = open_ledger(folder, "points")
    lines = folder.log.read().entries
    assert [line.facts.get("ledger_events") for line in lines if line.event == "trained"] == [1, 2, 3]
    check_ledger("points", ledger, lines)
    assert ledger.head == lines[-1].facts["ledger_head"]
