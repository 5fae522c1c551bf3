"""What of NVFlare the adapter touches: as it was recorded, and as it is where NVFlare is installed.

Without NVFlare, modules of the same names are put in its place that hold what was recorded and nothing else. So what is
tested without the engine is tested against its own shapes, and `make test-engines` tests that those are still its own.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = Path(__file__).parent / "network" / "nvflare" / "recorded.json"
HERE = importlib.util.find_spec("nvflare") is not None
CALLS = {  # what is called on NVFlare's objects, and what NVFlare calls on ours
    "nvflare.private.fed.server.server_engine.ServerEngine": ["send_aux_request", "get_client_from_name"],
    "nvflare.private.fed.client.client_run_manager.ClientRunManager": ["register_aux_message_handler"],
    "nvflare.apis.executor.Executor": ["execute", "handle_event", "log_error"],
    "nvflare.apis.impl.controller.Controller": ["control_flow", "start_controller", "stop_controller", "system_panic",
                                                "log_info"],
    "nvflare.apis.fl_context.FLContext": ["get_engine", "get_identity_name", "get_run_abort_signal", "get_workspace",
                                          "get_job_id"],
    "nvflare.apis.workspace.Workspace": ["get_site_config_dir", "get_run_dir"],
    "nvflare.job_config.fed_job_config.FedJobConfig": ["_get_class_path"],
}  # fmt: skip
CODES = ("OK", "TIMEOUT", "COMMUNICATION_ERROR", "TOPIC_UNKNOWN", "HANDLER_EXCEPTION", "TASK_UNKNOWN")


def of_the_engine() -> dict[str, Any]:
    """The shapes of the NVFlare that is installed."""
    import nvflare
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import ReturnCode
    from nvflare.apis.shareable import make_reply

    calls = {}
    for path, names in CALLS.items():
        module, _, kind = path.rpartition(".")
        found = getattr(importlib.import_module(module), kind)
        calls[path] = {name: list(inspect.signature(getattr(found, name)).parameters) for name in names}
    return {
        "version": nvflare.__version__,
        "start": EventType.START_RUN,
        "calls": calls,
        "replies": {code: dict(make_reply(getattr(ReturnCode, code))) for code in CODES},
    }


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def put_in_place(monkeypatch: Any) -> None:
    """Modules that hold what was recorded, where NVFlare is not installed."""
    if HERE:
        return
    shapes = recorded()
    header, code = next((key, next(iter(value))) for key, value in shapes["replies"]["OK"].items())

    class Shareable(dict[str, Any]):
        def get_return_code(self) -> str:
            return str(self[header][code])

    class Executor:
        def __init__(self) -> None:
            self.logged: list[str] = []

        def log_error(self, fl_ctx: Any, msg: str, fire_event: bool = True) -> None:
            self.logged.append(msg)

    found = {
        "nvflare.apis.event_type": {"EventType": type("EventType", (), {"START_RUN": shapes["start"]})},
        "nvflare.apis.executor": {"Executor": Executor},
        "nvflare.apis.fl_constant": {"ReturnCode": type("ReturnCode", (), {name: name for name in CODES})},
        "nvflare.apis.fl_context": {"FLContext": object},
        "nvflare.apis.shareable": {
            "Shareable": Shareable,
            "make_reply": lambda name: Shareable(json.loads(json.dumps(shapes["replies"][name]))),
        },
        "nvflare.apis.signal": {"Signal": object},
    }
    for name in ("nvflare", "nvflare.apis", *found):
        module = ModuleType(name)
        vars(module).update(found.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("site", "messages"):
        monkeypatch.delitem(sys.modules, f"choral.network.nvflare.{name}", raising=False)


def write() -> None:
    """Record anew: `python tests/nvflare_shapes.py`, in the environment of the engine."""
    FILE.write_text(json.dumps(of_the_engine(), indent=1) + "\n")


if __name__ == "__main__":
    write()
