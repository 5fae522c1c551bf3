"""Check what a federated training left behind: receipts, manifests, and the files that they name. One file, offline.

    python verify.py FILE_OR_FOLDER... [--keys KEYS]          (or: choral verify ...)

KEYS: public keys that you know by another way, names with 64 hexadecimal digits as JSON or TOML, or a site's
directory.toml. Exit code: 0 holds, 1 something does not hold or cannot be verified, 2 wrong usage, unreadable files.

A receipt (a line of receipts/NAME.jsonl) is what one party signed of one round, a manifest (manifest.json) what all
signed of a run. Checked are all signatures, with the survivors' own on who was summed, model and terms; that no two
receipts of a round were shown two views; that each round went on from the last; and all files that were signed for."""

from __future__ import annotations

import argparse
import hashlib
import json
import ssl
import struct
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

KINDS = (
    *("manifest.json", "receipts/*.jsonl", "ledger/*.jsonl", "run.json", "sites.json", "standardise.json"),
    *("history*", "*.safetensors"),
)
CANNOT = """What no signature can show, and so is not shown here:
- that others added the noise that they promised, or trained as they said; a party knows this of itself alone;
- that a model is what came of the sum: its coordinator says so, and has seen it alone;
- that data were real; anything of a run, round, party or file that is not given here, or was never written down;
- who made the files, if keys are not pinned by --keys, or in a rehearsal, where one operator made all keys."""

P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int, int, int]  # extended coordinates: x = X / Z, y = Y / Z, T = X Y / Z


def add(a: Point, b: Point) -> Point:
    e, f = (a[1] - a[0]) * (b[1] - b[0]) % P, (a[1] + a[0]) * (b[1] + b[0]) % P
    g, h = 2 * a[3] * b[3] * D % P, 2 * a[2] * b[2] % P
    return (f - e) * (h - g) % P, (h + g) * (f + e) % P, (h - g) * (h + g) % P, (f - e) * (f + e) % P


def times(k: int, a: Point) -> Point:
    total: Point = (0, 1, 1, 0)
    while k:
        total, a, k = add(total, a) if k & 1 else total, add(a, a), k >> 1
    return total


def point(raw: bytes) -> Point | None:  # none for a y that is not below p, or that is of no point (5.1.3)
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
    k = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % L
    x, y, z, t = add(r, times(k, a))
    zero = add(times(s, base), (-x, y, z, -t))
    return zero[0] == 0 == (zero[1] - zero[2]) % P


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # of a key that stands twice, readers take either
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def framed(label: bytes, *parts: bytes | int) -> bytes:  # what parties sign in a secure sum
    raw = [each.to_bytes(8, "little") if isinstance(each, int) else each for each in (b"choral/2/" + label, *parts)]
    return hashlib.sha256(b"".join(len(each).to_bytes(8, "little") + each for each in raw)).digest()


class Evidence:
    """pinned: name -> key. verify: as `ed25519`. problems: what does not hold. said: what is shown, in words."""

    def __init__(self, pinned: dict[str, str] | None = None, verify: Callable[..., bool] = ed25519) -> None:
        self.pinned, self.verify = pinned, verify
        self.problems, self.said = list[str](), list[str]()
        self.rounds, self.files = list[dict[str, Any]](), dict[str, bytes]()  # receipts; what is no evidence itself
        self.heads = dict[tuple[str, str], list[Any]]()  # (run, party): lines, digest of the last, its key
        self.texts, self.manifests = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()  # terms; by SHA-256

    def wrong(self, what: str, *, when: bool = True) -> None:
        self.problems += [what] if when and what not in self.problems else []

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
                self.files[name] = raw
                if name.endswith(".json"):
                    json.loads(raw, object_pairs_hook=once)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            self.wrong(f"{name} cannot be read: {error!r:.80}")

    def take_receipt(self, where: str, line: bytes, number: int) -> None:
        body, _, rest = line.removeprefix(b'{"receipt":').rpartition(b',"signature":"')
        said = json.loads(body, object_pairs_hook=once)
        party, key, held = said["party"], said["key"], (said["run"], said["party"])
        self.wrong(f"{where} has another form or version", when=rest[128:] != b'"}' or said["version"] != 1)
        self.check(where, party, key, b"choral receipt 1\n" + body, rest[:128].decode())
        before = self.heads[held][1] if number > 1 and held in self.heads else "0" * 64
        alone = number == 1 and said["kind"] == "round"  # a receipt by itself
        self.wrong(f"{where}: receipts before it are missing, or added", when=said["previous"] != before and not alone)
        self.heads[held] = [number, sha(line), key]
        if said["kind"] == "terms":
            text = said["text"].encode()
            self.texts[said["terms"]] = json.loads(text)
            self.wrong(f"{where}: not the terms", when=sha(b"choral training terms 1" + text) != said["terms"])
            return
        self.rounds.append(said)
        for each in said["sums"]:
            self.check_sum(where, said, each)

    def check_sum(self, where: str, said: dict[str, Any], each: dict[str, Any]) -> None:
        """The survivors' signatures: on the session, its round, who was summed, and the Begin, with model and terms."""
        begin, session, roster = bytes.fromhex(each["begin"]), bytes.fromhex(each["session"]), each["roster"]
        alive = [name for name in roster if each["dropped"] is not None and name not in each["dropped"]]
        inside = bool(each["in_sum"] and (not each["vector"] or (alive and said["party"] not in alive)))
        self.wrong(f"{where}: {said['party']} is said to be in a sum that it has sent nothing to", when=inside)
        other = begin != b"" and (begin[-66:-34].hex(), begin[-32:].hex()) != (each["told"], said["terms"])
        self.wrong(f"{where}: parties signed another model or terms than {said['party']} was told", when=other)
        if each["signatures"]:
            form = begin[:10].hex() == "0296a5626567696ec410" and begin[10:26] == session[:16]
            self.wrong(f"{where}: the signatures are of another session", when=not form)
            size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(begin[26], 0)  # of a number in msgpack
            number = int.from_bytes(begin[27 : 27 + size], "big") if size else begin[26]
            bits = sum(1 << place for place, name in enumerate(roster) if name in alive)
            bitmap = bits.to_bytes(-(-len(roster) // 8), "little")
        for name, signature in each["signatures"].items():
            self.wrong(f"{where}: {name} is no other survivor", when=name == said["party"] or name not in alive)
            message = framed(b"confirm", session, number, roster.index(name), bitmap, framed(b"begin", begin))
            self.check(where, name, each["keys"][name], message, signature, pin=not said["rehearsal"])

    def take_manifest(self, name: str, raw: bytes) -> None:
        body, _, rest = raw.rstrip(b"\n").removeprefix(b'{"manifest":').rpartition(b',"signatures":')
        said, signatures = (json.loads(each, object_pairs_hook=once) for each in (body, rest[:-1]))
        self.wrong(f"{name} has another form or version", when=rest[-1:] != b"}" or said["version"] != 1)
        signers = {party: each["keys"][-1] for party, each in said["parties"].items()} | {"": said["coordinator"]}
        for who, key in signers.items():
            if who in signatures:
                self.check(name, who, key, b"choral manifest 1\n" + body, signatures[who], pin=bool(who))
            self.wrong(f"{name}: {who} has not signed", when=who not in signatures and who not in said["gone"])
        known = {signers[who] for who in signers.keys() & signatures} & set((self.pinned or {}).values())
        self.wrong(f"{name}: nobody whose key you pinned has signed it", when=self.pinned is not None and not known)
        self.manifests[sha(raw)] = said
        by = [each for each, key in (self.pinned or {}).items() if key == said["coordinator"]] or ["a key not pinned"]
        run, gone = f"run {said['run']}, {said['completed']} rounds", ", ".join(said["gone"]) or "none"
        self.said.append(f"{name}, by {by[0]}: {run}, signed by {len(signatures.keys() & signers)}; gone: {gone}")

    def compare(self, *, whole: bool) -> None:
        rounds: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for said in self.rounds:
            rounds.setdefault((said["run"], said["round"]), []).append(said)
            if terms := self.texts.get(said["terms"]):  # whatever came first
                other = (said["algorithm"], said["promise"]) != (terms["algorithm"]["kind"], terms["privacy"])
                self.wrong(f"{said['party']}: algorithm or promise is not that of the terms", when=other)
        for (run, number), held in sorted(rounds.items()):
            self.compare_round(number, held)
            ends = {said["came"] for said in held if said["came"]}
            other = bool(ends) and not {said["given"] for said in rounds.get((run, number + 1), ())} <= ends
            self.wrong(f"round {number + 1} did not go on from the model that came of round {number}", when=other)
        self.wrong("the receipts are of several runs", when=len({said["run"] for said in self.rounds}) > 1)
        of_runs = {manifest["run"] for manifest in self.manifests.values()}
        self.wrong("there are two manifests of one run", when=len(of_runs) < len(self.manifests))
        for manifest in self.manifests.values():
            self.compare_manifest(manifest, whole=whole)
        for name, raw in self.files.items():
            self.compare_file(name, raw)
        self.wrong("no receipt and no manifest is among these files", when=not self.rounds and not self.manifests)

    def views(self, what: str, shown: Iterable[tuple[str, Any]]) -> None:  # None or empty: that party was not told
        groups: dict[str, list[str]] = {}
        for party, value in shown:
            if value not in (None, ""):
                groups.setdefault(json.dumps(value), []).append(party)
        parties = " and to ".join(map(", ".join, groups.values()))
        self.wrong(f"two views were shown: different {what}, to {parties}", when=len(groups) > 1)

    def compare_round(self, number: int, held: list[dict[str, Any]]) -> None:
        self.wrong(f"two receipts of a party in round {number}", when=len({said["party"] for said in held}) < len(held))
        for field in ("given", "came", "terms", "algorithm", "promise", "rehearsal"):
            self.views(f"{field} in round {number}", ((said["party"], said[field]) for said in held))
        for place in range(max(len(said["sums"]) for said in held)):
            where = f"sum {place + 1} of round {number}"
            seen = {said["party"]: said["sums"][place] for said in held if place < len(said["sums"])}
            for field in ("exchange", "told", "channel", "setup", "session", "begin", "roster", "dropped"):
                self.views(f"{field} in {where}", ((party, each[field]) for party, each in seen.items()))
            for name, each in seen.items():
                told = {name not in other["dropped"] for other in seen.values() if other["dropped"] is not None}
                told = (told if name in each["roster"] else set()) | {each["in_sum"]} - {None}
                opposite = len(told) > 1 or (True in told and not each["vector"])
                self.wrong(f"opposite things were said of whether {name} is in {where}", when=opposite)
        self.said += [in_words(said) for said in held]

    def compare_manifest(self, said: dict[str, Any], *, whole: bool) -> None:
        lost = sorted(set(said["files"]) - set(self.files))
        lost += [each for each in said["parties"] if (said["run"], each) not in self.heads and said["rehearsal"]]
        self.wrong(f"signed for, and missing here: {', '.join(lost)}", when=whole and bool(lost))
        for (run, party), found in self.heads.items():
            mine = said["parties"].get(party, {}) if run == said["run"] else {}
            other = found != [mine.get("receipts"), mine.get("head"), (mine.get("keys") or [""])[-1]]
            self.wrong(f"the receipts of {party} are not those that the manifest names", when=other)
        for each in self.rounds:
            cost, led, where = said["ledgers"].get(each["party"]), each["ledger"], f"round {each['round']}"
            last = each["round"] == said["completed"]
            end = last and each["came"] not in (None, said["model"])
            self.wrong(f"the manifest's model is not the one that came of {where}", when=end)
            other = last and (each["terms"], each["rehearsal"]) != (said["terms"], said["rehearsal"])
            self.wrong(f"the manifest has other terms than {where}, or calls a rehearsal none", when=other)
            there = {each["party"]}.union(*(one["roster"] for one in each["sums"])) - {*said["parties"], *said["gone"]}
            self.wrong(f"in {where}, and not in the manifest: {', '.join(sorted(there))}", when=bool(there))
            beyond = cost and led and (led["events"][1], led["after"] != cost["head"]) > (cost["events"], False)
            less = cost and led and (led["epsilon"] > cost["epsilon"] or led["delta"] != cost["delta"])
            self.wrong(f"{each['party']}, {where}: another ledger than the manifest's", when=bool(beyond or less))
        shown = sum((each["round"], each["came"]) == (said["completed"], said["model"]) for each in self.rounds)
        by = f"as {shown} receipts have it" if shown else "on the coordinator's word alone"
        self.said.append(f"the manifest's model {said['model'][:12]}: {by}")

    def compare_file(self, name: str, raw: bytes) -> None:
        files = [pair for each in self.manifests.values() for pair in each["files"].items()]
        signed = [digest for file, digest in files if name in (file, file.rpartition("/")[2])]
        self.wrong(f"{name} is not the file that the manifest names", when=bool(signed) and sha(raw) not in signed)
        for each in self.manifests.values() if name == "model.safetensors" else ():
            order = [pair[0] for pair in self.texts.get(each["terms"], {}).get("shapes", ())]
            other = weights(raw, order := each.get("claims", {}).get("layout", order)) != each["model"]
            self.wrong(f"{name} is not the model that came of the last round", when=bool(order or self.texts) and other)
        if b'"choral-report"' in raw[:200] and raw.startswith(b"{"):
            signed = self.compare_report(name, json.loads(raw))
        self.wrong(f"{name}: nothing that is given here signs for it", when=not signed)
        self.said += [f"{name}: held against what was signed"] if signed else []

    def compare_report(self, name: str, report: dict[str, Any]) -> list[str]:
        for arm in report.get("arms", ()):
            mine = [self.manifests.get(each["sha256"], {}) for each in arm["manifests"]]
            missing, where = not mine or {} in mine, f"{name}, {arm['name']}"
            self.wrong(f"{where}: the manifests that it rests on are not given here", when=missing)
            costs = [(cost["epsilon"], cost["delta"]) for each in mine for cost in each.get("ledgers", {}).values()]
            values = [each.get("metrics", {}).get(report["metric"]) for each in mine]
            claim = (arm["claim"]["epsilon"], arm["claim"]["delta"]) if arm["claim"] else (0.0, 0.0)
            other = (claim, arm["metric"]["values"]) != (max(costs, default=(0.0, 0.0)), values)
            self.wrong(f"{where}: epsilon or results are not those of its manifests", when=other and not missing)
        return [each["sha256"] for arm in report.get("arms", ()) for each in arm["manifests"]]


def weights(raw: bytes, names: list[str]) -> str:  # a model's digest as receipts have it, of float32
    end = 8 + int.from_bytes(raw[:8], "little")
    found = [json.loads(raw[8:end])[name] for name in names]
    parts = [raw[end + each["data_offsets"][0] : end + each["data_offsets"][1]] for each in found]
    for place, each in enumerate(found):
        if each["dtype"] == "F64":
            numbers = [number for (number,) in struct.iter_unpack("<d", parts[place])]
            parts[place] = struct.pack(f"<{len(numbers)}f", *numbers)
    return sha(b"choral model 1\n" + b"".join(parts)) if {each["dtype"] for each in found} <= {"F32", "F64"} else ""


def in_words(said: dict[str, Any]) -> str:
    signed, took = min((len(each["signatures"]) for each in said["sums"]), default=0), bool(said["sums"])
    part = "took part in" if took and all(each["in_sum"] for each in said["sums"]) else "is not in the result of"
    by = f"as {signed} other survivors signed" if signed else "on the coordinator's word alone"
    promise, led, came = said["promise"], said["ledger"], (said["came"] or "what it was not told")[:12]
    terms = "epsilon {epsilon:g} at delta {delta:g} promised".format(**promise) if promise else "no privacy promised"
    cost = f"; its ledger: events {led['events']}, epsilon {led['epsilon']} in all" if led else ""
    model = f"given model {said['given'][:12]}, of which came {came}{said['failed'] and '; given up'}"
    return f"{said['party']}, round {said['round']}: {part} {said['algorithm']}, {by}; {terms}; {model}{cost}"


def pinned_keys(path: Path) -> dict[str, str]:
    found = json.loads(path.read_bytes()) if path.suffix == ".json" else tomllib.loads(path.read_text("utf-8"))
    keys = {name: key.lower() for name, key in found.items() if isinstance(key, str)}
    for name, entry in ((n, e) for group in found.values() if isinstance(group, dict) for n, e in group.items()):
        der = ssl.PEM_cert_to_DER_cert(entry["certificate"])  # an Ed25519 key stands after these bytes
        keys[name] = der.partition(bytes.fromhex("302a300506032b6570032100"))[2][:32].hex()
    return keys


def report(given: Path | list[Path], keys: dict[str, str] | None) -> int:
    """Print what files, or the folder of a run, show; the exit code."""
    evidence = Evidence(keys)
    for path in given if isinstance(given, list) else [each for kind in KINDS for each in sorted(given.glob(kind))]:
        evidence.take(path.name if isinstance(given, list) else path.relative_to(given).as_posix(), path.read_bytes())
    evidence.compare(whole=not isinstance(given, list))
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
    except OSError as error:
        print(f"choral: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        print("  hint: name receipts, a manifest, or the folder of a run that holds them", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        print(f"choral: what is given cannot be read: {error!r:.200}", file=sys.stderr)
        print("  hint: --keys takes a site's directory.toml; the other files are as a run wrote them", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
