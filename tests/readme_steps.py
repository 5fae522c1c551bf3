"""The console blocks of an example's README, run as they stand there, in a copy of its folder."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path


def steps_of(readme: Path) -> list[str]:
    """The lines of its console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", readme.read_text(), re.S)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def run_steps(lines: list[str], folder: Path, environment: Mapping[str, str], *, seconds: float) -> str:
    """What they print, one after the other in one bash, which ends at the first that fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
