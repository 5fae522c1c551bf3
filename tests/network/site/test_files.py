"""A site's files: what is misspelt, out of range, readable by others or pinned twice is named before anything runs."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from site_folders import SETTINGS, Sites

from choral.errors import ChoralError, ConfigError
from choral.network import CertificateError, SiteError, SiteFolder, make_identity
from choral.network.site.files.directory import Pinned
from choral.network.site.files.private import write_private
from choral.network.site.files.settings import Algorithm, SiteSettings, read_site
from choral.network.site.files.template import SITE_TOML
from choral.trainers.algorithms import KINDS

posix = pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")


def test_the_site_toml_that_is_written_is_as_strict_as_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE_TOML)
    assert read_site(path) == SiteSettings(name="NAME")
    filled = re.sub(r"^# (\[|address|path|records|epsilon|delta|max_grad|data)", r"\1", SITE_TOML, flags=re.M)
    path.write_text(filled.replace("/srv/visits.csv", "visits.csv"))
    (tmp_path / "visits.csv").touch()
    found = read_site(path)
    assert found.data["visits"].promise is not None
    assert (found.tasks["visits.py"].data, found.coordinators["hub"].address) == ("visits", "hub.example.org:8443")


def test_every_algorithm_can_be_allowed() -> None:
    assert set(get_args(Algorithm)) == {*KINDS, "statistics"}


WRONG: dict[str, tuple[str, str, str, str]] = {
    "a key of the file": ("[sum]", "[summ]", "unknown key summ", "did you mean sum?"),
    "a key of a table": ("minimum_cohort", "minimum_cohorts", "unknown key sum.minimum_cohorts", "sum.minimum_cohort?"),
    "a key of a data set": ("records =", "record =", "unknown key data.visits.record", "data.visits.records?"),
    "a key of a promise": ("epsilon =", "epsilom =", "unknown key data.visits.promise.epsilom", "promise.epsilon?"),
    "a key of a task": ('data = "visits"', 'dat = "visits"', "unknown key tasks.visits.py.dat", "py.data?"),
    "a key of a coordinator": ("address =", "adress =", "unknown key coordinators.hub.adress", "hub.address?"),
    "a word": ('"fedprox"', '"fedprx"', "job.algorithms[", ""),
    "a type": ("minimum_cohort = 3", 'minimum_cohort = "3"', "sum.minimum_cohort: expected `int`", ""),
    "a plain sum": ("[sum]", '[sum]\nkinds = ["plain"]', "sum.kinds[", ""),
    "no kind": ("[sum]", "[sum]\nkinds = []", "sum.kinds is empty", ""),
    "corrupt": ("[sum]", "[sum]\ncorrupt = 1.5", "expected sum.corrupt as a count", ""),
    "a small cohort": ("minimum_cohort = 3", "minimum_cohort = 1", "sum.minimum_cohort is 1, expected 2 to", ""),
    "a negative maximum": ("rounds = 20", "rounds = 0", "maxima.rounds is 0, expected 1 to", ""),
    "epsilon": ("epsilon = 3.0", "epsilon = 0.0", "data.visits.promise.epsilon is 0.0, expected", ""),
    "epsilon nan": ("epsilon = 3.0", "epsilon = nan", "data.visits.promise.epsilon is nan, expected", ""),
    "delta": ("delta = 1e-5", "delta = 0.005", "data.visits.promise.delta is 0.005, expected below 1/200", ""),
    "no data": ('path = "visits.csv"', 'path = "gone.csv"', "data.visits.path: there is nothing at", ""),
    "no place": ('path = "visits.csv"', "", "data.visits: expected exactly one of path and part", ""),
    "two places": (
        "records",
        'part = "party 1 of 2"\nrecords',
        "data.visits: expected exactly one of path and part",
        "",
    ),
    "a part": ('path = "visits.csv"', 'part = "3 of 10"', "data.visits.part is '3 of 10', expected the like of", ""),
    "a part beyond": ('path = "visits.csv"', 'part = "party 3 of 2"', "data.visits.part is 'party 3 of 2'", ""),
    "both promises": ("records =", "without_privacy = true\nrecords =", "data.visits has a promise and without", ""),
    "no noise": ("epsilon =", "noise = []\nepsilon =", "data.visits.promise.noise is empty", ""),
    "a task's data": ('data = "visits"', 'data = "other"', "tasks.visits.py.data is 'other', and the data sets", ""),
    "a task with a path": ('"visits.py"', '"../visits.py"', "tasks.'../visits.py': expected the name of a file", ""),
    "a name": ('name = "north"', 'name = "no/rth"', "expected a name of 1 to 63 letters", ""),
    "no TOML": ("[sum]", "[sum", "is not valid TOML", ""),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_in_site_toml_is_named(sites: Sites, what: str) -> None:
    old, new, message, hint = WRONG[what]
    with pytest.raises(ChoralError) as refused:
        sites.settings((old, new))
    assert message in str(refused.value)
    assert hint in refused.value.hint


def test_no_promise_is_no_oversight(sites: Sites) -> None:
    """Leaving the promise out does not open the data: it has to be said."""
    begins, ends = SETTINGS.index("[data.visits.promise]"), SETTINGS.index("[tasks")
    with pytest.raises(SiteError, match=r"data.visits has neither a promise nor without_privacy = true"):
        sites.settings((SETTINGS[begins:ends], ""))


@pytest.mark.parametrize("second", ['path = "./visits.csv"', 'path = "copy.csv"\nledger = "ledgers/visits.jsonl"'])
def test_one_data_set_has_one_promise_and_one_ledger(sites: Sites, second: str) -> None:
    """Under two names it would have two budgets."""
    shutil.copy(sites.path / "visits.csv", sites.path / "copy.csv")
    again = f"[data.again]\n{second}\nrecords = 1\nwithout_privacy = true\n[data.visits]"
    with pytest.raises(SiteError, match=r"data\.visits and data\.again are one"):
        sites.settings(("[data.visits]", again))


def test_a_site_without_its_files_says_which(tmp_path: Path, sites: Sites) -> None:
    with pytest.raises(SiteError, match=r"has no site.toml"):
        SiteFolder.open(tmp_path)
    assert SiteFolder.open(sites.path / "site.toml").settings.name == "north"
    (sites.path / "directory.toml").rename(sites.path / "other")
    with pytest.raises(ConfigError, match=r"no such file: .*directory\.toml"):
        SiteFolder.open(sites.path)


@posix
@pytest.mark.parametrize(
    ("file", "mode"),
    [
        ("site.toml", 0o640), ("directory.toml", 0o604), ("log.jsonl", 0o620), ("north.key", 0o644), ("tasks", 0o750),
        ("tasks/visits.py", 0o660), (".", 0o711), ("jobs", 0o705), ("north.crt", 0o664),
    ],
)  # fmt: skip
def test_what_other_users_may_read_or_write_stops_the_site(sites: Sites, file: str, mode: int) -> None:
    path = sites.path / file
    before = path.stat().st_mode & 0o777
    path.chmod(mode)
    with pytest.raises(ChoralError, match=f"may be (used|read) by other users \\(mode {mode:o}\\)") as refused:
        SiteFolder.open(sites.path)
    assert refused.value.hint == f"chmod {'700' if path.is_dir() else '600'} {path}"
    path.chmod(before)
    SiteFolder.open(sites.path)


@posix
def test_a_link_into_somewhere_else_is_no_file_of_the_site(sites: Sites, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text("")
    (sites.path / "tasks/visits.py").unlink()
    (sites.path / "tasks/visits.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(SiteError, match="is a link"):
        SiteFolder.open(sites.path)


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_stops_the_site(sites: Sites) -> None:
    os.chown(sites.path / "site.toml", 12345, -1)
    with pytest.raises(SiteError, match="belongs to another user"):
        SiteFolder.open(sites.path)


@posix
def test_all_that_is_written_is_this_user_s_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        SiteFolder.init(tmp_path / "north", "north")
    finally:
        os.umask(previous)
    for path in [tmp_path / "north", *(tmp_path / "north").rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o644 if path.suffix == ".crt" else 0o600
        assert path.stat().st_mode & 0o777 == expected, path


def test_a_site_is_begun_once(tmp_path: Path) -> None:
    SiteFolder.init(tmp_path / "north", "north")
    with pytest.raises(SiteError, match="is not empty"):
        SiteFolder.init(tmp_path / "north", "north")
    with pytest.raises(CertificateError, match="expected a name"):
        SiteFolder.init(tmp_path / "other", "../other")
    assert not (tmp_path / "other").exists()


def test_a_draft_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "site.toml"
    write_private(path, b"old")

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SiteError, match="cannot be written: No space left on device"):
        write_private(path, b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


# ------------------------------------------------------------------------------------------------------- directory.toml


def test_the_directory_is_read_as_it_was_written(sites: Sites) -> None:
    again = Pinned.read(sites.path / "directory.toml")
    assert {entry.name: entry.pin for entry in again.sites} == {
        entry.name: entry.pin for entry in sites.north.pinned.sites
    }
    assert [entry.name for entry in sites.north.hub_directory] == ["hub"]
    assert set(sites.north.parties) == {"south", "east", "west"}


def test_a_name_has_one_key_and_a_key_one_name(sites: Sites, tmp_path: Path) -> None:
    pinned = sites.north.pinned
    same_name = make_identity(tmp_path / "other", "south").certificate
    for coordinator in (False, True):
        with pytest.raises(CertificateError, match="two certificates for one name: south"):
            pinned.with_(same_name, coordinator=coordinator)
    assert pinned.rotated(same_name).sites["south"].pin == same_name.pin
    twin = renamed(tmp_path, "south", "twin")
    for coordinator in (False, True):
        with pytest.raises(CertificateError, match="twin and south have one key"):
            pinned.with_(twin, coordinator=coordinator)


def renamed(tmp_path: Path, name: str, other: str) -> Any:
    """A certificate of another name under the same key."""
    from Crypto.PublicKey import ECC

    from choral.network.transport.certificates import parse_certificate, self_signed

    key = ECC.import_key((tmp_path / name / f"{name}.key").read_bytes())
    own = make_identity(tmp_path / f"for {other}", other).certificate
    return parse_certificate(self_signed(other, key, not_before=own.not_before, not_after=own.not_after))


def test_this_site_s_own_name_and_key_are_no_other_s(sites: Sites, tmp_path: Path) -> None:
    other = make_identity(tmp_path / "other", "North").certificate
    with pytest.raises(SiteError, match=r"directory.toml has North, which is this site"):
        sites.north.pin(sites.north.pinned.with_(other), "pinned")
    twin = renamed(tmp_path, "north", "twin")
    sites.north.pinned.with_(twin).write(sites.path / "directory.toml")
    with pytest.raises(SiteError, match="has this site's own key under the name twin"):
        SiteFolder.open(sites.path)


def test_a_certificate_and_its_pin_change_together_or_not_at_all(sites: Sites, tmp_path: Path) -> None:
    path = sites.path / "directory.toml"
    text = path.read_text()
    south, other = sites.north.pinned.sites["south"], make_identity(tmp_path / "other", "south").certificate
    path.write_text(text.replace(south.pem.strip(), other.pem.strip()))
    with pytest.raises(SiteError, match="the certificate of south does not have the pin that is written with it"):
        SiteFolder.open(sites.path)
    path.write_text(text.replace('[sites."south"]', '[sites."east2"]'))
    with pytest.raises(SiteError, match="the certificate under 'east2' is that of south"):
        SiteFolder.open(sites.path)
    path.write_text(text.replace("pin =", "pn =", 1))
    with pytest.raises(ConfigError, match="unknown key"):
        SiteFolder.open(sites.path)


def test_which_coordinator_is_meant_is_said(sites: Sites) -> None:
    assert sites.north.coordinator == "hub"
    two = '[coordinators.other]\naddress = "localhost:1"\n[coordinators.hub]'
    assert sites.settings(("[coordinators.hub]", two)).coordinator == ""
    assert SiteFolder.open(sites.path, coordinator="other").coordinator == "other"
    with pytest.raises(SiteError, match=r"no certificate of the coordinator 'other' is pinned"):
        _ = SiteFolder.open(sites.path, coordinator="other").hub_directory
    with pytest.raises(ConfigError, match=r"site.toml has no coordinator 'third'"):
        SiteFolder.open(sites.path, coordinator="third")


def test_no_secret_is_shown(sites: Sites) -> None:
    secret = sites.north.signing.seed
    assert secret.hex() not in repr(sites.north)
    assert repr(secret) not in repr(sites.north)


def test_every_setting_is_explained_in_the_documentation() -> None:
    """Each key of site.toml stands in docs/sites.md."""
    page = (Path(__file__).parents[3] / "docs/sites.md").read_text()

    def keys(kind: Any) -> list[str]:
        found = []
        for field in fields(kind):
            found.append(field.name)
            hint = get_type_hints(kind)[field.name]
            for part in (hint, *get_args(hint)):
                found += keys(part) if is_dataclass(part) else []
        return found

    assert [key for key in keys(SiteSettings) if f"`{key}`" not in page] == []
