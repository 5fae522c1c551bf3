"""The local door: what an engine hands in is the coordinator's or nothing, and what comes back is a reply."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from Crypto.PublicKey import ECC
from site_doors import door, doors
from site_federation import Federation, approved_at, offer_for, rehearsed, same_weights

from choral.errors import ConfigError
from choral.jobs.serving import serve
from choral.network.door import carrier as carrier_module
from choral.network.door.carrier import EngineCarrier
from choral.network.door.client import HEAD, LENGTH, MAGIC, OK, relay, replied
from choral.network.door.sealed import OVERHEAD, sealed, unsealed
from choral.network.door.server import MOST, DoorServer
from choral.network.errors import (
    BusyError,
    MessageTooLargeError,
    PeerFailedError,
    PeerLostError,
    RefusedError,
    RequestTimeoutError,
    SiteError,
    TransportError,
    WrongPeerError,
)

SEED = bytes(range(32))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path."""
    path = Path(tempfile.mkdtemp(prefix="door-"))
    yield path
    shutil.rmtree(path)


class Threads:
    """The least engine: a thread for each site hands the bytes to its door."""

    def __init__(self, doors: Mapping[str, str]) -> None:
        self.doors, self.asked = dict(doors), list[str]()

    def carry(
        self, outbox: Mapping[str, bytes], *, seconds: float, reply_limit: int
    ) -> Iterator[tuple[str, bytes | TransportError]]:
        self.asked += outbox
        with ThreadPoolExecutor() as pool:
            sent = {
                name: pool.submit(relay, self.doors[name], raw, seconds=seconds, reply_limit=reply_limit)
                for name, raw in outbox.items()
            }
            for name, future in sent.items():
                yield name, future.result()

    def alive(self, names: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name in names if relay(self.doors[name], b"", seconds=1)[:1] == bytes([OK]))


def test_a_run_through_doors_has_the_weights_of_federate_bit_by_bit(tmp_path: Path, place: Path) -> None:
    federation = Federation(tmp_path)
    settings = federation.settings()
    offer = offer_for(federation, settings)
    for name in federation.names:
        approved_at(federation, name, offer)
    with doors(federation, place) as found:
        carrier = EngineCarrier(Threads(found), federation.hub, federation.names)
        run = serve(
            settings, carrier, federation.keys, coordinator=federation.hub, out=tmp_path / "run", say=lambda _: None
        )
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3]
    assert same_weights(run, rehearsed(federation, settings))


def test_the_site_process_answers_at_its_door_and_takes_it_away_when_it_ends(tmp_path: Path, place: Path) -> None:
    federation = Federation(tmp_path)
    federation.configure("north", ('address = "127.0.0.1:8443"', ""))
    socket_path = place / "north.sock"
    words = [sys.executable, "-m", "choral", "join", str(tmp_path / "north"), "--local", str(socket_path)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "answers at" not in (line := process.stderr.readline()):
            assert line, "it ended"
        assert socket_path.stat().st_mode & 0o777 == 0o600
        assert replied(relay(str(socket_path), b"", seconds=30), "north") == b""
        seed = ECC.import_key(federation.hub.key_path.read_bytes()).seed
        other = sealed(b"x", SEED, coordinator="hub", site="north")
        own = sealed(b"x", seed, coordinator="hub", site="north")
        assert isinstance(replied(relay(str(socket_path), other, seconds=30), "north"), RefusedError)
        assert isinstance(
            replied(relay(str(socket_path), own, seconds=30), "north"), memoryview
        )  # "refused" by the host
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 0
    assert "its key did not sign for north" in said
    assert not socket_path.exists()


def test_who_joins_without_an_address_must_have_a_door(tmp_path: Path) -> None:
    from choral.cli.sites.serve import join

    federation = Federation(tmp_path)
    federation.configure("north", ('address = "127.0.0.1:8443"', ""))
    with pytest.raises(ConfigError, match="address"):
        join([str(tmp_path / "north")])
    with pytest.raises(ConfigError, match="no user 'nobody-of-that-name'"):
        join([str(tmp_path / "north"), "--local", str(tmp_path / "d"), "--engine-user", "nobody-of-that-name"])


def test_a_request_is_the_coordinators_for_this_site_or_refused() -> None:
    public = ECC.construct(curve="Ed25519", seed=SEED).public_key().export_key(format="raw")
    raw = sealed(b"request", SEED, coordinator="hub", site="north")
    assert len(raw) == OVERHEAD + 7
    assert unsealed(raw, public, coordinator="hub", site="north") == b"request"
    for wrong in [
        {"site": "south"},
        {"coordinator": "other"},
        {"coordinator": "hubn", "site": "orth"},
        {"public": bytes(32)},
        {"public": ECC.generate(curve="Ed25519").public_key().export_key(format="raw")},
    ]:
        with pytest.raises(WrongPeerError):
            unsealed(raw, **{"public": public, "coordinator": "hub", "site": "north"} | wrong)  # type: ignore[arg-type]
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        with pytest.raises(WrongPeerError):
            unsealed(changed, public, coordinator="hub", site="north")
    for short in (b"", raw[:20], raw[:OVERHEAD], b"request"):
        with pytest.raises(WrongPeerError):
            unsealed(short, public, coordinator="hub", site="north")


def test_what_goes_wrong_at_the_door_comes_back_as_an_error_and_never_as_an_exception(place: Path) -> None:
    def handle(raw: memoryview) -> bytes:
        if raw == b"crash":
            raise ValueError("a secret")
        if raw == b"refuse":
            raise WrongPeerError("why")
        if raw == b"wait":
            wait.wait(20)
        return bytes(raw) * 2

    wait = threading.Event()
    with door(place, handle, limit=lambda: 10) as path:
        assert replied(relay(path, b"a request"), "north") == b"a requesta request"
        assert isinstance(replied(relay(path, b"more than ten"), "north"), MessageTooLargeError)
        assert isinstance(replied(relay(path, b"x" * 5_000_000), "north"), MessageTooLargeError)
        assert isinstance(replied(relay(path, b"a request", reply_limit=17), "north"), MessageTooLargeError)
        assert replied(relay(path, b"a request", reply_limit=18), "north") == b"a requesta request"
        assert relay(path, b"crash") == relay(path, b"crash", seconds=5)
        error = replied(relay(path, b"crash"), "north")
        assert isinstance(error, PeerFailedError)
        assert "secret" not in str(error)
        assert str(replied(relay(path, b"refuse"), "north")) == "north: refused"
        assert isinstance(replied(relay(path, b"wait", seconds=0.1), "north"), RequestTimeoutError)
        with ThreadPoolExecutor(MOST) as pool:
            busy = [pool.submit(relay, path, b"wait", seconds=20) for _ in range(MOST)]
            found: object = None
            while not isinstance(found, BusyError):
                found = replied(relay(path, b"again"), "north")
            wait.set()
            assert sum(isinstance(replied(each.result(), "north"), memoryview) for each in busy) >= MOST - 1
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.connect(path)
            other.sendall(b"\0" * HEAD.size)
            assert other.recv(100) == b""
    assert isinstance(replied(relay(path, b"gone"), "north"), PeerLostError)
    assert isinstance(replied(relay("/nowhere/" + "x" * 300, b""), "north"), PeerLostError)
    for strange in (b"", b"\x07", b"\xff", b"\x01more"):
        assert isinstance(replied(strange, "north"), PeerFailedError)


@pytest.mark.parametrize("answer", [b"", LENGTH.pack(0), LENGTH.pack(1 << 40), LENGTH.pack(9) + b"short"])
def test_another_process_at_the_socket_cannot_stop_the_engines_component(answer: bytes, place: Path) -> None:
    path = str(place / "door")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen()

        def once() -> None:
            peer, _ = server.accept()
            with peer:
                assert peer.recv(HEAD.size) == HEAD.pack(MAGIC, 1)
                peer.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        assert isinstance(replied(relay(path, b"x", seconds=5), "north"), PeerLostError | MessageTooLargeError)
        thread.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="the kernel does not say")
def test_another_user_is_let_in_only_if_it_is_named(place: Path) -> None:
    import pwd

    nobody = pwd.getpwnam("nobody").pw_uid
    place.chmod(0o755)
    code = (
        f"import os, socket; os.setgid({nobody}); os.setuid({nobody});"
        f"door = socket.socket(socket.AF_UNIX); door.connect({str(place / 'door')!r});"
        f"door.sendall({HEAD.pack(MAGIC, 1) + b'x'!r}); print(door.recv(100))"
    )

    def ask() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)

    with door(place, bytes):
        assert "PermissionError" in ask().stderr
        (place / "door").chmod(0o666)  # and if the mode were lost
        assert not ask().stdout.startswith("b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02")
    with door(place, bytes, user=nobody):
        assert ask().stdout.startswith("b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02")


def test_a_door_is_made_only_where_nobody_else_can_put_one(place: Path) -> None:
    with door(place, bytes) as path, pytest.raises(SiteError, match="another process answers"):
        DoorServer(Path(path), bytes, request_limit=lambda: 1)
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(path)  # of a process that was killed
    left.close()
    with door(place, bytes):
        pass
    (place / "door").write_text("precious")
    with pytest.raises(SiteError, match="no socket"):
        DoorServer(place / "door", bytes, request_limit=lambda: 1)
    assert (place / "door").read_text() == "precious"
    with pytest.raises(SiteError, match="longer than"):
        DoorServer(place / ("x" * 200), bytes, request_limit=lambda: 1)
    with pytest.raises(SiteError, match="cannot be used"):
        DoorServer(place / "none" / "door", bytes, request_limit=lambda: 1)
    (place / "open").mkdir()
    (place / "open").chmod(0o770)
    (place / "link").symlink_to(place)
    for folder in ("open", "link"):
        with pytest.raises(SiteError, match="other users"):
            DoorServer(place / folder / "new", bytes, request_limit=lambda: 1)


def test_who_was_lost_is_not_asked_before_it_is_there_again(tmp_path: Path, place: Path) -> None:
    federation = Federation(tmp_path)
    (place / "north").mkdir()
    engine = Threads({name: str(place / name / "door") for name in federation.names})
    carrier = EngineCarrier(engine, federation.hub, federation.names)
    assert carrier.connected == {"north", "south", "east"}
    found = dict(carrier.replies({"north": b"x", "south": b"x"}, timeout=0.2, reply_limit=100))
    assert all(isinstance(error, PeerLostError) for error in found.values())
    assert carrier.connected == {"east"}
    assert carrier.calls("north") == 1
    assert carrier.wait_for(["north"], timeout=0.1) == frozenset()
    with door(place / "north", bytes, limit=lambda: 1000):
        time.sleep(carrier_module._LOOK)
        assert carrier.calls("north") == 2  # before anything else of it is asked
        assert carrier.wait_for(["north", "south"], timeout=30, count=1) == {"north"}
        assert carrier.calls("north") == 2
        assert carrier.calls("south") == 1
        said: list[tuple[str, ...]] = []
        ((_, answer),) = carrier.replies({"north": b"x" * 100}, timeout=5, reply_limit=200, waiting=said.append)
        assert isinstance(answer, memoryview)
        assert len(answer) == OVERHEAD + 100
        ((_, answer),) = carrier.replies({"north": b"x" * 121}, timeout=5, reply_limit=200)
        assert isinstance(answer, MessageTooLargeError)
        assert carrier.connected == {"north", "east"}
    assert engine.asked == ["north", "south", "north", "north"]


def test_the_engines_end_imports_nothing_but_the_standard_library_and_errors() -> None:
    code = (
        "import sys, time; before = time.process_time(); import choral.network.door.client;"
        "spent = time.process_time() - before;"
        "print(spent, [name for name in sys.modules if name.startswith('choral.')],"
        "[name for name in ('torch', 'numpy', 'msgspec', 'Crypto') if name in sys.modules])"
    )
    spent, rest = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        maxsplit=1
    )
    assert float(spent) < 0.1
    own = ["lazy", "network", "network.door", "errors", "network.errors", "network.door.client"]
    assert rest.strip() == f"{[f'choral.{name}' for name in own]} []"
