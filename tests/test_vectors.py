"""The known answers that others made travel with the repository: whole, unchanged, each with source and licence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FOLDERS = ("rfc-nist", "shamir", "wycheproof")
CASES = {"x25519": 518, "hkdf_sha256": 86, "chacha20_poly1305": 325, "aes_gcm": 316, "ed25519": 151}


def test_every_known_answer_is_there_and_unchanged(vectors: Path) -> None:
    listed = dict(reversed(line.split("  ", 1)) for line in (vectors / "SHA256SUMS").read_text().splitlines())
    found = {
        path.relative_to(vectors).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in FOLDERS
        for path in (vectors / folder).iterdir()
    }
    assert found == listed
    assert len(found) >= 16


def test_the_readme_gives_a_source_for_every_file(vectors: Path) -> None:
    readme = (vectors / "README.md").read_text()
    for folder in FOLDERS:
        assert (vectors / folder / "LICENSE").is_file()
        for path in (vectors / folder).iterdir():
            shared = "wycheproof/*_test.json" if path.name.endswith("_test.json") else path.name
            assert shared in readme, path


def test_the_counts_are_those_of_the_readme(vectors: Path) -> None:
    for name, count in CASES.items():
        groups = json.loads((vectors / "wycheproof" / f"{name}_test.json").read_text())["testGroups"]
        assert sum(len(group["tests"]) for group in groups) == count, name
