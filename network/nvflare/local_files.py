"""What of a participant's own `local/` folder in NVFlare is Choral's. Nothing that a job brings changes it.

    local/choral.json      {"door": "/run/choral/north.sock"} at a site, {"coordinator": "/srv/hub"} at the server
    local/resources.json   class_allow_list: which components may be built from a job's configuration

    python -m choral.network.nvflare.local_files /opt/nvflare/north/local --door /run/choral/north.sock

NVFlare builds only classes that the list names, unless it lets jobs bring code of their own (BYOC). A site whose list
has Choral's component alone, and whose policy refuses BYOC, runs nothing that the coordinator wrote.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from choral.network.errors import SiteError

FILE = "choral.json"
SITE, SERVER = "choral.network.nvflare.site.ChoralSite", "choral.jobs.engines.nvflare_job.ChoralServer"
_LOGS = "nvflare.app_common.logging"
NVFLARES_OWN = [f"{_LOGS}.job_log_streamer.JobLogStreamer", f"{_LOGS}.job_log_receiver.JobLogReceiver"]
"""What NVFlare itself adds to a job: the log of its own process at a site, for the server."""
_ALLOWED = "class_allow_list"
_KEYS = {"door", "coordinator", "runs"}


def read_local(local: Path) -> dict[str, str]:
    """choral.json. Raises: SiteError for one that is missing or says something else."""
    path = local / FILE
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise SiteError(f"{path} cannot be read", hint='{"door": SOCKET} at a site, {"coordinator": FOLDER}') from None
    if not isinstance(found, dict) or set(found) - _KEYS or not all(isinstance(each, str) for each in found.values()):
        raise SiteError(f"{path}: expected an object with texts under {', '.join(sorted(_KEYS))}")
    return found


def write_local(
    local: str | Path, *, door: str = "", coordinator: str = "", runs: str = "", only: bool = False
) -> None:
    """Write choral.json, and allow the components that it is for.

    local: the participant's `local` folder. door: of the site's process; "{site}" in it stands for the site's name.
    coordinator: the folder of the coordinator's identity and directory. runs: where its run folders go, instead of the
    job's own folder. only: allow nothing else but what NVFlare adds by itself, instead of what the list has.

    Raises: SiteError if the folder is not there, or its resources cannot be read.
    """
    local = Path(local)
    allowed = ([SITE] if door else []) + ([SERVER] if coordinator else [])
    if not allowed:
        raise SiteError("neither a door nor a coordinator was given")
    path = local / "resources.json"
    resources = _resources(local)
    before = NVFLARES_OWN if only else resources[_ALLOWED] if _ALLOWED in resources else _default_list()
    resources[_ALLOWED] = [*(name for name in before if name not in allowed), *allowed]
    said = {name: text for name, text in (("door", door), ("coordinator", coordinator), ("runs", runs)) if text}
    try:
        path.write_text(json.dumps(resources, indent=2) + "\n")
        (local / FILE).write_text(json.dumps(said, indent=2) + "\n")
    except OSError as error:
        raise SiteError(f"{error.filename} cannot be written: {error.strerror}") from None


def _resources(local: Path) -> dict[str, Any]:
    for name in ("resources.json", "resources.json.default"):
        path = local / name
        if path.is_file():
            try:
                found = json.loads(path.read_bytes())
            except (OSError, ValueError):
                found = None
            if not isinstance(found, dict):
                raise SiteError(f"{path} cannot be read")
            return found
    return {"format_version": 2}


def _default_list() -> list[str]:
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    return list(DEFAULT_CLASS_ALLOW_LIST)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write choral.json into a local/ folder of NVFlare.")
    parser.add_argument("local", type=Path)
    parser.add_argument("--door", default="", help="socket of `choral join --local`, at a site")
    parser.add_argument(
        "--coordinator", default="", help="folder of the coordinator's key and directory, at the server"
    )
    parser.add_argument("--runs", default="", help="where the coordinator's run folders go")
    parser.add_argument("--only", action="store_true", help="allow no other component of jobs here")
    given = vars(parser.parse_args(words))
    for name in ("door", "coordinator", "runs"):
        given[name] = given[name] and os.path.abspath(given[name])
    write_local(**given)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
