"""What NVFlare runs at a site: it hands bytes to the site's process and takes bytes back, and knows nothing of them.

Any death of its process but with exit code 0 ends the whole job for everybody, `min_clients` or not. So nothing is
computed here, and whatever goes wrong comes back as a status.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from choral.network.door.client import FAILED, relay
from choral.network.nvflare.local_files import read_local

TOPIC = "choral.request"
REQUEST, SECONDS, LIMIT, REPLY = "choral.request", "choral.seconds", "choral.limit", "choral.reply"


class ChoralSite(Executor):  # type: ignore[misc]  # NVFlare has no types
    """See the module. It has no arguments: where the site's door is stands in the site's own `local/choral.json`."""

    def __init__(self) -> None:
        super().__init__()
        self._door = ""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != EventType.START_RUN:
            return
        try:
            engine = fl_ctx.get_engine()
            engine.register_aux_message_handler(TOPIC, self.answer)
            local = Path(engine.get_workspace().get_site_config_dir())
            self._door = read_local(local).get("door", "").replace("{site}", fl_ctx.get_identity_name())
        except Exception as error:
            self.log_error(fl_ctx, f"Choral has no door here: {error}", fire_event=False)

    def answer(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:  # noqa: ARG002
        """One request of the coordinator."""
        reply = make_reply(ReturnCode.OK)
        try:
            raw, seconds, limit = request[REQUEST], float(request[SECONDS]), int(request[LIMIT])
            reply[REPLY] = relay(self._door, raw, seconds=seconds, reply_limit=limit)
        except Exception:
            reply[REPLY] = bytes([FAILED])
        return reply

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:  # noqa: ARG002
        """There are no tasks: requests come as they are made, and nobody polls."""
        return make_reply(ReturnCode.TASK_UNKNOWN)


def asked(raw: bytes, *, seconds: float, limit: int) -> Any:
    """A request for `answer`."""
    request = Shareable()
    request[REQUEST], request[SECONDS], request[LIMIT] = raw, seconds, limit
    return request
