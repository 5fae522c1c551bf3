"""Flower as it is deployed: a SuperLink, and a SuperNode beside each site's process, with TLS and keys of nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flower_federation import VISITS, FlowerSites, new_model
from safetensors.torch import load_file
from site_federation import approved_at
from site_taps import Tap

from choral.jobs.engines.flower_job import Coordinator
from choral.jobs.settings import ServeSettings, SumSettings
from choral.network.flower.grid import FlowerGrid

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]
ANSWERS = "answers at"
PATIENT = ServeSettings(wait=240, step=90, training=600)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Flower:
    """A SuperLink, a SuperNode and a site's process for each site. place: a folder with a short path. tapped: each node
    is led to its site by a `Tap`. A run is a process of the job's name.
    """

    sites: FlowerSites
    place: Path
    tapped: bool = False
    link: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)

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
            self.wait_for(f"{name}-site", ANSWERS)

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
        if self.tapped and name not in self.taps:
            self.taps[name] = Tap(door.parent / "tap", str(door))
        self.start(
            f"{name}-site", sys.executable, "-m", "choral", "join", str(self.sites.path / name), "--local", str(door)
        )

    def site_anew(self, name: str) -> None:
        """Its process is ended, and another one answers."""
        before = self.said(f"{name}-site").count(ANSWERS)
        self.kill(f"{name}-site")
        self.site(name)
        self.wait_for(f"{name}-site", ANSWERS, times=before + 1)

    def node(self, name: str) -> None:
        """The SuperNode of a site."""
        door, data = self.place / name / "door", self.sites.path / name / "points.npy"
        led = self.taps[name].path if name in self.taps else door
        self.start(
            f"{name}-node", "flower-supernode", "--root-certificates", "ca.crt",
            "--superlink", f"127.0.0.1:{self.link}", "--auth-supernode-private-key", f"{name}-node",
            "--node-config", f'choral-socket="{led}" data="{data}"',
            "--port", str(free_port()),
        )  # fmt: skip

    def job(
        self, name: str, rounds: int, *, approve: Iterable[str] = (), wait: float = PATIENT.wait, trips: Any = None
    ) -> Path:
        """Its file. approve: the sites at which its offer is approved beforehand."""
        path = self.sites.job(serve=replace(PATIENT, job=name, wait=wait), secure_sum=SumSettings(trips=trips))
        coordinator = Coordinator.read(path, None)
        shapes = {key: tuple(tensor.shape) for key, tensor in new_model().state_dict().items()}
        adapter = FlowerGrid(None, coordinator.names)
        offer = coordinator.rounds(adapter, shapes, rounds=rounds, strategy="FedAvg").offer
        for site in approve:
            approved_at(self.sites.federation, site, offer)
        return path

    def submit(self, name: str, rounds: int, **given: Any) -> None:
        """`flwr run` of the example, for that job."""
        job, app = self.job(name, rounds, **given), self.place / "app"
        shutil.copytree(VISITS, app, dirs_exist_ok=True)
        self.submit_app(name, app, f'num-server-rounds={rounds} job="{job}" out="{self._trained(name)}"')

    def submit_app(self, name: str, app: Path, config: str) -> None:
        self.start(name, "flwr", "run", str(app), "here", "--stream", "--run-config", config)

    def over(self, name: str, seconds: float = 400) -> None:
        try:
            self.running.pop(name).wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(self.said(name)[-4000:])

    def model(self, name: str) -> dict[str, torch.Tensor]:
        assert self._trained(name).is_file(), self.said(name)[-4000:]
        found: dict[str, torch.Tensor] = load_file(self._trained(name))
        return found

    def _trained(self, name: str) -> Path:
        return self.place / f"{name}.safetensors"

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
