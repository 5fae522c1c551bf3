"""The tests of ``leftovers.py``, in a process of their own, all objects of which they search for secrets.

In one that has run other tests there are ten times as many objects, and each of their twenty searches takes ten times
as long.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from choral.protocols.crypto import keys

HERE = Path(__file__).parent


def test_no_object_of_a_process_holds_a_secret_of_a_round_that_is_over() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        str(HERE / "leftovers.py"),
    ]
    done = subprocess.run(
        command, env=own, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    skipped = 0 if "pycryptodome" in keys.BACKENDS else 3  # before version 4 it is no backend
    said = rf"^(\d+) passed, {skipped} skipped in " if skipped else r"^(\d+) passed in "
    passed = re.search(said, done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout[-2000:]  # none skipped, none left out
    assert int(passed.group(1)) >= 14 - skipped
