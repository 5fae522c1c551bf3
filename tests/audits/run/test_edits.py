"""A zoo of edits of what a run leaves behind: each is found and named by verify.py or by the audit, or is listed in
docs/evidence.md as what nothing here can find. One small run, edited in copies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Keep, Masked, audit, centralize, compare, federate
from choral.audits.run.signed_checks import _model, _of_receipts, signed_checks
from choral.privacy import Privacy
from choral.privacy.ledgers.hash_chain import GENESIS, lines
from choral.protocols.crypto.identity import Identity
from choral.protocols.crypto.keys import ed25519_verify
from choral.trainers import Run, RunFolderError, Task
from choral.trainers.run_folder.evidence import sealing
from choral.trainers.run_folder.evidence.signed_lines import body_of, line_of, parsed, sign
from choral.verify import KINDS, Evidence

NAMES = ("north", "south", "east", "west")
Edit = Callable[["Zoo"], object]


def dataset(name: str) -> TensorDataset:
    points = torch.randn(30, 4, generator=torch.Generator().manual_seed(NAMES.index(name)))
    return TensorDataset(points, (points.sum(1) > 0).long())


def build(data: Any) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=10, shuffle=True)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        optimizer.step()


def evaluate(model: nn.Module) -> float:
    return (model(torch.eye(4)).argmax(1) == 1).float().mean().item()


PRIVATE: dict[str, Any] = {"rounds": 3, "privacy": Privacy(epsilon=4.0, delta=1e-3)}
TASK = Task(build=build, fit=fit, evaluate=evaluate)


class Zoo:
    """The folder of a run with its keys, which an editor may have: run, and beside it another and a report of both."""

    def __init__(self, base: Path, identities: dict[str, Identity], coordinator: Identity) -> None:
        self.base, self.run, self.other = base, base / "run", base / "other"
        self.identities, self.coordinator = identities, coordinator

    # ------------------------------------------------------------------------------------------------ ways of editing
    def text(self, name: str, old: str, new: str) -> None:
        path = self.run / name
        raw = path.read_text("utf-8")
        assert old in raw, (name, old)
        path.write_text(raw.replace(old, new), "utf-8")

    def json(self, name: str, change: Callable[[Any], object]) -> None:
        found = json.loads((self.base / name).read_bytes())
        change(found)
        (self.base / name).write_text(json.dumps(found, indent=1))

    def history(self, change: Callable[[list[dict[str, Any]]], object]) -> None:
        path = self.run / "history.jsonl"
        entries = [json.loads(line) for line in path.read_bytes().splitlines()]
        change(entries)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def ledger(self, name: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """With fresh hashes."""
        path = self.run / "ledger" / f"{name}.jsonl"
        entries = [json.loads(line)["entry"] for line in path.read_bytes().splitlines()]
        change(entries)
        path.write_bytes(lines(GENESIS, entries)[0])

    def model(self, name: str = "model.safetensors", *, double: bool = False) -> None:
        path = self.run / name
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        state["bias"] = state["bias"] + 0.25
        save_file({key: each.double() if double else each for key, each in state.items()}, path, metadata)

    def receipts(self, name: str, change: Callable[[list[bytes]], object]) -> None:
        path = self.run / "receipts" / f"{name}.jsonl"
        found = path.read_bytes().splitlines()
        change(found)
        path.write_bytes(b"".join(line + b"\n" for line in found))

    def receipt(self, name: str, change: Callable[[dict[str, Any]], object], number: int = 2, **key: Any) -> None:
        """A receipt changed, and all from there signed and chained anew; key: by whom, if not by the party."""
        made: list[bytes] = []
        for line in (self.run / "receipts" / f"{name}.jsonl").read_bytes().splitlines():
            said, _, _ = parsed(line)
            identity = key.get("identity", self.identities[name])
            if said.get("round") == number:
                change(said)
            said |= {"previous": hashlib.sha256(made[-1]).hexdigest() if made else "0" * 64}
            made.append(line_of(body_of(said | {"key": identity.public.hex()}), identity))
        (self.run / "receipts" / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in made))

    def manifest(
        self,
        change: Callable[[dict[str, Any]], object],
        *,
        by: tuple[str, ...] | None = (),
        coordinator: Identity | None = None,
    ) -> None:
        """by: whose keys sign it anew ("" the coordinator's, or another's); None, nobody: the signatures stay."""
        path = self.run / "manifest.json"
        body, _, rest = path.read_bytes().rstrip().removeprefix(b'{"manifest":').rpartition(b',"signatures":')
        said, signatures = json.loads(body), json.loads(rest[:-1])
        change(said)
        body = body_of(said)
        keys = {"": coordinator or self.coordinator} | self.identities
        for name in by or ():
            signatures[name] = sign("manifest", body, keys[name])
        if by:
            signatures = {name: made for name, made in signatures.items() if name not in said["gone"]}
            signatures = {name: made for name, made in signatures.items() if name in {"", *said["parties"]}}
        path.write_bytes(b'{"manifest":' + body + b',"signatures":' + body_of(signatures) + b"}\n")

    def rehash(self, *, by: tuple[str, ...] | None, also: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
        """The manifest with the digests that the edited files have now."""
        from choral.trainers.run_folder.evidence.manifest import digests

        def change(said: dict[str, Any]) -> None:
            said["files"] = digests(self.run)
            also(said)

        self.manifest(change, by=by)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The honest run, with a transcript; another of it, and one on pooled data; a report of the first and the last."""
    base = tmp_path_factory.mktemp("zoo")
    found: dict[str, Any] = {}
    seal, write = sealing.seal, sealing.write_manifest
    with pytest.MonkeyPatch.context() as patched:
        from choral.trainers.federated import session

        def sealed(run: Run, rehearsal: Any = None, elsewhere: Any = None) -> None:
            found["identities"] = rehearsal.identities
            seal(run, rehearsal, elsewhere)

        def written(folder: Path, said: Any, coordinator: Identity, *, rehearsal: bool) -> None:
            found["coordinator"] = coordinator
            write(folder, said, coordinator, rehearsal=rehearsal)

        patched.setattr(session, "seal", sealed)
        patched.setattr(sealing, "write_manifest", written)
        parties = {name: dataset(name) for name in NAMES}
        runs = {}
        for name, rounds in (("other", 2), ("run", 3)):
            keep = Keep(out=base / name, transcript="digests")
            runs[name] = federate(TASK, parties, secure_sum=Masked(), keep=keep, **PRIVATE | {"rounds": rounds})
        identities, coordinator = found["identities"], found["coordinator"]
    runs["cloud"] = centralize(TASK, parties, keep=Keep(out=base / "cloud"), **PRIVATE)
    compare({"cloud-dp": runs["cloud"], "federated-dp": runs["run"]}).save(base / "report.json")
    return Zoo(base, identities, coordinator)


@pytest.fixture
def zoo(kept: Zoo, tmp_path: Path) -> Iterator[Zoo]:
    copy = tmp_path / "zoo"
    shutil.copytree(kept.base, copy)
    yield Zoo(copy, kept.identities, kept.coordinator)
    shutil.rmtree(copy)


def verified(zoo: Zoo, pinned: dict[str, str] | None = None, *, report: bool = False) -> list[str]:
    """What verify.py says of the run's folder, or of the report beside the manifests."""
    evidence = Evidence(pinned, verify=ed25519_verify)
    if report:
        paths = [zoo.base / "report.json", zoo.run / "manifest.json", zoo.base / "cloud" / "manifest.json"]
    else:
        paths = [path for kind in KINDS for path in sorted(zoo.run.glob(kind))]
    for path in paths:
        name = path.name if report else path.relative_to(zoo.run).as_posix()
        evidence.take(name, path.read_bytes())
    evidence.compare(whole=not report)
    return evidence.problems


def audited(zoo: Zoo) -> list[str]:
    """What the audit says of what was signed; without its accountants, which take seconds."""
    return [check.finding for check in signed_checks(Run.load(zoo.run)) if check.verdict != "holds"]


def test_the_honest_run_and_report_hold(zoo: Zoo) -> None:
    pinned = {name: identity.public.hex() for name, identity in zoo.identities.items()}
    assert verified(zoo, pinned) == []
    assert verified(zoo, report=True) == []
    found = audit(zoo.run)
    assert found.verdict == "holds"
    assert found.manifest is not None
    assert (found.manifest.signed, found.manifest.gone, found.manifest.rehearsal) == (5, (), True)
    assert "Manifest" not in [entry.name for entry in found.not_run]


def set_to(*path: Any, to: Any) -> Callable[[Any], object]:
    """A change of what lies at a path. to: a value, or a function of the old one."""

    def change(found: Any) -> None:
        for step in path[:-1]:
            found = found[step]
        found[path[-1]] = to(found[path[-1]]) if callable(to) else to

    return change


def half(value: float) -> float:
    return value / 2


NOT_NAMED = "run.json is not the file that the manifest names"
RUN_JSON: dict[str, Edit] = {
    "claims half the cost": lambda z: z.json("run/run.json", set_to("spent", "north", "epsilon", to=half)),
    "claims twice the noise": lambda z: z.json("run/run.json", set_to("spent", "east", "noise_multiplier", to=9.0)),
    "claims another delta": lambda z: z.json("run/run.json", set_to("spent", "west", "delta", to=1e-9)),
    "promises less": lambda z: z.json("run/run.json", set_to("privacy", "epsilon", to=1.0)),
    "promises another delta": lambda z: z.json("run/run.json", set_to("privacy", "delta", to=1e-7)),
    "leaves a party out": lambda z: z.json("run/run.json", lambda found: found["parties"].pop("west")),
    "ten times the records": lambda z: z.json("run/run.json", set_to("parties", "north", to=300)),
    "withstands more colluders": lambda z: z.json("run/run.json", set_to("secure_sum", "corrupt", to=3)),
    "sums more at least": lambda z: z.json("run/run.json", set_to("secure_sum", "min_survivors", to=4)),
    "tells of no transcript": lambda z: z.json("run/run.json", set_to("transcript", to=None)),
    "another seed": lambda z: z.json("run/run.json", set_to("seed", to=7)),
    "another algorithm": lambda z: z.json("run/run.json", set_to("algorithm", "kind", to="fedprox")),
    "other versions": lambda z: z.json("run/run.json", set_to("versions", "choral", to="9")),
}


@pytest.mark.parametrize("edit", RUN_JSON.values(), ids=RUN_JSON)
def test_an_edit_of_run_json_is_found(edit: Edit, zoo: Zoo) -> None:
    edit(zoo)
    assert NOT_NAMED in verified(zoo)
    assert any("run.json is another" in each for each in audited(zoo))


def lower(history: list[dict[str, Any]]) -> None:
    for entry in history[1:]:
        entry["epsilon"] /= 2


FILES: dict[str, tuple[Edit, str]] = {
    "a better result": (lambda z: z.history(set_to(3, "metrics", "accuracy", to=1.0)), "history.jsonl is not the file"),
    "a better round before": (lambda z: z.history(set_to(1, "metrics", "accuracy", to=1.0)), "history.jsonl is not"),
    "more survivors": (lambda z: z.history(set_to(2, "survivors", to=3)), "history.jsonl is not the file"),
    "less spent on the way": (lambda z: z.history(lower), "history.jsonl is not the file"),
    "fewer bytes": (lambda z: z.history(set_to(2, "bytes_up", to=1)), "history.jsonl is not the file"),
    "the weights moved": (lambda z: z.model(), "model.safetensors is not the file"),
    "the best weights moved": (lambda z: z.model("best.safetensors"), "best.safetensors is not the file"),
    "another run's model": (
        lambda z: shutil.copy(z.other / "model.safetensors", z.run / "model.safetensors"),
        "model.safetensors is not the model that came of the last round",
    ),
    "the model taken away": (lambda z: (z.run / "best.safetensors").unlink(), "missing here: best.safetensors"),
    "a file added": (lambda z: save_file({"x": torch.ones(1)}, z.run / "extra.safetensors"), "nothing that is given"),
    "noise doubled in a ledger": (
        lambda z: z.ledger("north", lambda e: [set_to("noise_multiplier", to=9.0)(x) for x in e[2:]]),
        "ledger/north.jsonl is not the file",
    ),
    "a ledger without its last event": (lambda z: z.ledger("south", lambda e: e.pop()), "south.jsonl is not the file"),
    "a ledger put back": (lambda z: z.ledger("south", lambda e: e.__delitem__(slice(3, None))), "south.jsonl is not"),
    "an event more": (lambda z: z.ledger("east", lambda e: e.append(e[-1])), "ledger/east.jsonl is not the file"),
    "another delta in a ledger": (lambda z: z.ledger("west", set_to(0, "delta", to=1e-9)), "west.jsonl is not the"),
    "fewer steps in each event": (
        lambda z: z.ledger("west", lambda e: [set_to("steps", to=1)(x) for x in e[2:]]),
        "ledger/west.jsonl is not the file",
    ),
    "two ledgers exchanged": (
        lambda z: shutil.copy(z.run / "ledger" / "north.jsonl", z.run / "ledger" / "south.jsonl"),
        "ledger/south.jsonl is not the file",
    ),
    "a ledger taken away": (lambda z: (z.run / "ledger" / "north.jsonl").unlink(), "missing here: ledger/north.jsonl"),
    "another run's ledger": (
        lambda z: shutil.copy(z.other / "ledger" / "north.jsonl", z.run / "ledger" / "north.jsonl"),
        "ledger/north.jsonl is not the file",
    ),
}


@pytest.mark.parametrize(("edit", "found"), FILES.values(), ids=FILES)
def test_an_edit_of_a_file_is_found(edit: Edit, found: str, zoo: Zoo) -> None:
    edit(zoo)
    assert any(found in each for each in verified(zoo)), verified(zoo)


def everything_rewritten(z: Zoo) -> None:
    """Ledgers, costs and history for twice the noise, consistent with each other."""
    for name in NAMES:
        z.ledger(name, lambda e: [set_to("noise_multiplier", to=half)(x) for x in e[2:]])
        z.json("run/run.json", set_to("spent", name, "epsilon", to=1.0))
    z.history(lower)


def swap(found: list[bytes]) -> None:
    found[1], found[2] = found[2], found[1]


def gone(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        said["gone"] = list(names)

    return change


def with_head(z: Zoo, name: str) -> Callable[[dict[str, Any]], None]:
    """The manifest told of the receipts that are there now."""

    def change(said: dict[str, Any]) -> None:
        found = (z.run / "receipts" / f"{name}.jsonl").read_bytes().splitlines()
        said["parties"][name] |= {"receipts": len(found), "head": hashlib.sha256(found[-1]).hexdigest()}

    return change


STRANGER = Identity(b"z" * 32)
SIGNED: dict[str, tuple[Edit, str]] = {
    "a receipt's promise": (
        lambda z: z.receipts("north", lambda f: f.__setitem__(2, f[2].replace(b'"epsilon":4.0', b'"epsilon":1.0'))),
        "the signature of north is not on these words",
    ),
    "a receipt of another round": (
        lambda z: z.receipts("north", lambda f: f.__setitem__(2, f[2].replace(b'"round":2', b'"round":3'))),
        "the signature of north is not on these words",
    ),
    "a signature": (
        lambda z: z.receipts("east", lambda f: f.__setitem__(1, f[1][:-4] + b'ff"}')),
        "the signature of east is not on these words",
    ),
    "a receipt left out": (lambda z: z.receipts("south", lambda f: f.pop(2)), "receipts before it are missing"),
    "the last receipt left out": (lambda z: z.receipts("south", lambda f: f.pop()), "south are not those that the man"),
    "the terms left out": (lambda z: z.receipts("south", lambda f: f.pop(0)), "receipts of south are not those"),
    "receipts exchanged": (lambda z: z.receipts("west", swap), "receipts before it are missing"),
    "receipts twice": (lambda z: z.receipts("west", lambda f: f.append(f[-1])), "different receipt of west of round 3"),
    "a party's receipts taken away": (lambda z: (z.run / "receipts" / "east.jsonl").unlink(), "missing here: east"),
    "receipts of another run": (
        lambda z: shutil.copy(z.other / "receipts" / "east.jsonl", z.run / "receipts" / "east.jsonl"),
        "two views were shown: different run of the receipts",
    ),
    "a receipt of another run among them": (
        lambda z: z.receipts(
            "east", lambda f: f.append((z.other / "receipts" / "east.jsonl").read_bytes().splitlines()[-1])
        ),
        "receipts before it are missing, or added",
    ),
    "north's receipts under another name": (
        lambda z: shutil.copy(z.run / "receipts" / "north.jsonl", z.run / "receipts" / "west.jsonl"),
        "different receipt of north of round 1",
    ),
    "a receipt forged by a stranger": (
        lambda z: z.receipt("north", set_to("ledger", "epsilon", to=0.1), identity=STRANGER),
        "the receipts of north are not those that the manifest names",
    ),
    "a party that changes what it signed": (
        lambda z: z.receipt("north", set_to("given", to="00" * 32)),
        "two views were shown: different model after round 1",
    ),
    "a party that denies having been summed": (
        lambda z: z.receipt("north", set_to("sums", 0, "in_sum", to=False)),
        "two views were shown: different presence of north in sum 1 of round 2",
    ),
    "a party that says another was left out": (
        lambda z: z.receipt("north", set_to("sums", 0, "dropped", to=["west"])),
        "is not on these words",
    ),
    "a party that had another ledger": (
        lambda z: z.receipt("north", set_to("ledger", "after", to="11" * 32), number=3),
        "north, round 3: another ledger than the manifest's",
    ),
    "survivors' signatures of another round": (
        lambda z: z.receipt("north", lambda said: said["sums"][0].update(begin=said["sums"][0]["begin"][:-2] + "00")),
        "parties signed another session, model or terms",
    ),
    "digests without a signature": (lambda z: (z.model(), z.rehash(by=None)), "is not on these words"),
    "everything, with fresh hashes": (lambda z: (everything_rewritten(z), z.rehash(by=None)), "is not on these words"),
    "everything, signed by the coordinator": (
        lambda z: (everything_rewritten(z), z.rehash(by=("",))),
        "manifest.json: the signature of north is not on these words",
    ),
    "everything, by coordinator and one party": (
        lambda z: (everything_rewritten(z), z.rehash(by=("", "north"))),
        "manifest.json: the signature of south is not on these words",
    ),
    "a signature taken off": (
        lambda z: z.text("manifest.json", f'"west":"{signature_of(z, "west")}"', f'"nobody":"{"0" * 128}"'),
        "west has not signed",
    ),
    "the coordinator's signature taken off": (
        lambda z: z.text("manifest.json", f'"":"{signature_of(z, "")}",', ""),
        " has not signed",
    ),
    "the others called gone, another model": (
        lambda z: (z.model(), z.rehash(by=("", "north"), also=gone("south", "east", "west"))),
        "model.safetensors is not the model that came of the last round",
    ),
    "the others called gone, another model in the manifest too": (
        lambda z: (
            z.model(),
            z.rehash(by=("", "north"), also=lambda s: (gone("south", "east", "west")(s), s.update(model="00" * 32))),
        ),
        "two views were shown: different model after round 3",
    ),
    "the others called gone, cheaper ledgers": (
        lambda z: (
            z.ledger("south", lambda e: e.pop()),
            z.rehash(
                by=("", "north"),
                also=lambda s: (gone("south", "east", "west")(s), s["ledgers"]["south"].update(events=2, epsilon=1.0)),
            ),
        ),
        "south, round 3: another ledger than the manifest's",
    ),
    "the others called gone, another model of other numbers": (
        lambda z: (z.model(double=True), z.rehash(by=("", "north"), also=gone("south", "east", "west"))),
        "model.safetensors is not the model that came of the last round",
    ),
    "the others called gone, a longer ledger that is cheaper": (
        lambda z: (
            z.ledger("south", lambda e: ([set_to("noise_multiplier", to=9.0)(x) for x in e[2:]], e.append(e[-1]))),
            z.rehash(
                by=("", "north"),
                also=lambda s: (gone("south", "east", "west")(s), s["ledgers"]["south"].update(events=4, epsilon=1.0)),
            ),
        ),
        "south, round 1: another ledger than the manifest's",
    ),
    "the others not even called gone": (
        lambda z: (
            [(z.run / "receipts" / f"{name}.jsonl").unlink() for name in ("south", "east", "west")],
            z.rehash(by=("", "north"), also=lambda s: [s["parties"].pop(name) for name in ("south", "east", "west")]),
        ),
        "in round 1, and not in the manifest: east, south, west",
    ),
    "a party without a name in the coordinator's place": (
        lambda z: z.manifest(
            lambda s: s.update(parties={"": {"keys": [STRANGER.public.hex()], "receipts": 0, "head": "0" * 64}}),
            by=("",),
            coordinator=STRANGER,
        ),
        "manifest.json: the signature of  is not on these words",
    ),
    "the others' receipts left out with them": (
        lambda z: (
            [(z.run / "receipts" / f"{name}.jsonl").unlink() for name in ("south", "east", "west")],
            z.rehash(by=("", "north"), also=gone("south", "east", "west")),
        ),
        "missing here: south, east, west",
    ),
    "the manifest of another run": (
        lambda z: shutil.copy(z.other / "manifest.json", z.run / "manifest.json"),
        "the receipts of north are not those that the manifest names",
    ),
    "one party's receipt and the manifest, by both keys": (
        lambda z: (
            z.receipt("north", set_to("came", to="00" * 32), number=3),
            z.rehash(by=("", "north"), also=lambda s: (gone("south", "east", "west")(s), with_head(z, "north")(s))),
        ),
        "two views were shown: different model after round 3",
    ),
}


def signature_of(zoo: Zoo, name: str) -> str:
    _, _, rest = (zoo.run / "manifest.json").read_bytes().rstrip().rpartition(b',"signatures":')
    return str(json.loads(rest[:-1])[name])


@pytest.mark.parametrize(("edit", "found"), SIGNED.values(), ids=SIGNED)
def test_an_edit_of_what_was_signed_is_found(edit: Edit, found: str, zoo: Zoo) -> None:
    edit(zoo)
    assert any(found in each for each in verified(zoo)), verified(zoo)
    assert audited(zoo)


REPORT: dict[str, tuple[Edit, str]] = {
    "a tenth of the epsilon": (
        lambda z: z.json("report.json", set_to("arms", 1, "claim", "epsilon", to=lambda e: e / 10)),
        "federated-dp: epsilon or results are not those of its manifests",
    ),
    "another delta": (
        lambda z: z.json("report.json", set_to("arms", 1, "claim", "delta", to=1e-9)),
        "federated-dp: epsilon or results are not those of its manifests",
    ),
    "a better result": (
        lambda z: z.json("report.json", set_to("arms", 0, "metric", "values", to=[0.125])),
        "cloud-dp: epsilon or results are not those of its manifests",
    ),
    "the other configuration's manifests": (
        lambda z: z.json("report.json", lambda r: r["arms"][1].update(manifests=r["arms"][0]["manifests"])),
        "federated-dp: epsilon or results are not those of its manifests",
    ),
    "no manifests": (lambda z: z.json("report.json", set_to("arms", 1, "manifests", to=[])), "not given here"),
    "manifests that nobody has": (
        lambda z: z.json("report.json", set_to("arms", 1, "manifests", 0, "sha256", to="00" * 32)),
        "the manifests that it rests on are not given here",
    ),
}


@pytest.mark.parametrize(("edit", "found"), REPORT.values(), ids=REPORT)
def test_an_edit_of_a_report_is_found(edit: Edit, found: str, zoo: Zoo) -> None:
    edit(zoo)
    assert any(found in each for each in verified(zoo, report=True)), verified(zoo, report=True)


def by_strangers(z: Zoo) -> None:
    """Another run of the same settings in the place of this one, whole: its files fit together."""
    shutil.rmtree(z.run)
    shutil.copytree(z.other, z.run)


def test_another_whole_run_in_its_place_is_found_by_pinned_keys_alone(zoo: Zoo) -> None:
    pinned = {name: identity.public.hex() for name, identity in zoo.identities.items()}
    by_strangers(zoo)
    assert verified(zoo) == []
    assert any("the key of north" in each and "is not one that you pinned" in each for each in verified(zoo, pinned))
    assert any("not given here" in each for each in verified(zoo, report=True))  # and by the report that cites it


def without_evidence(z: Zoo) -> None:
    shutil.rmtree(z.run / "receipts")
    (z.run / "manifest.json").unlink()


def test_a_run_without_evidence_is_said_to_be_unbound(zoo: Zoo) -> None:
    without_evidence(zoo)
    found = audit(zoo.run)
    assert found.verdict == "holds"
    assert found.manifest is None
    (unbound,) = (entry for entry in found.not_run if entry.name == "Manifest")
    assert "nothing binds them to each other, or to what was audited" in unbound.would_show
    assert "no receipt and no manifest is among these files" in verified(zoo)


def test_receipts_without_their_manifest_leave_the_run_unverified(zoo: Zoo) -> None:
    (zoo.run / "manifest.json").unlink()
    assert audit(zoo.run).verdict == "unverified"
    assert any("it was taken away" in each for each in audited(zoo))


def made_up(z: Zoo) -> None:
    z.history(set_to(3, "metrics", "accuracy", to=1.0))
    better = {"accuracy": 1.0}
    z.rehash(by=("", "north"), also=lambda s: (gone("south", "east", "west")(s), s.update(metrics=better)))


PASSES: dict[str, Edit] = {
    "all files written anew under other keys, where no key is pinned": by_strangers,
    "a result that the coordinator alone has seen, where it calls the other parties gone": made_up,
    "words and costs of a report": lambda z: z.json("report.json", set_to("title", to="Better than all others")),
    "the page that is drawn of a report": lambda z: (z.base / "report.html").write_text("ε = 0.1"),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_no_signature_finds_stands_in_the_docs(name: str, zoo: Zoo) -> None:
    """The page's list is of edits that do pass here: it says no more than is true, and no less."""
    said = (Path(__file__).parents[3] / "docs" / "evidence.md").read_text("utf-8")
    listed = " ".join(said.partition("## What no signature finds")[2].partition("\n## ")[0].split())
    assert name in listed.lower()
    PASSES[name](zoo)
    whole = name != "all files written anew under other keys, where no key is pinned"
    if name.startswith(("words", "the page")):
        assert verified(zoo, report=True) == []
    assert verified(zoo) == []
    assert not whole or audited(zoo) == []


def test_a_round_more_than_any_receipt_is_of_is_found_by_the_audit(zoo: Zoo) -> None:
    """By coordinator and one party, who call the others gone; verify.py says on whose word the model then is."""
    path = zoo.run / "model.safetensors"
    save_file({key: each + 1 for key, each in load_file(path).items()}, path, {"round": "4"})
    zoo.history(lambda entries: entries.append(entries[-1] | {"round": 4}))
    zoo.json("run/run.json", set_to("rounds", to=4))
    digest = _model(Run.load(zoo.run), ["weight", "bias"])
    others = gone("south", "east", "west")
    zoo.rehash(by=("", "north"), also=lambda s: (others(s), s.update(completed=4, model=digest)))
    assert verified(zoo) == []
    assert any("round 4 has 4 survivors in the history, 0 by receipts" in each for each in audited(zoo))


def test_a_site_that_was_killed_before_it_wrote_its_receipt_is_no_contradiction(zoo: Zoo) -> None:
    """What is lacking may be one receipt for each party that has none, and no other receipt may say otherwise."""
    run, evidence = Run.load(zoo.run), Evidence()
    for path in sorted(zoo.run.glob("receipts/*.jsonl")):
        evidence.take(path.name, path.read_bytes())
    assert _of_receipts(run, evidence) == []
    at = next(each for each in evidence.rounds if each["round"] == 2 and each["sums"][-1]["in_sum"])
    evidence.rounds.remove(at)
    assert any("round 2" in each for each in _of_receipts(run, evidence))  # in one process nobody is killed alone
    at_sites = dataclasses.replace(run, info=msgspec.structs.replace(run.info, sites=tuple(zoo.identities)))
    assert _of_receipts(at_sites, evidence) == []
    entry = run.history[2]
    for survivors in (entry.survivors - 1, entry.survivors + 1):
        other = [*run.history[:2], msgspec.structs.replace(entry, survivors=survivors), *run.history[3:]]
        assert any("round 2" in each for each in _of_receipts(dataclasses.replace(at_sites, history=other), evidence))


def test_a_key_that_stands_twice_in_run_json_is_refused(zoo: Zoo) -> None:
    zoo.text("run.json", '"epsilon":', '"epsilon": 0.1, "epsilon":')
    zoo.rehash(by=("", "north"), also=gone("south", "east", "west"))
    assert any("run.json cannot be read: ValueError('a key stands" in each for each in verified(zoo))
    with pytest.raises(RunFolderError, match="a key stands in it twice"):
        audited(zoo)


@pytest.mark.parametrize("cost", ["4.0", {"epsilon": "4.0"}, None, 7])
def test_what_is_signed_and_of_another_type_is_no_pass(cost: Any, zoo: Zoo) -> None:
    others = gone("south", "east", "west")
    zoo.manifest(lambda s: (others(s), s["ledgers"].update(south=cost)), by=("", "north"))
    assert audited(zoo)


def test_the_zoo_has_sixty_edits() -> None:
    assert len(RUN_JSON) + len(FILES) + len(SIGNED) + len(REPORT) + len(PASSES) >= 60
