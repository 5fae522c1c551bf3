"""NVFlare's component and messages against its recorded shapes: no engine is needed here."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nvflare_shapes
import pytest
from site_doors import coordinators_folder, door, doors
from site_federation import Federation, approved_at, offer_for, rehearsed, same_weights

from choral.jobs.serving import serve_by_engine
from choral.jobs.settings import ServeSettings
from choral.network.errors import (
    PeerFailedError,
    PeerLostError,
    RequestTimeoutError,
    SiteError,
    TransportError,
)
from choral.network.nvflare.local_files import SERVER, SITE, main, read_local, write_local
from choral.trainers import Participation
from choral.trainers.task.settings import Training


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    nvflare_shapes.put_in_place(monkeypatch)


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="nv-"))
    yield path
    shutil.rmtree(path)


class Context:
    """As NVFlare's: of the server, or of a site's component."""

    def __init__(self, engine: Any, name: str = "server", local: Path = Path()) -> None:
        self.engine, self.name, self.local, self.triggered = engine, name, local, False

    def get_engine(self, default: Any = None) -> Any:
        return self.engine

    def get_identity_name(self, default: str = "") -> str:
        return self.name

    def get_run_abort_signal(self) -> Any:
        return self

    def get_workspace(self) -> Any:
        return self

    def get_site_config_dir(self) -> str:
        return str(self.local)

    def __getattr__(self, name: str) -> Any:
        """What NVFlare's own log asks for, where it is installed."""
        if not nvflare_shapes.HERE or name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Loop:
    """NVFlare's server and clients in one process. wrong: called with a site's name and whether it is a ping; what it
    returns is the recorded reply that comes instead of the site's.
    """

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}
        self.wrong: Any = lambda name, ping: ""
        self.after: Any = lambda name: ""

    def client(self, name: str, local: Path) -> Any:
        """The component of a site, started."""
        from choral.network.nvflare.site import ChoralSite

        outer = self

        class Client:
            def register_aux_message_handler(self, topic: str, message_handle_func: Any) -> None:
                assert topic == "choral.request"
                outer.handlers[name] = message_handle_func

            def get_workspace(self) -> Any:
                return Context(self, name, local)

        made, start = ChoralSite(), nvflare_shapes.recorded()["start"]
        made.handle_event("something else", Context(None))  # which has no engine
        made.handle_event(start, Context(Client(), name, local))
        return made

    def get_client_from_name(self, client_name: str) -> Any:
        return client_name if client_name in self.handlers else None

    def send_aux_request(
        self,
        targets: list[str],
        topic: str,
        request: Any,
        timeout: float,
        fl_ctx: Any,
        optional: bool = False,
        secure: bool = False,
    ) -> dict[str, Any] | None:
        from nvflare.apis.shareable import make_reply

        (name,) = targets
        assert timeout > request["choral.seconds"]
        if code := self.wrong(name, not request["choral.request"]):
            return {name: make_reply(code)} if code != "nothing" else None
        reply = self.handlers[name](topic=topic, request=request, fl_ctx=fl_ctx)
        if request["choral.request"] and (code := self.after(name)):
            return {name: make_reply(code)}
        return {name: reply}


def messages(loop: Loop, **options: Any) -> Any:
    from choral.network.nvflare.messages import NVFlareMessages

    return NVFlareMessages(Context(loop), **options)


@pytest.mark.skipif(not nvflare_shapes.HERE, reason="run by `make test-engines`, against NVFlare itself")
def test_the_shapes_are_still_those_of_nvflare() -> None:
    found, recorded = nvflare_shapes.of_the_engine(), nvflare_shapes.recorded()
    assert found == recorded, "record anew and look at what changed: python tests/nvflare_shapes.py"


def test_what_stands_in_for_nvflare_here_has_its_shapes() -> None:
    calls = nvflare_shapes.recorded()["calls"]
    known = {name: parameters for found in calls.values() for name, parameters in found.items()}
    from choral.network.nvflare.site import ChoralSite

    for kind in (Loop, Context, ChoralSite):
        for name, function in vars(kind).items():
            if name in known:
                assert list(inspect.signature(function).parameters) == known[name], name


def strike(loop: Loop, round_now: list[int], way: str, code: str, step: int) -> None:
    """South's message of that number in round 2: something becomes of it, on its way there or back."""
    count = [0]

    def struck(name: str, here: str) -> str:
        if name != "south" or round_now[0] != 2 or way != here:
            return ""
        count[0] += 1
        return code if count[0] == step else ""

    loop.wrong = lambda name, ping: "" if ping else struck(name, "there")
    loop.after = lambda name: struck(name, "back")


def test_a_run_by_nvflares_messages_is_exact_whatever_becomes_of_one(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step of a round: lost, late, or not understood. The sum is over whoever's vector came, exactly."""
    monkeypatch.setattr("choral.network.door.carrier._LOOK", 0.05)
    federation = Federation(tmp_path)
    hub = coordinators_folder(federation)
    usual = federation.settings(
        training=Training(rounds=3, batch_size=8, learning_rate=0.1), participation=Participation(patience=2)
    )
    without: list[dict[int, list[str]]] = [{}, {2: ["south"]}]
    expected = [rehearsed(federation, usual, without=out) for out in without]
    loop, round_now, outcomes = Loop(), [0], []

    def say(text: str) -> None:
        round_now[0] += text.startswith("round ")

    trials = [
        ("", "", 0), ("there", "COMMUNICATION_ERROR", 1), ("back", "TIMEOUT", 2), ("there", "nothing", 2),
        ("back", "HANDLER_EXCEPTION", 3), ("back", "COMMUNICATION_ERROR", 4), ("there", "TOPIC_UNKNOWN", 5),
    ]  # fmt: skip
    with doors(federation, place) as found:
        for name, socket in found.items():
            (local := tmp_path / "local" / name).mkdir(parents=True)
            (local / "choral.json").write_text(json.dumps({"door": socket}))
            loop.client(name, local)
        for number, trial in enumerate(trials):
            settings = replace(usual, serve=ServeSettings(job=f"job-{number}", wait=10, step=5, training=30))
            offer = offer_for(federation, settings)
            for name in federation.names:
                approved_at(federation, name, offer)
            strike(loop, round_now, *trial)
            round_now[0] = 1
            run = serve_by_engine(messages(loop), settings, hub, out=tmp_path / f"run-{number}", say=say)
            survivors = [entry.survivors for entry in run.history]
            assert survivors in ([0, 3, 3, 3], [0, 3, 2, 3]), trial
            assert same_weights(run, expected[3 - survivors[2]]), trial
            outcomes.append(survivors[2])
    assert outcomes == [3, 2, 2, 2, 3, 3, 3]


def test_every_answer_of_nvflare_is_a_reply_or_an_error(place: Path) -> None:
    from nvflare.apis.shareable import make_reply

    from choral.network.nvflare.messages import read_reply

    kinds = {
        "TIMEOUT": RequestTimeoutError, "COMMUNICATION_ERROR": PeerLostError, "TOPIC_UNKNOWN": PeerLostError,
        "HANDLER_EXCEPTION": PeerFailedError, "OK": PeerFailedError,
    }  # fmt: skip
    for code, kind in kinds.items():
        assert type(read_reply(make_reply(code), "north", 1)) is kind
    assert isinstance(read_reply(None, "north", 1), RequestTimeoutError)
    for strange in ("text", None, 7, [b"x"]):
        reply = make_reply("OK")
        reply["choral.reply"] = strange
        assert isinstance(read_reply(reply, "north", 1), PeerFailedError)
    loop = Loop()
    (found,) = messages(loop).carry({"north": b"x"}, seconds=1, reply_limit=1)
    assert isinstance(found[1], PeerLostError)
    del place


def test_the_component_answers_whatever_comes_and_never_ends_its_process(place: Path) -> None:
    from nvflare.apis.shareable import make_reply

    loop = Loop()
    bare = loop.client("north", place)  # whose local/ has no choral.json
    reply = bare.answer("choral.request", {"choral.request": b"x", "choral.seconds": 1, "choral.limit": 10}, None)
    assert reply["choral.reply"] == b"\1"
    with door(place, bytes) as path:
        (place / "choral.json").write_text(json.dumps({"door": path.replace("/door", "/{site}")}))
        (place / "north").symlink_to(path)
        made = loop.client("north", place)
        right = {"choral.request": b"x", "choral.seconds": 5, "choral.limit": 10}
        assert made.answer("choral.request", right, None)["choral.reply"] == b"\0x"
        for wrong in ({}, {**right, "choral.seconds": "soon"}, {**right, "choral.limit": None},
                      {**right, "choral.request": 7}, {**right, "choral.request": "text"}):  # fmt: skip
            assert made.answer("choral.request", wrong, None)["choral.reply"] in (b"\1", b"\4")
        assert made.execute("train", {}, None, None) == make_reply("TASK_UNKNOWN")


def test_who_is_silent_is_asked_and_lost_before_a_training_would_be_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from choral.network.nvflare import messages as module

    monkeypatch.setattr(module, "_BEAT", 0.05)
    monkeypatch.setattr(module, "_LOOK", 0.2)
    loop, gone, forever = Loop(), threading.Event(), threading.Event()

    given_up = threading.Event()

    class Answer(dict[str, Any]):
        def get_return_code(self) -> str:
            return "OK"

    def handle(topic: str, request: Any, fl_ctx: Any) -> Any:
        if not request["choral.request"]:
            return Answer({"choral.reply": b"\0"})
        gone.wait(0.5)  # it trains
        return Answer({"choral.reply": b"\0done"})

    def silent(topic: str, request: Any, fl_ctx: Any) -> Any:
        while not fl_ctx.get_run_abort_signal().triggered and not forever.wait(0.01):
            pass
        given_up.set()

    loop.handlers = {"north": handle, "south": silent}
    begun = time.monotonic()
    found = dict(messages(loop, away=0.3).carry({"north": b"x", "south": b"x"}, seconds=3600, reply_limit=10))
    assert time.monotonic() - begun < 20
    assert found["north"] == b"\0done"
    assert isinstance(found["south"], PeerLostError)
    assert given_up.wait(20)  # NVFlare's process could not end before
    forever.set()


def test_an_aborted_job_ends_the_run_as_an_interrupt() -> None:
    from choral.network.nvflare.messages import Aborted, NVFlareMessages

    loop = Loop()
    loop.handlers = {"north": lambda **_: None}
    context = Context(loop)
    context.triggered = True
    with pytest.raises(Aborted):
        list(NVFlareMessages(context).carry({"north": b"x"}, seconds=1, reply_limit=1))
    assert issubclass(Aborted, KeyboardInterrupt)
    assert not issubclass(Aborted, TransportError)


def test_local_files_name_the_door_and_allow_the_component_and_no_more_than_said(tmp_path: Path) -> None:
    (tmp_path / "resources.json.default").write_text('{"format_version": 2, "class_allow_list": ["a.B"], "x": 1}')
    write_local(tmp_path, door="/run/{site}.sock")
    assert read_local(tmp_path) == {"door": "/run/{site}.sock"}
    assert json.loads((tmp_path / "resources.json").read_text()) == {
        "format_version": 2,
        "class_allow_list": ["a.B", SITE],
        "x": 1,
    }
    assert main([str(tmp_path), "--coordinator", "/srv/hub", "--runs", "/srv/runs", "--only"]) == 0
    assert read_local(tmp_path) == {"coordinator": "/srv/hub", "runs": "/srv/runs"}
    allowed = json.loads((tmp_path / "resources.json").read_text())["class_allow_list"]
    assert SERVER in allowed
    assert "a.B" not in allowed
    for text in ("", "[]", '{"door": 1}', '{"other": "x"}'):
        (tmp_path / "choral.json").write_text(text)
        with pytest.raises(SiteError):
            read_local(tmp_path)
    with pytest.raises(SiteError, match="neither"):
        write_local(tmp_path)
    (tmp_path / "resources.json").write_text("[")
    with pytest.raises(SiteError, match="cannot be read"):
        write_local(tmp_path, door="x")
