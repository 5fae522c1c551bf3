"""Three sites by `choral join --local`, and NVFlare's processes between them and the coordinator: provisioned, mTLS."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from site_doors import coordinators_folder
from site_processes import ENVIRONMENT, Processes, below, until
from site_taps import Tap

from choral.jobs.settings import Settings
from choral.network.door.client import OK, relay
from choral.network.nvflare import ChoralRecipe, write_local
from choral.trainers import Run

ADMIN = "admin@nvidia.com"
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "nvflare" / "job.py"
JOINED = "Successfully registered client"


class DoorSites(Processes):
    """Sites that wait at their doors, and the coordinator's folder, hub."""

    def __init__(self, path: Path, **options: object) -> None:
        self.doors = Path(tempfile.mkdtemp(prefix="doors-"))
        super().__init__(path, **options)  # type: ignore[arg-type]
        self.hub = coordinators_folder(self.federation)
        try:
            for name in self.sites:
                self.wait_for(name)
        except BaseException:
            self.close()
            raise

    def door(self, name: str = "{site}") -> str:
        return str(self.doors / f"{name}.sock")

    def start(self, name: str) -> None:
        words = [sys.executable, "-m", "choral", "join", str(self.path / name), "--local", self.door(name)]
        with (self.path / f"{name}.log").open("ab") as log:
            self.sites[name] = subprocess.Popen(words, stdout=log, stderr=log, env=self._environment, cwd=self.path)

    def wait_for(self, name: str) -> None:
        until(lambda: relay(self.door(name), b"", seconds=1)[:1] == bytes([OK]), f"the door of {name}")

    def start_anew(self, name: str) -> None:
        self.kill(name)
        self.start(name)
        self.wait_for(name)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.doors)

    def recipe(self, job: str, settings: Settings, *, approve: bool = True) -> ChoralRecipe:
        self.job(job, settings, approve=approve)
        return ChoralRecipe(self.path / f"{job}.toml")

    def run(self, job: str) -> Run:
        return Run.load(self.path / "runs" / job)


class Deployment:
    """NVFlare as provisioned: a server and a client beside each site, in processes of their own."""

    def __init__(self, sites: DoorSites) -> None:
        self.sites, self.path = sites, sites.path / "nvflare"
        self.path.mkdir()
        (sites.path / "runs").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.names = sites.federation.names
        (self.path / "project.yml").write_text(_project(port, self.names))
        # NVFlare calls a job whose client died running for so long after its end; 15 minutes, if nothing is said.
        self.environment = {**ENVIRONMENT, "HOME": str(self.path), "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "3"}
        _run([*_nvflare("provision"), "-p", "project.yml", "-w", "made"], self.path, self.environment)
        self.kits = self.path / "made" / "choral" / "prod_00"
        write_local(
            self.kits / "server" / "local", coordinator=str(sites.hub), runs=str(sites.path / "runs"), only=True
        )
        self.taps = {name: Tap(sites.doors / f"{name}.tap", sites.door(name)) for name in self.names}
        for name, tap in self.taps.items():
            write_local(self.kits / name / "local", door=tap.path, only=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self.start("server")
            for name in self.names:
                self.start(name)
            for name in self.names:  # who comes later is in no job that has begun
                until(lambda name=name: JOINED in self.log(name), f"the client of {name}")  # type: ignore[misc]
        except BaseException:
            self.close()
            raise

    def start(self, name: str) -> None:
        kind, more = ("server", []) if name == "server" else ("client", [f"uid={name}"])
        words = [
            sys.executable, "-u", "-m", f"nvflare.private.fed.app.{kind}.{kind}_train", "-m", str(self.kits / name),
            "-s", f"fed_{kind}.json", "--set", "secure_train=true", *more, "org=choral", "config_folder=config",
        ]  # fmt: skip
        with (self.path / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment, cwd=self.path)

    def kill(self, name: str) -> None:
        """The machine is gone: the parent and its job's process at once."""
        for number in (*below(self.processes[name].pid), self.processes[name].pid):
            os.kill(number, signal.SIGKILL)
        self.processes[name].wait()

    def close(self) -> None:
        for name in self.processes:
            if self.processes[name].poll() is None:
                self.kill(name)
        for tap in self.taps.values():
            tap.close()

    def log(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text()

    def job_process(self, name: str) -> int:
        """The process that runs the job at a participant."""
        return below(self.processes[name].pid)[0]

    def submit(self, recipe: ChoralRecipe) -> str:
        """Returns the job's number. In a process of its own, for NVFlare keeps connections."""
        recipe.export(str(self.path / "jobs"))
        return self._admin(f"print('=', session.submit_job({str(self.path / 'jobs' / recipe.name)!r}))")

    def submit_by_example(self, job: str) -> str:
        """The same by examples/nvflare/job.py, for the job file of that name."""
        words = [sys.executable, str(EXAMPLE), str(self.sites.path / f"{job}.toml"), "--kit", str(self.kits / ADMIN)]
        return _run(words, self.path, self.environment).rpartition("job ")[2].split(":")[0]

    def wait(self, number: str) -> str:
        """The job's status at its end."""
        self._admin(f"session.monitor_job({number!r}, timeout=200, poll_interval=0.5); print('=')")
        return self._admin(f"print('=', session.get_job_meta({number!r})['status'])")

    def _admin(self, code: str) -> str:
        text = (
            "from nvflare.fuel.flare_api.flare_api import new_secure_session\n"
            f"session = new_secure_session({ADMIN!r}, {str(self.kits / ADMIN)!r}, timeout=60)\n{code}\nsession.close()"
        )
        said = _run([sys.executable, "-c", text], self.path, self.environment)
        return [line for line in said.splitlines() if line.startswith("=")][-1][1:].strip()


def _run(words: Sequence[str], where: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _nvflare(*words: str) -> list[str]:
    return [sys.executable, "-m", "nvflare.cli", *words]


def _project(port: int, names: Sequence[str]) -> str:
    clients = "".join(f"- {{name: {name}, org: choral, type: client}}\n" for name in names)
    return f"""api_version: 3
name: choral
description: sites behind doors
participants:
- {{name: server, org: choral, type: server, default_host: localhost, fed_learn_port: {port}}}
- {{name: {ADMIN}, org: choral, type: admin, role: project_admin}}
{clients}builders:
- path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  args: {{template_file: [master_template.yml, aws_template.yml, azure_template.yml]}}
- path: nvflare.lighter.impl.static_file.StaticFileBuilder
  args: {{config_folder: config}}
- path: nvflare.lighter.impl.cert.CertBuilder
- path: nvflare.lighter.impl.signature.SignatureBuilder
"""
