"""Flower itself: a SuperLink and three SuperNodes with TLS and node authentication run the example, and one is killed.

Run by `make test-engines`, where Flower is installed. Sites are processes of their own, as `choral join --local` makes
them, each beside its SuperNode.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flower_federation import VISITS, FlowerSites, rehearsed
from safetensors.torch import load_file
from site_federation import records_of, until_tomorrow

from choral.jobs.settings import ServeSettings
from choral.protocols import Masked

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed: run by `make test-engines`"
)
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[3]
PATIENT = ServeSettings(wait=240, step=90, training=120)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Flower:
    """A SuperLink, a SuperNode and a site's process for each site. place: a folder with a short path."""

    sites: FlowerSites
    place: Path
    link: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> Mapping[str, str]:
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(path for path in paths if path),
            "FLWR_HOME": str(self.place / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        }

    def run(self, *words: str, seconds: float = 120) -> str:
        done = subprocess.run(
            words,
            env=dict(self.environment),
            cwd=self.place,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, *words: str) -> None:
        log = (self.place / f"{name}.log").open("ab")
        self.running[name] = subprocess.Popen(
            words, env=dict(self.environment), cwd=self.place, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def said(self, name: str) -> str:
        path = self.place / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, name: str, text: str, *, times: int = 1, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while self.said(name).count(text) < times:
            assert time.monotonic() < end, f"{name} did not say {text!r}: {self.said(name)[-3000:]}"
            assert self.running[name].poll() is None or self.said(name).count(text) >= times, self.said(name)[-3000:]
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """With all that it started, as a machine that is switched off."""
        if (process := self.running.pop(name, None)) is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def begin(self, *, nodes: bool = True) -> None:
        """nodes: with Flower's own processes, and not the sites' alone."""
        (self.place / "home").mkdir()
        if nodes:
            self._super_link()
        for name in self.sites.names:
            self.site(name)
            if nodes:
                self.run("flwr", "supernode", "register", f"{name}-node.pub", "here", "--name", name)
                self.node(name)
        for name in self.sites.names:
            self.wait_for(f"{name}-site", "answers at")

    def _super_link(self) -> None:
        self._certificates()
        self.start(
            "superlink", "flower-superlink", "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem",
            "--ssl-keyfile", "server.key", "--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(self.link),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        (self.place / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.link}"\n'
            f'root-certificates = "{self.place / "ca.crt"}"\n'
        )
        self._until_open(self.link)

    def site(self, name: str) -> None:
        """The process of a site."""
        door = self.place / name / "door"
        door.parent.mkdir(exist_ok=True)
        self.start(
            f"{name}-site", sys.executable, "-m", "choral", "join", str(self.sites.path / name), "--local", str(door)
        )

    def node(self, name: str) -> None:
        """The SuperNode of a site."""
        door, data = self.place / name / "door", self.sites.path / name / "points.npy"
        self.start(
            f"{name}-node", "flower-supernode", "--root-certificates", "ca.crt",
            "--superlink", f"127.0.0.1:{self.link}", "--auth-supernode-private-key", f"{name}-node",
            "--node-config", f'choral-socket="{door}" data="{data}"',
            "--port", str(free_port()),
        )  # fmt: skip

    def job(self, rounds: int, **config: str) -> None:
        """`flwr run` of the example."""
        values = {"job": self.sites.job(serve=PATIENT), "out": self.place / "model.safetensors", **config}
        words = " ".join([f"num-server-rounds={rounds}", *(f'{key}="{value}"' for key, value in values.items())])
        app = self.place / "app"
        shutil.copytree(VISITS, app, dirs_exist_ok=True)
        self.start("run", "flwr", "run", str(app), "here", "--stream", "--run-config", words)

    def over(self, seconds: float = 400) -> None:
        try:
            self.running["run"].wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(self.said("run")[-4000:])

    def model(self) -> dict[str, torch.Tensor]:
        assert (self.place / "model.safetensors").is_file(), self.said("run")[-4000:]
        found: dict[str, torch.Tensor] = load_file(self.place / "model.safetensors")
        return found

    def _until_open(self, port: int) -> None:
        end = time.monotonic() + 120
        while True:
            with socket.socket() as trying:
                if trying.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert time.monotonic() < end, self.said("superlink")[-3000:]
            time.sleep(0.2)

    def _certificates(self) -> None:
        self.run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt",
                 "-subj", "/O=CA", "-days", "30")  # fmt: skip
        self.run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-keyout", "server.key", "-out", "server.csr",
                 "-subj", "/CN=localhost")  # fmt: skip
        (self.place / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self.run("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                 "-days", "30", "-extfile", "san", "-out", "server.pem")  # fmt: skip
        for name in self.sites.names:
            self.run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"{name}-node")


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    place = Path(tempfile.mkdtemp(prefix="fl-"))
    sites = FlowerSites(tmp_path, place)
    made = Flower(sites, place)
    try:
        made.begin()
        yield made
    finally:
        for name in list(made.running):
            made.kill(name)
        shutil.rmtree(place, ignore_errors=True)


def approve_what_comes(flower: Flower) -> None:
    """As an officer does at each site: the offer is looked at once it was made, and approved."""
    end = time.monotonic() + 240
    for name in flower.sites.names:
        folder = flower.sites.federation.site(name)
        while not (offers := folder.offers.all()):
            assert time.monotonic() < end, flower.said("run")[-3000:]
            time.sleep(0.2)
        flower.run(
            sys.executable, "-m", "choral", "site", "approve", offers[-1].digest, "--site", str(folder.path),
            "--until", f"{until_tomorrow()}",
        )  # fmt: skip


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_two_rounds_and_one_node_killed(flower: Flower) -> None:
    """Unapproved at first; then round 1 with all; in round 2 one machine is switched off when it has its order."""
    flower.job(2)
    approve_what_comes(flower)
    flower.wait_for("run", "[ROUND 2/2]")
    flower.kill("east-node")
    flower.kill("east-site")
    flower.over()
    assert same(flower.model(), rehearsed(flower.sites.names, 2, Masked(), without={2: "east"}).state)
    canary = records_of("north")[0].tobytes()
    for name in ("run", "superlink"):
        assert canary not in (flower.place / f"{name}.log").read_bytes()
    for path in (flower.place / "home").rglob("*"):
        assert not path.is_file() or canary not in path.read_bytes()
