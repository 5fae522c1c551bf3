"""What a coordinator gets to see: a record of a site is searched for in its messages, its files and its memory.

The sites run from an installed wheel, their folders belong to another user and are closed to all others, and the
coordinator is a process without any capability, so that the kernel keeps it out. Where that cannot be arranged (no
root, no setpriv), the folders are searched for all the same, and the coordinator could have read them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from site_processes import ENVIRONMENT, Processes, until
from site_secrets import files_below, found_in, memory_of, secrets_of

from choral.trainers import Run

ROOT = Path(__file__).resolve().parents[3]
OTHER = 65534
APART = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("setpriv") is not None
OTHERS = [
    "setpriv",
    f"--reuid={OTHER}",
    f"--regid={OTHER}",
    "--clear-groups",
    "--inh-caps=+dac_override,+dac_read_search",
    "--ambient-caps=+dac_override,+dac_read_search",
]  # fmt: skip  (with which it may read the Python of this machine, wherever that is)
NO_RIGHTS = ["setpriv", "--bounding-set=-all"]
COORDINATOR = """
import sys
from choral.network.transport.channel import FrameChannel

received, receive = open(sys.argv[1], "ab", buffering=0), FrameChannel.receive

async def logged(channel):
    frame = await receive(channel)
    received.write(bytes(frame.payload))
    return frame

FrameChannel.receive = logged
from choral.cli.command_line import main

print("ended", main(sys.argv[2:]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A wheel of this tree, unpacked."""
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in names:
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    target = tmp_path / "installed"
    zipfile.ZipFile(next(tmp_path.glob("choral-*.whl"))).extractall(target)
    return target


def closed(processes: Processes) -> None:
    """Give the sites' folders to another user, and see that the coordinator is kept out."""
    for name in processes.federation.names:
        for path in (processes.path / name, *(processes.path / name).rglob("*")):
            os.chown(path, OTHER, OTHER)
        table = processes.path / name / "points.npy"
        tried = subprocess.run([*NO_RIGHTS, "cat", str(table)], capture_output=True, text=True, check=False)
        assert "Permission denied" in tried.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a process's memory is read in /proc")
def test_no_record_and_no_key_reaches_the_coordinator(installed: Path, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(installed)}
    where = [sys.executable, "-c", "import choral; print(choral.__file__)"]
    used = subprocess.run(where, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert used.startswith(str(installed))
    processes = Processes(tmp_path / "sites", prefix=OTHERS if APART else (), environment=environment, running=False)
    words = processes.job("watched", processes.settings())
    script = tmp_path / "coordinator.py"
    script.write_text(COORDINATOR)
    received = tmp_path / "received"
    secrets = {f"{name}: {what}": secret for name in processes.federation.names
               for what, secret in secrets_of(processes.federation, name).items()}  # fmt: skip
    assert len(secrets) == 30
    if APART:
        closed(processes)
    try:
        for name in processes.federation.names:
            processes.start(name)
        with (
            processes.paused("north", 2),
            subprocess.Popen(
                [*(NO_RIGHTS if APART else []), sys.executable, str(script), str(received), *words],
                env=ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as coordinator,
        ):
            assert coordinator.stdin is not None
            assert coordinator.stdout is not None
            try:
                os.chown(processes.path / "north" / "state" / "pause-2", *(2 * [OTHER if APART else os.getuid()]))
                until(lambda: processes.in_fit("north") == "2", "the training of round 2")
                assert found_in(secrets, memory_of(coordinator.pid)) == set()  # in a round
                # The search finds what is there: each site's own memory has its record and its key.
                own = found_in(secrets, memory_of(processes.sites["north"].pid))
                assert {"north: key", "north: numbers 0"} <= own
                assert not any(name.startswith("south") for name in own)
                (processes.path / "north" / "state" / "pause-2").unlink()
                while not (line := coordinator.stdout.readline()).startswith(b"ended"):
                    assert line, "the coordinator died"
                assert line == b"ended 0\n"
                assert found_in(secrets, memory_of(coordinator.pid)) == set()  # at the end
                (processes.path / "north" / "state" / "pause-2").touch()
            finally:
                coordinator.kill()
    finally:
        processes.close()
    run = tmp_path / "sites" / "run-watched"
    assert [entry.survivors for entry in Run.load(run).history] == [0, 3, 3, 3]
    assert received.stat().st_size > 1000  # it is what came decrypted: steps of the sums, by their name
    assert b"choral site 1\n" in received.read_bytes()
    assert found_in(secrets, iter([received.read_bytes()])) == set()
    assert found_in(secrets, files_below(run)) == set()
    assert found_in(secrets, files_below(tmp_path / "sites" / "hub")) == set()
    assert any(
        name.startswith("south: numbers") for name in found_in(secrets, files_below(tmp_path / "sites" / "south"))
    )
