"""Check what a federated training left behind: receipts, manifests, and the files that they name. One file, offline.

    python verify.py FILE_OR_FOLDER... [--keys KEYS]          (or: choral verify ...)

KEYS: public keys that you know by another way, names with 64 hexadecimal digits as JSON or TOML, or a site's
directory.toml. Exit code: 0 holds, 1 something does not hold or cannot be verified, 2 wrong usage, unreadable files.
A receipt (a line of receipts/NAME.jsonl) is what one party signed of one round, a manifest what all signed of a run.
Checked are all signatures, that nobody was shown another view than others, and all files that were signed for."""

import argparse
import json
import ssl
import struct
import sys
import tomllib
from hashlib import sha256, sha512
from pathlib import Path
from typing import Any

KINDS = ("manifest.json", "receipts/*.jsonl", "ledger/*.jsonl", "run.json", "s[it]*.*", "history*", "*.safetensors")
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, struct.error)
CANNOT = """What no signature can show, and so is not shown here:
- that others added the noise that they promised, or trained as they said; a party knows this of itself alone;
- that a model is what came of the sum: its coordinator says so, and has seen it alone;
- that data were real; anything of a run, round, party or file that is not given here, or was never written down;
- who made the files, if keys are not pinned by --keys, or in a rehearsal, where one operator made all keys."""
P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


def add(a: Any, b: Any) -> Any:  # of points, in extended coordinates: x = X / Z, y = Y / Z, T = X Y / Z
    e, f = (a[1] - a[0]) * (b[1] - b[0]) % P, (a[1] + a[0]) * (b[1] + b[0]) % P
    g, h = 2 * a[3] * b[3] * D % P, 2 * a[2] * b[2] % P
    return (f - e) * (h - g) % P, (h + g) * (f + e) % P, (h - g) * (h + g) % P, (f - e) * (f + e) % P


def times(k: int, a: Any) -> Any:
    rest = times(k >> 1, add(a, a)) if k else (0, 1, 1, 0)
    return add(rest, a) if k & 1 else rest


def point(raw: bytes) -> Any:  # none for a y that is not below p, or that is of no point (5.1.3)
    y, sign = int.from_bytes(raw, "little") & (1 << 255) - 1, raw[31] >> 7
    u, v = (y * y - 1) % P, (D * y * y + 1) % P
    x = u * v**3 * pow(u * v**7, (P - 5) // 8, P) % P
    x = x if v * x * x % P == u else x * pow(2, (P - 1) // 4, P) % P
    wrong, x = y >= P or v * x * x % P != u or (x == 0 and sign), x if x & 1 == sign else P - x
    return None if wrong else (x, y, 1, x * y % P)


def ed25519(key: bytes, message: bytes, signature: bytes) -> bool:
    """RFC 8032, 5.1.7: whether [S]B = R + [k]A, without cofactor, for a key that is not of small order and S < L."""
    a, r, base = (point(each.ljust(32, b"\xff")) for each in (key, signature[:32], b"\x58" + 31 * b"\x66"))
    s = int.from_bytes(signature[32:], "little")
    if not a or not r or not base or (len(key), len(signature)) != (32, 64) or s >= L or times(8, a)[0] == 0:
        return False
    k = int.from_bytes(sha512(signature[:32] + key + message).digest(), "little") % L
    x, y, z, t = add(r, times(k, a))
    zero = add(times(s, base), (-x, y, z, -t))
    return bool(zero[0] == 0 == (zero[1] - zero[2]) % P)


def once(pairs: list[tuple[str, Any]]) -> Any:  # of a key that stands twice, readers take either
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def parsed(raw: bytes | str) -> Any:  # NaN, which is not larger than anything, is no int
    return json.loads(raw, object_pairs_hook=once, parse_constant=int)


def framed(label: bytes, *parts: bytes | int) -> bytes:  # what parties sign in a secure sum
    raw = [each.to_bytes(8, "little") if isinstance(each, int) else each for each in (b"choral/2/" + label, *parts)]
    return sha256(b"".join(len(each).to_bytes(8, "little") + each for each in raw)).digest()


class Evidence:
    """pinned: name -> key. verify: as `ed25519`. problems: what does not hold. said: what is shown, in words."""

    def __init__(self, pinned: dict[str, str] | None = None, verify: Any = ed25519) -> None:
        self.pinned, self.verify, self.problems, self.said = pinned, verify, list[str](), list[str]()
        self.rounds, self.files = list[Any](), dict[str, Any]()  # receipts; what is no evidence itself
        self.heads = dict[tuple[str, str], list[Any]]()  # (run, party): lines, digest of the last, its key
        self.shapes, self.manifests = dict[str, list[Any]](), dict[str, Any]()  # of the terms; by SHA-256
        self.views = dict[tuple[str, str], dict[str, list[str]]]()  # (run, of what): each view of it, and who has it

    def wrong(self, what: str, *, when: bool = True) -> None:
        self.problems += [what] if when and what not in self.problems else []

    def tell(self, who: str, run: str, facts: Any) -> None:  # to be held against what others tell
        for what, value in facts.items():
            if value not in (None, ""):  # who was told nothing
                self.views.setdefault((run, what), {}).setdefault(json.dumps(value, sort_keys=True), []).append(who)

    def tell_terms(self, who: str, run: str, terms: str, algorithm: str, promise: Any) -> None:
        self.tell(who, run, {f"algorithm of terms {terms}": algorithm, f"promise of terms {terms}": promise or {}})

    def check(self, where: str, who: str, key: str, message: bytes, signature: str, *, pin: bool = True) -> None:
        valid = self.verify(bytes.fromhex(key), message, bytes.fromhex(signature))
        self.wrong(f"{where}: the signature of {who} is not on these words: edited, or forged", when=not valid)
        strange = pin and self.pinned is not None and self.pinned.get(who) != key
        self.wrong(f"{where}: the key of {who}, {key[:16]}..., is not one that you pinned", when=strange)

    def take(self, name: str, raw: bytes) -> None:
        try:
            if raw.startswith(b'{"receipt":'):
                for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), 1):
                    self.take_receipt(f"{name}, line {number}", line, number)
            elif raw.startswith(b'{"manifest":'):
                self.take_manifest(name, raw)
            else:
                self.wrong(f"two files are called {name}: one is looked at", when=name in self.files)
                self.files[name] = raw, parsed(raw) if name.endswith(".json") else {}
        except UNREADABLE as error:
            self.wrong(f"{name} cannot be read: {error!r:.80}")

    def take_receipt(self, where: str, line: bytes, number: int) -> None:
        body, _, rest = line.removeprefix(b'{"receipt":').rpartition(b',"signature":"')
        said = parsed(body)
        party, run = said["party"], said["run"]
        self.wrong(f"{where} has another form or version", when=rest[128:] != b'"}' or said["version"] != 1)
        self.check(where, party, said["key"], b"choral receipt 1\n" + body, rest[:128].decode())
        before = self.heads[run, party][1] if number > 1 and (run, party) in self.heads else "0" * 64
        alone = number == 1 and said["kind"] == "round"  # a receipt by itself
        self.wrong(f"{where}: receipts before it are missing, or added", when=said["previous"] != before and not alone)
        self.heads[run, party] = [number, sha256(line).hexdigest(), said["key"]]
        self.tell(party, "", {"run of the receipts": [run]})
        if said["kind"] == "round":
            self.take_round(where, said)
        else:
            text, digest = parsed(said["text"]), sha256(b"choral training terms 1" + said["text"].encode()).hexdigest()
            self.wrong(f"{where}: not the terms", when=digest != said["terms"])
            self.tell_terms("the terms", run, digest, text["algorithm"]["kind"], text["privacy"])
            self.shapes[digest] = text.get("shapes", [])

    def take_round(self, where: str, said: Any) -> None:
        party, run, sums, led = (said[each] for each in ("party", "run", "sums", "ledger"))
        number = said["round"].__index__()  # 1.0 would be another round than 1
        self.rounds.append(said)
        self.tell_terms(party, run, said["terms"], said["algorithm"], said["promise"])
        facts = {f"{field} in round {number}": said[field] for field in ("terms", "rehearsal")}
        facts |= {f"model after round {number - 1}": said["given"], f"model after round {number}": said["came"]}
        self.tell(party, run, facts | {f"receipt of {party} of round {number}": len(self.rounds)})
        for place, each in enumerate(sums, 1):
            self.take_sum(where, said, each, f"sum {place} of round {number}")
        part = "took part in" if sums and all(each["in_sum"] for each in sums) else "is not in the result of"
        signed = min((len(each["signatures"]) for each in sums), default=0)
        by = f"as {signed} other survivors signed" if signed else "on the coordinator's word alone"
        terms = "epsilon {epsilon:g} at delta {delta:g} promised" if said["promise"] else "no privacy promised"
        cost = f"; its ledger: events {led['events']}, epsilon {led['epsilon']} in all" if led else ""
        model = f"given model {said['given'][:12]}, of which came {(said['came'] or 'what it was not told')[:12]}"
        words = f"{said['algorithm']}, {by}; {terms.format(**said['promise'] or {})}; {model}"
        self.said.append(f"{party}, round {number}: {part} {words}{said['failed'] and '; given up'}{cost}")

    def take_sum(self, where: str, said: Any, each: Any, of: str) -> None:
        """The survivors' signatures: on the session, its round, who was summed, and the Begin, with model and terms."""
        begin, session, roster = bytes.fromhex(each["begin"]), bytes.fromhex(each["session"]), each["roster"]
        alive = [name for name in roster if each["dropped"] is not None and name not in each["dropped"]]
        known = ("exchange", "told", "channel", "setup", "session", "begin", "roster")
        facts = {f"{field} in {of}": each[field] for field in known}
        facts |= {f"key of {name} in {of}": key for name, key in each["keys"].items()}
        summed = {name: name in alive for name in (*roster, said["party"]) if roster and each["dropped"] is not None}
        for told in (summed, {said["party"]: each["in_sum"]}, {} if each["vector"] else {said["party"]: False}):
            self.tell(said["party"], said["run"], facts | {f"presence of {name} in {of}": told[name] for name in told})
        form = b"\x02\x96\xa5begin\xc4\x10" + session[:16], f"{each['told']}c420{said['terms']}"
        other = (begin[:26] if each["signatures"] else form[0], begin[-66:].hex() or form[1]) != form
        self.wrong(f"{where}: parties signed another session, model or terms than {said['party']} was told", when=other)
        size = {b"\xcc": 1, b"\xcd": 2, b"\xce": 4}.get(begin[26:27], 0)  # of a number in msgpack
        number = int.from_bytes(begin[27 : 27 + size] if size else begin[26:27], "big")
        bitmap = sum(1 << roster.index(name) for name in alive).to_bytes(-(-len(roster) // 8), "little")
        for name, signature in each["signatures"].items():
            self.wrong(f"{where}: {name} is no other survivor", when=name == said["party"] or name not in alive)
            message = framed(b"confirm", session, number, roster.index(name), bitmap, framed(b"begin", begin))
            self.check(where, name, each["keys"][name], message, signature, pin=not said["rehearsal"])

    def take_manifest(self, name: str, raw: bytes) -> None:
        body, _, rest = raw.rstrip(b"\n").removeprefix(b'{"manifest":').rpartition(b',"signatures":')
        said, signatures, digest = parsed(body), parsed(rest[:-1]), sha256(raw).hexdigest()
        self.wrong(f"{name} has another form or version", when=rest[-1:] != b"}" or said["version"] != 1)
        signers = {party: each["keys"][-1] for party, each in said["parties"].items()} | {"": said["coordinator"]}
        gone = {*said["gone"]} - {""}  # the coordinator never is
        for who, key in signers.items():
            if who in signatures:
                self.check(name, who, key, b"choral manifest 1\n" + body, signatures[who], pin=bool(who))
            self.wrong(f"{name}: {who} has not signed", when=who not in signatures and who not in gone)
        names = {key: known for known, key in (self.pinned or {}).items()}
        strange = self.pinned is not None and not names.keys() & {signers[who] for who in signers.keys() & signatures}
        self.wrong(f"{name}: nobody whose key you pinned has signed it", when=strange)
        self.manifests[digest], run, last, claims = said, said["run"], said["completed"].__index__(), said.get("claims")
        self.tell(name, run, {"manifest": digest, f"model after round {last}": said["model"]})
        self.tell(name, run, {f"{field} in round {last}": said[field] for field in ("terms", "rehearsal")})
        if claims:
            promise = {key: value for key, value in (claims["promise"] or {}).items() if key != "min_survivors"}
            self.tell_terms(name, run, said["terms"], claims["algorithm"], promise)
        shown = f"{name}, by {names.get(said['coordinator'], 'a key not pinned')}: run {run}, {last} rounds, signed by"
        self.said.append(f"{shown} {len(signers.keys() & signatures)}; gone: {', '.join(said['gone']) or 'none'}")

    def compare(self, *, whole: bool) -> None:  # whole: with all the files of a run's folder
        for manifest in self.manifests.values():
            self.compare_manifest(manifest, whole=whole)
        for name, (raw, said) in self.files.items():
            self.compare_file(name, raw, said if isinstance(said, dict) else {})
        for (_, what), views in self.views.items():
            by = " and to ".join(", ".join(dict.fromkeys(who)) for who in views.values())
            self.wrong(f"two views were shown: different {what}, to {by}", when=len(views) > 1)
        self.wrong("no receipt and no manifest is among these files", when=not self.rounds and not self.manifests)

    def compare_manifest(self, said: Any, *, whole: bool) -> None:
        lost = sorted(set(said["files"]) - set(self.files))
        lost += [each for each in said["parties"] if (said["run"], each) not in self.heads and said["rehearsal"]]
        self.wrong(f"signed for, and missing here: {', '.join(lost)}", when=whole and bool(lost))
        for (run, party), found in self.heads.items():
            mine = said["parties"].get(party, {}) if run == said["run"] else {}
            other = found != [mine.get("receipts"), mine.get("head"), (mine.get("keys") or [""])[-1]]
            self.wrong(f"the receipts of {party} are not those that the manifest names", when=other)
        for each in self.rounds:
            cost, led, where = said["ledgers"].get(each["party"]), each["ledger"], f"round {each['round']}"
            there = {each["party"]}.union(*(one["roster"] for one in each["sums"])) - {*said["parties"], *said["gone"]}
            self.wrong(f"in {where}, and not in the manifest: {', '.join(sorted(there))}", when=bool(there))
            beyond = cost and led and (led["events"][1], led["after"] != cost["head"]) > (cost["events"], False)
            less = cost and led and (led["epsilon"] > cost["epsilon"] or led["delta"] != cost["delta"])
            self.wrong(f"{each['party']}, {where}: another ledger than the manifest's", when=bool(beyond or less))
        shown = sum((each["round"], each["came"]) == (said["completed"], said["model"]) for each in self.rounds)
        by = f"as {shown} receipts have it" if shown else "on the coordinator's word alone"
        self.said.append(f"the manifest's model {said['model'][:12]}: {by}")

    def compare_file(self, name: str, raw: bytes, said: Any) -> None:
        files = [pair for each in self.manifests.values() for pair in each["files"].items()]
        signed = [digest for file, digest in files if name in (file, file.rpartition("/")[2])]
        other = bool(signed) and {sha256(raw).hexdigest()} != {*signed}
        self.wrong(f"{name} is not the file that the manifest names", when=other)
        for each in self.manifests.values() if name == "model.safetensors" else ():
            order = each.get("claims", {}).get("layout") or [pair[0] for pair in self.shapes.get(each["terms"], ())]
            other = bool(order or self.shapes) and weights(raw, order) != each["model"]
            self.wrong(f"{name} is not the model that came of the last round", when=other)
        for arm in said.get("arms", ()) if said.get("format") == "choral-report" else ():
            cited = [each["sha256"] for each in arm["manifests"]]
            mine, signed = [self.manifests.get(each, {}) for each in cited], signed + cited
            missing, where = not mine or {} in mine or len({*cited}) < len(cited), f"{name}, {arm['name']}"
            self.wrong(f"{where}: the manifests that it rests on are not given here, each once", when=missing)
            costs = [(cost["epsilon"], cost["delta"]) for each in mine for cost in each.get("ledgers", {}).values()]
            values = [each.get("metrics", {}).get(said["metric"]) for each in mine]
            claim = (arm["claim"]["epsilon"], arm["claim"]["delta"]) if arm["claim"] else (0.0, 0.0)
            other = (claim, arm["metric"]["values"]) != (max(costs, default=(0.0, 0.0)), values)
            self.wrong(f"{where}: epsilon or results are not those of its manifests", when=other and not missing)
        self.wrong(f"{name}: nothing that is given here signs for it", when=not signed)
        self.said += [f"{name}: held against what was signed"] if signed else []


def weights(raw: bytes, names: list[str]) -> str:  # a model's digest as receipts have it, of float32
    end, parts = 8 + int.from_bytes(raw[:8], "little"), [b"choral model 1\n"]
    found = [parsed(raw[8:end])[name] for name in names]
    for each in found:
        part = raw[end + each["data_offsets"][0] : end + each["data_offsets"][1]]
        doubles = len(part) // 8 if each["dtype"] == "F64" else 0
        parts.append(struct.pack(f"<{doubles}f", *struct.unpack(f"<{doubles}d", part)) if doubles else part)
    return sha256(b"".join(parts)).hexdigest() if {each["dtype"] for each in found} <= {"F32", "F64"} else ""


def pinned_keys(path: Path) -> dict[str, str]:
    found = json.loads(path.read_bytes()) if path.suffix == ".json" else tomllib.loads(path.read_text("utf-8"))
    keys = {name: key.lower() for name, key in found.items() if isinstance(key, str)}
    for name, entry in ((n, e) for group in found.values() if isinstance(group, dict) for n, e in group.items()):
        der = ssl.PEM_cert_to_DER_cert(entry["certificate"])  # an Ed25519 key stands after these bytes
        keys[name] = der.partition(bytes.fromhex("302a300506032b6570032100"))[2][:32].hex()
    return keys


def report(given: Path | list[Path], keys: dict[str, str] | None) -> int:  # a run's folder, or files
    folder, evidence = given if isinstance(given, Path) else None, Evidence(keys)
    for path in [each for kind in KINDS for each in sorted(given.glob(kind))] if isinstance(given, Path) else given:
        evidence.take(path.relative_to(folder).as_posix() if folder else path.name, path.read_bytes())
    evidence.compare(whole=folder is not None)
    played = any(each["rehearsal"] for each in (*evidence.rounds, *evidence.manifests.values()))
    made = ["A rehearsal: one machine played all parties, and one operator made their keys."] if played else []
    found = [f"DOES NOT HOLD: {each}" for each in evidence.problems] or ["Holds: no contradiction was found."]
    for line in (*evidence.said, *made, *found, "", *CANNOT.split("\n")):  # no name in it writes lines of its own
        print("".join(each if each.isprintable() else ascii(each)[1:-1] for each in line))
    return 1 if evidence.problems else 0


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("verify", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--keys", type=Path)
    given = parser.parse_args(words)
    loose = [each for each in given.files if not each.is_dir()]
    try:
        keys = pinned_keys(given.keys) if given.keys else None
        return max(report(group, keys) for group in (*filter(Path.is_dir, given.files), loose) if group)
    except (OSError, *UNREADABLE) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"what is given: {error!r:.200}"
        print(f"choral: cannot read {what}", file=sys.stderr)
        print("  hint: name receipts, a manifest, or a run's folder; --keys takes a directory.toml", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
