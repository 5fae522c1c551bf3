"""``choral site``: from nothing to an approved job, and what a person is shown on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from site_folders import CODE, NOW, SETTINGS, Sites, offer, terms

from choral import __version__
from choral.cli.command_line import main
from choral.doors import visible
from choral.network import SiteError, SiteFolder, make_identity
from choral.network.site.approvals import MOST_KEPT, approve
from choral.network.site.overview import offered, overview
from choral.network.site.review import review
from choral.privacy import ClientPrivacy, Privacy
from choral.privacy.accounting.events import PlannedEvents, PoissonSampledGaussian, ReleasePlan
from choral.protocols import Homomorphic, Masked, Plain


def said(capsys: Any, *words: str, code: int = 0) -> str:
    """What the command printed, on both streams; its lines joined where they were wrapped."""
    assert main(["site", *words]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return re.sub(r"\s+", " ", str(printed.out + printed.err))


def shown(sites: Sites, given: Any = None) -> dict[str, str]:
    rows: dict[str, str] = {}
    for what, words in review(sites.north, given or offer(), NOW).rows:
        rows[what] = f"{rows[what]} | {words}" if what in rows else words
    return rows


@pytest.mark.parametrize("words", [["--help"], ["directory", "--help"]])
def test_help_fits_80_columns(capsys: Any, words: list[str]) -> None:
    assert main(["site", *words]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["init", "show", "review", "approve", "revoke", "log"])
def test_every_command_explains_itself_in_80_columns(capsys: Any, command: str) -> None:
    assert main(["site", command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: choral site {command}")
    assert max(map(len, lines[1:])) <= 80


def test_usage_without_a_command_or_with_an_unknown_one(capsys: Any) -> None:
    assert "usage: choral site COMMAND" in said(capsys, code=2)
    assert "unknown command 'site aprove'" in said(capsys, "aprove", code=2)
    assert "unknown command 'site directory ad'" in said(capsys, "directory", "ad", code=2)


def test_from_nothing_to_a_site_that_can_take_part(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = said(capsys, "init", "north")
    pin = SiteFolder.open("north").identity.certificate.pin
    assert re.sub(r"\s", "", made.split("its pin:")[1].split("keep")[0]) == pin
    todo = said(capsys, "show", "--site", "north")
    for what in ("whom to connect to", "pin 2 more sites", "which data there is", "put training code into tasks/"):
        assert what in todo
    for name in ("south", "east", "hub"):
        made_there = make_identity(name, name).certificate
        words = ["directory", "add", f"{name}/{name}.crt", "--site", "north", "--pin", made_there.pin.upper()]
        said(capsys, *words, *(["--coordinator"] if name == "hub" else []))
    (tmp_path / "north/site.toml").write_text(
        SETTINGS.replace('path = "visits.csv"', f'path = "{tmp_path}/visits.csv"')
    )
    (tmp_path / "visits.csv").write_text("age\n")
    assert "put visits.py into tasks/" in said(capsys, "show", "--site", "north")
    (tmp_path / "north/tasks/visits.py").touch(0o600)
    (tmp_path / "north/tasks/visits.py").write_text(CODE)
    done = said(capsys, "show", "--site", "north")
    assert "to do" not in done
    listed = json.loads(said(capsys, "show", "--site", "north", "--json"))
    assert [heading for heading in listed if heading in done] == list(listed)
    assert any("0.0000 spent of epsilon 3" in line for lines in listed.values() for line in lines)
    assert "0.0000 spent of epsilon 3 at delta 1e-05 for each record" in done
    assert f"visits.py, reads visits: SHA-256 {offer().code}" in done
    listed = said(capsys, "directory", "--site", "north")
    assert "hub coordinator," in listed
    assert "south site," in listed


def test_a_pin_is_asked_for_and_must_be_the_certificate_s(sites: Sites, tmp_path: Path, capsys: Any) -> None:
    new = make_identity(tmp_path / "new", "new").certificate
    words = ["directory", "add", str(tmp_path / "new/new.crt"), "--site", str(sites.path)]
    asked = said(capsys, *words, code=2)
    assert "the pin of new was not given" in asked
    assert new.pin[:8] not in asked  # it would be copied, not compared
    assert "has another pin than was given" in said(capsys, *words, "--pin", new.pin[:-1] + "0g", code=2)
    assert "has another pin than was given" in said(capsys, *words, "--pin", new.pin[:12], code=2)
    assert "new" not in SiteFolder.open(sites.path).parties
    said(capsys, *words, "--pin", " ".join([new.pin[:4], new.pin[4:]]))
    assert SiteFolder.open(sites.path).parties["new"] == new.public_key


def test_a_certificate_is_rotated_and_removed_by_name(sites: Sites, tmp_path: Path, capsys: Any) -> None:
    place = ["--site", str(sites.path)]
    new = make_identity(tmp_path / "again", "south").certificate
    add = ["add", str(tmp_path / "again/south.crt"), "--pin", new.pin, *place]
    assert "two certificates for one name: south" in said(capsys, "directory", *add, code=2)
    said(capsys, "directory", "rotate", *add[1:])
    assert SiteFolder.open(sites.path).parties["south"] == new.public_key
    said(capsys, "directory", "remove", "south", *place)
    assert "nobody is pinned as 'south'" in said(capsys, "directory", "remove", "south", *place, code=2)
    assert "nobody is pinned as 'south'" in said(capsys, "directory", "rotate", *add[1:], code=2)
    log = said(capsys, "log", *place)
    assert f"repinned: name south, kind site, pin {new.pin}" in log
    assert "unpinned: name south" in log


def test_review_approve_revoke_and_what_the_log_says(sites: Sites, capsys: Any) -> None:
    place, until = ["--site", str(sites.path)], f"{date.today() + timedelta(days=30)}"
    (sites.path.parent / "offer.json").write_bytes(offer().message())
    assert "no job was offered yet" in said(capsys, "review", *place)
    text = said(capsys, "review", str(sites.path.parent / "offer.json"), *place)
    as_json = json.loads(said(capsys, "review", str(sites.path.parent / "offer.json"), *place, "--json"))
    assert (as_json["refused"], [heading for heading in as_json if heading in text][:2]) == ([], list(as_json)[:2])
    assert f"choral site approve {offer().digest[:16]} --until DATE" in text
    assert "not approved" in said(capsys, "review", *place)
    approved = said(capsys, "approve", offer().digest[:16], "--until", until, "--by", "Dr. Who", *place)
    assert approved.startswith(f"visits-2026 may run until {until} (UTC): {offer().digest}")
    assert "note" not in approved
    assert f"approved until {until}" in said(capsys, "review", *place)
    assert f"by Dr. Who on {date.today()}, until {until}" in said(capsys, "review", "visits-2026", *place)
    SiteFolder.open(sites.path).agree(offer())
    said(capsys, "revoke", offer().digest[:12], *place)
    assert "was revoked" in said(capsys, "review", "visits-2026", *place)
    log = said(capsys, "log", *place)
    events = ["begun", "approved", "agreed", "revoked"]
    assert re.findall(r"Z (\w+):", log) == events
    head = log.split("head: ")[1].strip()
    assert "4 lines, each signed by north" in said(capsys, "log", "--holds", head, *place)
    (sites.path / "log.jsonl").write_bytes(
        b"".join((sites.path / "log.jsonl").read_bytes().splitlines(keepends=True)[:3])
    )
    assert "lines were cut from its end" in said(capsys, "log", "--holds", head, *place, code=2)


def test_what_is_refused_whoever_approves_it_says_so_with_its_own_exit_code(sites: Sites, capsys: Any) -> None:
    place = ["--site", str(sites.path)]
    sites.north.offers.keep(given := offer(terms=terms(rounds=21)))
    text = said(capsys, "review", given.digest[:12], *place, code=1)
    assert "This site refuses it, whoever approves it: - 21 rounds, at most 20" in text
    until = f"{date.today()}"
    assert "note: as things are, this site refuses it" in said(
        capsys, "approve", given.digest[:12], "--until", until, *place
    )


def test_digests_that_are_none_or_stand_for_two_are_refused(sites: Sites, capsys: Any) -> None:
    place = ["--site", str(sites.path)]
    for word in ("visits-2026", "abc", "0" * 11, "../site"):
        assert "is no digest" in said(capsys, "approve", word, "--until", "2099-01-01", *place, code=2)
    assert "no offer '000000000000' is kept here" in said(
        capsys, "approve", "0" * 12, "--until", "2099-01-01", *place, code=2
    )
    sites.north.offers.keep(offer())
    sites.north.offers.keep(offer(terms=terms(rounds=1)))
    assert "'visits-2026' stands for 2 offers" in said(capsys, "review", "visits-2026", *place, code=2)
    past = said(capsys, "approve", offer().digest, "--until", "2020-01-01", *place, code=2)
    assert "2020-01-01 is over" in past
    far = said(capsys, "approve", offer().digest, "--until", "2099-01-01", *place, code=2)
    assert "more than ten years away" in far
    assert "error parsing --until" in said(capsys, "approve", offer().digest, "--until", "soon", *place, code=2)


def test_a_kept_offer_that_was_changed_is_none(sites: Sites) -> None:
    """Its name is its digest: what was put in its place is not shown under it."""
    sites.north.offers.keep(offer())
    path = sites.path / "jobs" / f"{offer().digest}.json"
    path.write_bytes(offer(terms=terms(rounds=1)).message())
    with pytest.raises(SiteError, match="no offer"):
        sites.north.offers.find(offer().digest)
    for place in range(MOST_KEPT - 1):
        (sites.path / "jobs" / f"{place}.json").touch(0o600)
    with pytest.raises(Exception, match=f"{MOST_KEPT} offers are kept already"):
        sites.north.offers.keep(offer(job="more"))


# ------------------------------------------------------------------------------------------------------- what is shown


def test_a_review_says_what_would_run_be_released_and_spent(sites: Sites) -> None:
    rows = shown(sites)
    assert rows["job"] == "visits-2026, by coordinator hub"
    assert rows["digest"] == offer().digest
    assert rows["algorithm"] == "fedavg, 20 rounds at most"
    assert rows["releases"] == "w_k - w_t, the change by the party's training (fit), every round"
    assert rows["model"] == "7 parameters in 2 tensors"
    assert rows["values"] == "up to 16 in 28 bits; a site counts for as many as its records, at most 256"
    assert rows["data"] == "visits: visits.csv, 200 records"
    opened = "over all 4 sites, opened for the sum of 3 or more, 1 corrupt; 3 together can reconstruct a secret of one"
    assert rows["secure sum"].endswith(opened)
    assert rows["evaluation"] == "nothing of the site's own becomes known"
    assert "kind masked, min_survivors 3, corrupt 1, dropouts by default, server malicious" in rows["secure sum"]
    assert rows["privacy"].startswith(
        "epsilon 1 at delta 1e-05 for each record, zero out one record; clipping norm 1.0;"
    )
    spent, job, noise = rows["budget"].split("|")[0], *rows[""].split(" | ")
    assert spent == "0.0000 spent so far, 3 promised in all"
    assert job == "when this job ends, all jobs on the data may have come to 1, and 2.0000 is left"
    multiplier = float(noise.split()[-1])
    cost = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=multiplier, steps=200)
    from choral.privacy.accounting import record_level

    assert record_level.epsilon([cost], 1e-5) == pytest.approx(1.0, rel=5e-3)


def test_a_review_counts_what_earlier_jobs_spent(sites: Sites) -> None:
    ledger = sites.north.path / "ledgers/visits.jsonl"
    from choral.privacy import Ledger

    event = PoissonSampledGaussian(sample_rate=0.2, noise_multiplier=25.0, steps=100)
    plan = ReleasePlan(epsilon=1.0, parts=(PlannedEvents(event=event, times=3),))
    own = Ledger(ledger, holder="north")
    own.bind("north", 1e-5)
    own.append(event, after=0, plan=plan)
    spent = float(shown(sites)["budget"].split()[0])
    assert spent >= own.epsilon(1e-5)
    rows = shown(sites, offer(terms=terms(privacy=Privacy(3.0, 1e-5))))
    assert "may have come to 3, and 0.0000 is left" in rows[""]
    assert "noise multiplier" in rows[""]
    goes_on = offer(settings={"training": {"batch_size": 40}})
    assert "an earlier plan, of which 2 passes are left" in shown(sites, goes_on)[""]


def test_a_review_shows_code_against_what_was_approved_last(sites: Sites) -> None:
    sites.north.offers.keep(offer())
    first = review(sites.north, offer(), NOW)
    assert "nothing was approved for this task before: read all of it" in dict(first.rows)["code"]
    assert first.diff[3:] == ["+def site(data, training, seed):", "+    ...", "+"] or "+    ..." in first.diff
    sites.approve(offer())
    assert review(sites.north, offer(), NOW).diff == []
    assert "unchanged since it was approved on 2026-11-29" in shown(sites)["code"]
    changed = CODE.replace("...", "send(data)\x1b[2K\r\u202e")
    (sites.path / "tasks/visits.py").write_text(changed)
    import hashlib

    now = offer(code=hashlib.sha256((sites.path / "tasks/visits.py").read_bytes()).hexdigest())
    found = review(sites.north, now, NOW)
    assert found.against == []
    assert "changed since the code approved on 2026-11-29" in dict(found.rows)["code"]
    assert "-    ..." in found.diff
    assert "+    send(data)\\x1b[2K\\r\\u202e" in found.diff  # nothing of it hides in a terminal
    (sites.path / "approved" / f"{offer().code}.py").write_text("changed")
    assert "is gone or changed: read all of it" in dict(review(sites.north, now, NOW).rows)["code"]
    assert "+def site(data, training, seed):" in review(sites.north, now, NOW).diff
    (sites.path / "tasks/visits.py").unlink()
    assert "is not installed here" in dict(review(sites.north, now, NOW).rows)["code"]


def test_nothing_is_approved_that_is_not_what_would_run(sites: Sites) -> None:
    (sites.path / "tasks/visits.py").write_text(CODE + "# more\n")
    with pytest.raises(SiteError, match="what would run is not what is asked for"):
        approve(sites.north, offer(), date(2026, 12, 1), by="", now=NOW)


def test_a_coordinator_s_words_do_not_steer_the_terminal(sites: Sites) -> None:
    hostile = "\x1b[1A\x1b[2Kepsilon 0.1\u202e\r"
    given = replace(offer(), settings={"note": hostile}, terms={**offer().terms, "code": hostile})
    found = review(sites.north, given, NOW)
    for text in (*(words for _, words in found.rows), *found.against):
        assert visible(text) == text
    assert visible("a\tb\u2066\n") == "a\tb\\u2066\\n"


def test_reviews_of_other_promises(sites: Sites) -> None:
    private = ClientPrivacy(1.0, 1e-5)
    rows = shown(sites, offer(terms=terms(privacy=None)))
    assert rows["privacy"] == "none is promised"
    digits = replace(offer(), task="digits", code=f"choral {__version__}")
    assert shown(sites, digits)["data"] == "none: this training code may read no data set here"
    north = sites.settings(("max_grad_norm = 1.0", "unit = 'client'\nnoise = ['distributed']"))
    assert north.settings.data["visits"].promise is not None
    rows = shown(sites, offer(terms=terms(privacy=private)))
    assert rows["privacy"] == "epsilon 1 at delta 1e-05 for each site; clipping norm 1.0; noise is each site's share"
    assert "noise multiplier" in rows[""]
    summed = offer(metrics="in the clear, no epsilon", terms=terms(metrics=("accuracy", "loss")))
    assert shown(sites, summed)["evaluation"] == (
        "['accuracy', 'loss'] of the site's own records: summed over the sites, in the clear, no epsilon"
    )
    assert "the coordinator sees what each" in shown(sites, offer(summing=Plain()))["secure sum"]
    assert "every site has the key" in shown(sites, offer(summing=Homomorphic(key="shared")))["secure sum"]
    assert "expected 2 <= min_survivors <= 4" in shown(sites, offer(summing=Masked(min_survivors=5)))["secure sum"]
    broken = replace(offer(), terms={"rounds": 1})
    assert shown(sites, broken)["terms"].startswith("cannot be shown: its terms have the keys")


def test_no_password_of_a_proxy_is_shown(sites: Sites) -> None:
    proxy = 'address = "localhost:8443"\nproxy = "http://me:secret@proxy:3128"'
    north = sites.settings(('address = "localhost:8443"', proxy))
    text = str(dict(overview(north)))
    assert "secret" not in text
    assert "by the proxy http://proxy:3128" in text
    assert "not approved" not in str(dict(offered(north)))


def test_the_front_page_of_the_command_line_names_it(capsys: Any) -> None:
    assert main(["--help"]) == 0
    assert "site COMMAND" in capsys.readouterr().out


def test_what_a_site_is_opened_with_loads_no_torch(sites: Sites) -> None:
    """`choral site log` and `approve` are for a person who waits."""
    code = f"import sys; from choral.network import SiteFolder; SiteFolder.open({str(sites.path)!r}).log.read();"
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
