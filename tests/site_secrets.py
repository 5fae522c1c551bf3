"""What nobody but a site may hold, and a search for it in memory and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from site_federation import Federation, records_of


def secrets_of(federation: Federation, name: str) -> dict[str, bytes]:
    """The site's key, and pieces of a record: two numbers beside each other, as the model reads and as text."""
    record = records_of(name)[5]
    found = {"key": federation.site(name).signing.seed}
    for place in range(0, 6, 2):
        pair = record[place : place + 2]
        found[f"numbers {place}"] = pair.tobytes()
        found[f"numbers {place}, 64 bits"] = pair.astype(np.float64).tobytes()
        found[f"number {place}, as text"] = repr(float(pair[0])).encode()
    return found


def memory_of(process: int) -> Iterator[bytes]:
    """All of a process's readable memory, piece by piece."""
    with open(f"/proc/{process}/maps") as maps, open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        for line in maps.read().splitlines():
            where, rights = line.split()[:2]
            if rights.startswith("r") and "[v" not in line:
                start, end = (int(part, 16) for part in where.split("-"))
                try:
                    memory.seek(start)
                    yield memory.read(end - start)
                except (OSError, ValueError, OverflowError):
                    continue


def files_below(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.read_bytes()


def found_in(secrets: dict[str, bytes], pieces: Iterator[bytes]) -> set[str]:
    return {name for piece in pieces for name, secret in secrets.items() if secret in piece}
