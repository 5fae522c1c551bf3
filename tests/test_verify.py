"""verify.py by itself: its Ed25519 against the standard's vectors and our own, what it imports, what it says of lies.

The edits of whole run folders that it and `choral audit` must find are in tests/audits/run/test_edits.py.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from choral.cli import main
from choral.protocols.crypto import keys
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import Agreed
from choral.protocols.masking import messages, signing
from choral.trainers.run_folder.evidence.receipts import (
    Asked,
    LedgerAt,
    Receipts,
    RoundEnd,
    RoundNotes,
    Signatory,
    Summed,
)
from choral.verify import UNREADABLE, Evidence, ed25519, pinned_keys

SOURCE = Path(sys.modules["choral.verify"].__file__ or "")
NAMES = ("north", "south", "east")
IDENTITIES = {name: Identity(bytes([place + 1]) * 32) for place, name in enumerate(NAMES)}
TEXT = json.dumps({"algorithm": {"kind": "fedavg"}, "privacy": {"epsilon": 2.0, "delta": 1e-5}})
TERMS = hashlib.sha256(b"choral training terms 1" + TEXT.encode()).hexdigest()


def test_rfc8032_vectors_and_no_neighbour_of_any(vectors: Path) -> None:
    """The 1,024 of the reference implementation that RFC 8032 names; every 16th, for an edit costs as much."""
    lines = gzip.decompress((vectors / "rfc-nist" / "Ed25519_sign.input.gz").read_bytes()).decode().splitlines()
    for number, line in enumerate(lines[::16]):
        secret, public, message, signed = (bytes.fromhex(part) for part in line.split(":")[:4])
        signature = signed[:64]
        assert secret[32:] == public
        assert ed25519(public, message, signature)
        bit = bytes([1 << number % 8])
        place = number % 64
        edited = signature[:place] + bytes([signature[place] ^ bit[0]]) + signature[place + 1 :]
        assert not ed25519(public, message, edited)
        assert not ed25519(public, message + b"x", signature)


def test_wycheproof(vectors: Path) -> None:
    found = json.loads((vectors / "wycheproof" / "ed25519_test.json").read_bytes())
    for group in found["testGroups"]:
        public = bytes.fromhex((group.get("publicKey") or group["key"])["pk"])
        for case in group["tests"]:
            message, signature = bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"])
            assert ed25519(public, message, signature) == (case["result"] == "valid"), case["comment"]


def test_it_accepts_just_what_choral_accepts() -> None:
    """Keys of small order, S + L, and y beyond p among random ones: with another rule two readers would disagree."""
    draws, order = random.Random(5), 2**252 + 27742317777372353535851937790883648493
    small = [bytes(32), bytes([1]) + bytes(31), bytes([0xEC]) + bytes([0xFF]) * 30 + bytes([0x7F])]
    small.append(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"))
    beyond = (2**255 - 19 + 3).to_bytes(32, "little")
    for number in range(12):
        seed, message = draws.randbytes(32), draws.randbytes(number)
        public, signature = keys.ed25519_public(seed), keys.ed25519_sign(seed, message)
        later = (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
        cases = [(public, signature), (public, signature[:32] + later), (beyond, signature)]
        cases += [(key, signature) for key in small] + [(key, key + bytes(32)) for key in small]
        cases += [(public, signature[:63]), (public[:31], signature)]
        for key, signed in cases:
            fits = len(key) == 32 and len(signed) == 64 and keys.ed25519_verify(key, message, signed)
            assert ed25519(key, message, signed) == fits


def test_it_is_one_short_file_that_needs_python_alone(tmp_path: Path) -> None:
    source = SOURCE.read_text("utf-8")
    assert len(source.splitlines()) <= 300
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names
    Signed(tmp_path).written()
    alone = tmp_path / "alone.py"
    alone.write_text(source, "utf-8")
    command = [sys.executable, "-I", "-S", str(alone), str(tmp_path / "north.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Holds" in done.stdout


class Signed:
    """Receipts of two rounds of three parties, with the signatures that parties make; whatever is told can be bent.

    told: by party and round, digest of what Begin holds. models: by party, those given in rounds 1, 2, and the last.
    """

    def __init__(self, folder: Path, *, rehearsal: bool = False) -> None:
        self.folder, self.rehearsal = folder, rehearsal
        self.models = {name: ["a" * 64, "b" * 64, "c" * 64] for name in NAMES}
        self.session = dict.fromkeys(NAMES, b"s" * 32)
        self.terms = dict.fromkeys(NAMES, TERMS)
        self.dropped: dict[str, tuple[str, ...]] = dict.fromkeys(NAMES, ())
        self.runs = dict.fromkeys(NAMES, "a run")
        self.vector = dict.fromkeys(NAMES, True)
        self.identities = dict(IDENTITIES)
        self.roster = NAMES
        self.came = ""  # of round 1, if not what is given in round 2

    def agreed(self, name: str, number: int, told: bytes) -> Agreed:
        begin = messages.encode(
            messages.Begin(self.session[name][:16], number, 0, told, bytes.fromhex(self.terms[name]))
        )
        alive = [each for each in self.roster if each not in self.dropped[name]]
        bitmap = messages.to_bitmap([self.roster.index(each) for each in alive], len(self.roster))
        signatures = {}
        for other in alive:
            if other != name:
                place = self.roster.index(other)
                said = signing.confirm(self.session[name], number, place, bitmap, signing.begun(begin))
                signatures[other] = signing.sign(self.identities[other].seed, said)
        return Agreed(
            begin=begin,
            setup=b"t" * 32,
            session=self.session[name],
            roster=self.roster,
            survivors=tuple(alive),
            keys={other: self.identities[other].public for other in signatures},
            signatures=signatures,
        )

    def written(self) -> list[Path]:
        paths = []
        for name in NAMES:
            path = self.folder / f"{name}.jsonl"
            who = Signatory(
                party=name,
                identity=self.identities[name],
                run=self.runs[name],
                rehearsal=self.rehearsal,
                terms=self.terms[name],
                text=TEXT,
            )
            file = Receipts(path, who)
            for number in (1, 2):
                told = bytes.fromhex(self.models[name][number - 1])
                notes = RoundNotes(name, number, told.hex(), LedgerAt("0" * 64, number - 1))
                summed = Summed(survivors=(name,) if name not in self.dropped[name] else ())
                agreed = self.agreed(name, number, told)
                notes.add(Asked(0, "update", told), ["d" * 64], agreed, vector=self.vector[name], summed=summed)
                after = LedgerAt("e" * 64, number)
                came = (self.came if number == 1 else "") or self.models[name][number]
                file.write(notes, RoundEnd(came=came, ledger=after, epsilon=0.5, delta=1e-5))
            paths.append(path)
        return paths


def problems(paths: list[Path], pinned: dict[str, str] | None = None) -> list[str]:
    evidence = Evidence(pinned, verify=keys.ed25519_verify)
    for path in paths:
        evidence.take(path.name, path.read_bytes())
    evidence.compare(whole=False)
    return evidence.problems


PINNED = {name: identity.public.hex() for name, identity in IDENTITIES.items()}


def test_honest_receipts_hold_and_are_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = Signed(tmp_path).written()
    assert problems(paths, PINNED) == []
    pins = tmp_path / "keys.toml"
    pins.write_text("\n".join(f'{name} = "{key}"' for name, key in PINNED.items()))
    assert main(["verify", *map(str, paths), "--keys", str(pins)]) == 0
    said = capsys.readouterr().out
    assert "south, round 2: took part in fedavg, as 2 other survivors signed; epsilon 2 at delta 1e-05 promised" in said
    assert "events [1, 2], epsilon 0.5 in all" in said
    assert "that others added the noise that they promised" in said
    assert "rehearsal: one process" not in said


def test_from_any_two_receipts_of_a_round_two_views_are_found(tmp_path: Path) -> None:
    for first in NAMES:
        for second in set(NAMES) - {first}:
            folder = tmp_path / f"{first}-{second}"
            folder.mkdir()
            lied = Signed(folder)
            lied.models[second] = ["f" * 64, "b" * 64, "c" * 64]
            lied.written()
            lines = [
                next(line for line in (folder / f"{name}.jsonl").read_bytes().splitlines() if b'"round":1,' in line)
                for name in (first, second)
            ]
            assert lines
            evidence = Evidence(PINNED, verify=keys.ed25519_verify)
            for name, line in zip((first, second), lines, strict=True):
                evidence.take(f"{name}.json", line)
            evidence.compare(whole=False)
            assert any("two views were shown: different model after round 0" in each for each in evidence.problems)


def bend_session(lied: Signed) -> None:
    lied.session["south"] = b"q" * 32


def bend_terms(lied: Signed) -> None:
    lied.terms["south"] = "77" * 32


def bend_survivors(lied: Signed) -> None:
    lied.dropped["north"] = ("east",)


def bend_end(lied: Signed) -> None:
    lied.models["east"] = ["a" * 64, "b" * 64, "9" * 64]


def bend_chain(lied: Signed) -> None:
    lied.came = "b" * 64
    lied.models = {key: ["a" * 64, "8" * 64, "c" * 64] for key in NAMES}


def bend_vector(lied: Signed) -> None:
    lied.vector["east"] = False


def bend_run(lied: Signed) -> None:
    lied.runs["east"] = "another"


def bend_key(lied: Signed) -> None:
    lied.identities["east"] = Identity(b"x" * 32)


@pytest.mark.parametrize(
    ("bend", "found"),
    [
        (bend_session, "two views were shown: different session"),
        (bend_terms, "two views were shown: different terms"),
        (bend_survivors, "two views were shown: different presence of east in sum 1 of round 2"),
        (bend_survivors, "two views were shown: different presence of east in sum 1"),
        (bend_end, "two views were shown: different model after round 2"),
        (bend_chain, "two views were shown: different model after round 1"),
        (bend_vector, "two views were shown: different presence of east in sum 1"),
        (bend_run, "two views were shown: different run of the receipts"),
        (bend_key, "the key of east"),
    ],
)
def test_a_coordinator_that_lies_to_some_is_found(bend: Callable[[Signed], None], found: str, tmp_path: Path) -> None:
    lied = Signed(tmp_path)
    bend(lied)
    said = problems(lied.written(), PINNED)
    assert any(found in each for each in said), said


@pytest.mark.parametrize("field", ["session", "begin", "roster", "dropped", "told", "keys", "signatures"])
def test_survivors_signatures_do_not_fit_what_the_coordinator_made_up(field: str, tmp_path: Path) -> None:
    """A party whose key the coordinator has signs whatever it likes of the sum: the others' signatures do not fit."""
    Signed(tmp_path).written()
    path, made = tmp_path / "north.jsonl", tmp_path / "made.jsonl"
    for line in path.read_bytes().splitlines():
        said = json.loads(line)["receipt"]
        if said["kind"] == "round" and said["round"] == 1:
            (each,) = said["sums"]
            each[field] = {
                "session": "73" * 16 + "00" * 16,
                "begin": each["begin"][:-66] + "c420" + "11" * 31 + "22",
                "roster": ["south", "north", "east"],
                "dropped": ["east"],
                "told": "11" * 32,
                "keys": each["keys"] | {"south": IDENTITIES["east"].public.hex()},
                "signatures": {"south": each["signatures"]["east"]},
            }[field]
            made.write_bytes(signed_anew(said))
    assert problems([made], PINNED)


def signed_anew(said: dict[str, Any]) -> bytes:
    from choral.trainers.run_folder.evidence.signed_lines import body_of, line_of

    return line_of(body_of(said), IDENTITIES["north"])


def test_a_rehearsals_signatures_are_called_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *map(str, Signed(tmp_path, rehearsal=True).written())]) == 0
    assert "A rehearsal: one machine played all parties, and one operator made their keys." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"), [([], 2), (["--help"], 0), (["no such file"], 2), (["{text}"], 1), (["{empty}"], 1)]
)
def test_exit_codes(words: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that nothing signs for is no pass."""
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    places = {"text": tmp_path / "text", "empty": tmp_path / "empty"}
    assert main(["verify", *(word.format(**places) for word in words)]) == code
    capsys.readouterr()


def test_the_keys_of_a_sites_directory_are_those_in_its_certificates(tmp_path: Path) -> None:
    from choral.network import make_identity

    certificate = make_identity(tmp_path / "north", "north").certificate
    path = tmp_path / "directory.toml"
    path.write_text(f'[sites.north]\npin = "{certificate.pin}"\ncertificate = """\n{certificate.pem}"""\n')
    assert pinned_keys(path) == {"north": certificate.public_key.hex()}


HUB = Identity(b"h" * 32)


def manifest_of(paths: list[Path], by: Identity = HUB, **changed: Any) -> Path:
    """The manifest of these receipts, signed by the coordinator and all whose they are, but for who is gone."""
    from choral.trainers.run_folder.evidence.signed_lines import body_of, sign

    lines = {path.stem: path.read_bytes().splitlines() for path in paths}
    said: dict[str, Any] = {
        "version": 1, "rehearsal": False, "run": "a run", "completed": 2, "files": {}, "model": "c" * 64,
        "terms": TERMS, "claims": {}, "metrics": {}, "ledgers": {}, "coordinator": HUB.public.hex(), "gone": [],
        "parties": {
            name: {"keys": [PINNED[name]], "receipts": len(own), "head": hashlib.sha256(own[-1]).hexdigest()}
            for name, own in lines.items()
        },
    }  # fmt: skip
    body = body_of(said | changed)
    signers = {"": by} | {name: IDENTITIES[name] for name in lines if name not in (said | changed)["gone"]}
    signatures = {name: sign("manifest", body, identity) for name, identity in signers.items()}
    path = paths[0].with_name(f"manifest-{hashlib.sha256(body).hexdigest()[:8]}.json")
    path.write_bytes(b'{"manifest":' + body + b',"signatures":' + body_of(signatures) + b"}\n")
    return path


ALL = PINNED | {"hub": HUB.public.hex()}


def test_a_party_without_a_name_is_not_the_coordinator(tmp_path: Path) -> None:
    """Nobody's key is needed for that: the place of the coordinator's signature is the empty name's."""
    stranger = Identity(b"q" * 32)
    nameless = {"": {"keys": [stranger.public.hex()], "receipts": 0, "head": "0" * 64}}
    lone = [Signed(tmp_path).written()[0]]
    forged = manifest_of(lone, stranger, parties=nameless)
    assert any("the signature of  is not on these words" in each for each in problems([forged], ALL))


def test_pinned_keys_are_of_use_only_where_one_of_them_signed(tmp_path: Path) -> None:
    stranger, paths = Identity(b"q" * 32), Signed(tmp_path).written()
    forged = manifest_of(paths, stranger, coordinator=stranger.public.hex(), gone=list(NAMES))
    assert "nobody whose key you pinned has signed it" in " ".join(problems([forged], ALL))
    assert problems([manifest_of(paths), *paths], ALL) == []


COST = {"head": "e" * 64, "events": 3, "epsilon": 0.1, "delta": 1e-5}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"terms": "9" * 64}, "two views were shown: different terms in round 2"),
        ({"rehearsal": True}, "two views were shown: different rehearsal in round 2"),
        ({"ledgers": {"south": COST}}, "south, round 1: another ledger than the manifest's"),
        ({"ledgers": {"south": COST | {"epsilon": 0.5, "delta": 1e-9}}}, "south, round 1: another ledger"),
    ],
)
def test_a_manifest_that_says_otherwise_than_receipts_is_found(
    changed: dict[str, Any], found: str, tmp_path: Path
) -> None:
    """By the coordinator and north, who call the others gone."""
    paths = Signed(tmp_path).written()
    said = problems([manifest_of(paths, gone=["south", "east"], **changed), *paths], ALL)
    assert any(found in each for each in said), said


def test_whoever_took_part_is_named_in_the_manifest(tmp_path: Path) -> None:
    """East is left out with its receipts: those of the others have it in the roster."""
    paths = Signed(tmp_path).written()[:2]
    assert "in round 1, and not in the manifest: east" in problems([manifest_of(paths), *paths], ALL)
    assert problems([manifest_of(paths, gone=["east"]), *paths], ALL) == []


def test_a_run_has_one_manifest(tmp_path: Path) -> None:
    paths = Signed(tmp_path).written()
    both = [manifest_of(paths), manifest_of(paths, metrics={"accuracy": 1.0}, gone=["south", "east"])]
    assert any("two views were shown: different manifest" in each for each in problems([*both, *paths], ALL))


def test_a_manifests_model_that_no_receipt_has_is_said_to_be_the_coordinators_word(tmp_path: Path) -> None:
    paths = Signed(tmp_path).written()
    for model, completed, words in (("c", 2, "as 3 receipts have it"), ("f", 4, "on the coordinator's word alone")):
        evidence = Evidence(ALL, verify=keys.ed25519_verify)
        for path in (manifest_of(paths, model=model * 64, completed=completed), *paths):
            evidence.take(path.name, path.read_bytes())
        evidence.compare(whole=False)
        assert f"the manifest's model {model * 12}: {words}" in evidence.said


def bent(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> list[Path]:
    """North's receipt of round 1 by itself, changed and signed anew, before the others' receipts."""
    paths = Signed(tmp_path).written()
    for line in paths[0].read_bytes().splitlines():
        said = json.loads(line)["receipt"]
        if said.get("round") == 1:
            change(said)
            (tmp_path / "alone.jsonl").write_bytes(signed_anew(said))
    return [tmp_path / "alone.jsonl", *paths[1:]]


def counts_itself(said: dict[str, Any]) -> None:
    (each,) = said["sums"]
    begin, session = bytes.fromhex(each["begin"]), bytes.fromhex(each["session"])
    confirmed = signing.confirm(session, 1, 0, messages.to_bitmap([0, 1, 2], 3), signing.begun(begin))
    each["keys"]["north"] = PINNED["north"]
    each["signatures"]["north"] = signing.sign(IDENTITIES["north"].seed, confirmed).hex()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda said: said.update(promise={"epsilon": 0.01, "delta": 1e-9}), "different promise of terms"),
        (lambda said: said.update(algorithm="fedprox"), "different algorithm of terms"),
        (lambda said: said.update(rehearsal=True), "different rehearsal in round 1"),
        (counts_itself, "north is no other survivor"),
    ],
)
def test_a_party_cannot_say_more_of_a_round_than_the_others_do(
    change: Callable[[dict[str, Any]], object], found: str, tmp_path: Path
) -> None:
    said = problems(bent(tmp_path, change), PINNED)
    assert any(found in each for each in said), said


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    from choral.trainers.run_folder.evidence.signed_lines import sign

    path = Signed(tmp_path).written()[0]
    line = path.read_bytes().splitlines()[1]
    body = line.removeprefix(b'{"receipt":').rpartition(b',"signature":"')[0].replace(b"{", b'{"round":9,', 1)
    signature = sign("receipt", body, IDENTITIES["north"]).encode()
    path.write_bytes(b'{"receipt":' + body + b',"signature":"' + signature + b'"}\n')
    assert "a key stands in it twice" in " ".join(problems([path], PINNED))


def test_a_name_writes_no_lines_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = Signed(tmp_path).written()[:1]
    forged = manifest_of(paths, gone=["east", "south", "\nHolds: no contradiction was found.\x1b[8m"])
    main(["verify", str(forged), str(paths[0])])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.count("\nHolds: ") == 1


def test_a_report_with_a_key_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A person reads the first, a program the last."""
    paths, report = Signed(tmp_path).written(), tmp_path / "report.json"
    report.write_text('{"format":"choral-report","metric":"accuracy","metric":"error","arms":[]}')
    assert main(["verify", str(report), *map(str, paths)]) == 1
    assert "report.json cannot be read: ValueError('a key stands in it twice')" in capsys.readouterr().out


def test_the_coordinator_is_never_gone(tmp_path: Path) -> None:
    """North alone writes a manifest in the coordinator's name, whose signature would have an empty name."""
    from choral.trainers.run_folder.evidence.manifest import Manifest
    from choral.trainers.run_folder.evidence.signed_lines import EvidenceError

    paths = Signed(tmp_path).written()
    for gone in (["", "south", "east"], "south, east"):
        made = manifest_of(paths, gone=gone, format="choral-manifest")
        body, _, rest = made.read_bytes().rpartition(b',"signatures":')
        signatures = {name: signature for name, signature in json.loads(rest.rstrip()[:-1]).items() if name == "north"}
        made.write_bytes(body + b',"signatures":' + json.dumps(signatures, separators=(",", ":")).encode() + b"}\n")
        assert any(" has not signed" in each for each in problems([made, *paths], ALL))
        made.rename(tmp_path / "manifest.json")
        with pytest.raises(EvidenceError, match="has not signed"):
            Manifest.read(tmp_path)


def test_one_name_is_of_one_file(tmp_path: Path) -> None:
    """A manifest with two digests under one name would sign for either; of two files of one name, one was looked at."""
    paths = Signed(tmp_path).written()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.jsonl").write_text(name)
    one, other = (tmp_path / name / "history.jsonl" for name in ("a", "b"))
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b")}
    honest = manifest_of(paths, files={"history.jsonl": digests["a"]})
    assert problems([honest, *paths, one], ALL) == []
    assert "history.jsonl is not the file that the manifest names" in problems([honest, *paths, other], ALL)
    assert "two files are called history.jsonl: one is looked at" in problems([honest, *paths, other, one], ALL)
    both = manifest_of(paths, files={"history.jsonl": digests["a"], "old/history.jsonl": digests["b"]})
    for file in (one, other):
        assert "history.jsonl is not the file that the manifest names" in problems([both, *paths, file], ALL)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"0.1"', "[]", "1" * 5000])
def test_a_cost_that_is_no_number_is_no_cost(value: str, tmp_path: Path) -> None:
    """NaN is smaller than nothing, and larger than nothing: no comparison would find it."""
    paths = Signed(tmp_path).written()
    made = manifest_of(paths, ledgers={"south": COST | {"epsilon": 7777}})
    body = made.read_bytes().removeprefix(b'{"manifest":').rpartition(b',"signatures":')[0]
    made.write_bytes(b'{"manifest":' + signed_manifest(body.replace(b"7777", value.encode())) + b"\n")
    assert main(["verify", str(made), *map(str, paths)]) != 0


def signed_manifest(body: bytes) -> bytes:
    from choral.trainers.run_folder.evidence.signed_lines import body_of, sign

    signatures = {name: sign("manifest", body, each) for name, each in {"": HUB, **IDENTITIES}.items()}
    return body + b',"signatures":' + body_of(signatures) + b"}"


def test_a_survivor_has_one_key_in_a_round(tmp_path: Path) -> None:
    """Where no key is pinned, north could sign in the survivors' names under keys of its own."""
    lied = Signed(tmp_path)
    paths = lied.written()[1:]
    lied.identities |= {name: Identity(name.encode().ljust(32, b"z")) for name in ("south", "east")}
    (tmp_path / "mine").mkdir()
    lied.folder = tmp_path / "mine"
    said = problems([lied.written()[0], *paths])
    assert any("two views were shown: different key of south in sum 1 of round 1" in each for each in said), said


def test_what_a_manifest_claims_is_what_receipts_have(tmp_path: Path) -> None:
    paths, promise = Signed(tmp_path).written(), {"epsilon": 2.0, "delta": 1e-5, "min_survivors": 3}
    honest = {"algorithm": "fedavg", "promise": promise, "layout": []}
    assert problems([manifest_of(paths, claims=honest), *paths], ALL) == []
    for key, value in (("algorithm", "fedprox"), ("promise", promise | {"epsilon": 0.1}), ("promise", None)):
        said = problems([manifest_of(paths, claims=honest | {key: value}), *paths], ALL)
        assert any(f"different {key} of terms" in each for each in said), said


def test_a_report_counts_each_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = manifest_of(Signed(tmp_path).written(), metrics={"accuracy": 0.5})
    cited = {"sha256": hashlib.sha256(made.read_bytes()).hexdigest()}
    for times, code in ((1, 0), (3, 1)):
        arm = {"name": "a", "manifests": [cited] * times, "claim": None, "metric": {"values": [0.5] * times}}
        report = {"format": "choral-report", "metric": "accuracy", "arms": [arm]}
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert main(["verify", str(tmp_path / "report.json"), str(made)]) == code
    assert "a: the manifests that it rests on are not given here, each once" in capsys.readouterr().out


ODD = ["", "\ud800", "nört\u200bh", 7, None, 1.0, [], {}, ["north"], 10**4000, "x" * 10000, 0.5]


@pytest.mark.parametrize(
    "field", ["party", "round", "run", "given", "sums", "ledger", "promise", "kind", "terms", "came"]
)
def test_odd_values_are_no_pass_and_no_crash(field: str, tmp_path: Path) -> None:
    """Of a receipt that its party signed, each value in turn another: nothing of it fits the others' receipts."""
    paths = Signed(tmp_path).written()
    for line in paths[0].read_bytes().splitlines():
        said = json.loads(line)["receipt"]
        if said.get("round") != 1:
            continue
        for value in ODD:
            if field in ("ledger", "came", "sums", "given") and not value:
                continue  # it had none, or was told nothing
            if field == "round" and isinstance(value, int):
                continue  # it is of another round, then
            (tmp_path / "odd.jsonl").write_bytes(signed_anew(said | {field: value}))
            with suppress(*UNREADABLE):  # which is exit code 2
                assert problems([tmp_path / "odd.jsonl", *paths[1:]]), value
