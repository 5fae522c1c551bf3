"""After a round whose session is gone no object of the process holds a secret of it; a forked process answers nothing.

What is searched: everything that the garbage collector knows, and all that is reachable from it (bytes, arrays of
numpy, ctypes and torch, views, the dictionaries of threads, closures and caches). Memory that was freed is not: Python
does not wipe what it frees.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES

from choral.protocols import Homomorphic, Masked, SumSpec
from choral.protocols.crypto import keys
from choral.protocols.crypto import mask_stream as stream
from choral.protocols.crypto.mask_stream_device import _add_with_torch, _rounds
from choral.protocols.homomorphic import FloatSpec, FloatSum
from choral.protocols.homomorphic.ring import choose_kernels as ring_kernels
from choral.protocols.homomorphic.shared import seal_files
from choral.protocols.masking import signing

SPEC = SumSpec(parties=("north", "south", "east"), length=40, bound=2**40)
LONG = SumSpec(parties=("north", "south"), length=20_000, bound=2**40)


HOLDING = (bytes, bytearray, np.ndarray, memoryview, ctypes.Array, torch.Tensor)


def contents(value: Any) -> bytes | None:
    """The bytes of an object that holds any."""
    kind = type(value)  # not isinstance, which asks proxies for what they stand for
    if issubclass(kind, bytes | bytearray):
        return bytes(value)
    try:
        if issubclass(kind, np.ndarray):
            return None if value.dtype.hasobject else np.ndarray.tobytes(value)
        if issubclass(kind, memoryview):
            return bytes(value)
        if issubclass(kind, ctypes.Array):
            return bytes(memoryview(value).cast("B"))
        if issubclass(kind, torch.Tensor) and value.device.type == "cpu":
            return bytes(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    except (ValueError, RuntimeError, TypeError, BufferError, ReferenceError):
        return None
    return None


def everything() -> Iterator[Any]:
    """All objects of kinds that hold bytes, among millions: a layer of referents at a time, each in few calls of C."""
    gc.collect()
    # Until 3.12.5 to ask the module _asyncio what it refers to freed what it does not own (CPython's issue 122695). Its
    # dictionary is among the objects of the collector.
    odd = sys.modules.get("_asyncio")
    # All layers are kept to the end, so that no number of an object comes twice.
    layers = [[value for value in gc.get_objects() if value is not odd]]
    seen: set[int] = set()
    seen |= {id(layers), id(seen), id(odd)}
    while layers[-1]:
        layer = layers[-1]
        seen.update(map(id, layer))
        kinds = {kind for kind in set(map(type, layer)) if issubclass(kind, HOLDING)}
        yield from [value for value in layer if type(value) in kinds]
        referents = gc.get_referents(*layer)
        numbered = dict(zip(map(id, referents), referents, strict=True))
        layers.append([numbered[number] for number in numbered.keys() - seen])


class Watched:
    """Every secret of a round as it is drawn or derived, kept as numbers so that this list is not found itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import secrets

        self._numbers: dict[str, list[int]] = {}
        draw, pair, seal = secrets.token_bytes, signing.pair_seed, signing.seal_key

        def drawn(size: int) -> bytes:
            return self.note("drawn", draw(size)) if size >= 16 else draw(size)

        monkeypatch.setattr(secrets, "token_bytes", drawn)
        monkeypatch.setattr(signing, "pair_seed", lambda *given: self.note("mask seed of a pair", pair(*given)))
        monkeypatch.setattr(signing, "seal_key", lambda *given: self.note("key of a packet", seal(*given)))

    def note(self, what: str, secret: bytes) -> bytes:
        for start in range(0, min(len(secret), 64), 16):
            if len(piece := secret[start : start + 16]) == 16 and any(piece):
                self._numbers.setdefault(what, []).append(int.from_bytes(piece, "little"))
        return secret

    def note_streams(self) -> None:
        """The beginnings and ends of the key streams of all seeds, as pycryptodome's counter mode makes them."""
        halves = [*self._numbers.get("drawn", []), *self._numbers.get("mask seed of a pair", [])]
        for key, start in zip(halves[::2], halves[1::2], strict=False):
            cipher = AES.new(
                key.to_bytes(16, "little"), AES.MODE_CTR, nonce=b"", initial_value=start.to_bytes(16, "little")
            )
            self.note("key stream", cipher.encrypt(bytes(64)))

    def left(self) -> set[str]:
        """Which secrets are still somewhere."""
        needles = {number.to_bytes(16, "little"): what for what, held in self._numbers.items() for number in held}
        own = {id(needles), *map(id, needles)}
        found = set()
        for value in everything():
            if id(value) in own or len(raw := contents(value) or b"") < 16:
                continue
            found |= {what for needle, what in needles.items() if needle in raw}
        return found


def vector(watched: Watched, length: int, place: int) -> Any:
    made = np.random.default_rng(place).integers(-(2**39), 2**39, length)
    watched.note("vector", made.tobytes()[:64])
    return made


def one_round(session: Any, spec: Any, watched: Watched, lost: str | None = None) -> None:
    summing = session.begin()
    for place, party in enumerate(spec.parties):
        if party != lost:
            summing.submit(party, vector(watched, spec.length, place))
    summing.finish()


def backends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name not in keys.BACKENDS:
        pytest.skip("pycryptodome below 4 has no X25519")
    monkeypatch.setattr(keys, "_backend", keys.BACKENDS[name])
    monkeypatch.setattr(stream, "_keystream", stream.BACKENDS[name])


BOTH = pytest.mark.parametrize("backend", ["pycryptodome", "openssl"])


HOLDERS: dict[str, Callable[[bytes], Any]] = {
    "cache": lambda secret: (kept := lru_cache(len), kept(secret)),
    "array": lambda secret: np.frombuffer(secret, np.uint8).copy()[::1],
    "view": lambda secret: memoryview(bytearray(secret)),
    "ctypes": lambda secret: ctypes.create_string_buffer(secret),
    "closure": lambda secret: lambda: secret,
    "tensor": lambda secret: torch.frombuffer(bytearray(secret), dtype=torch.uint8),
    "local": lambda secret: setattr(LOCAL, "kept", np.frombuffer(secret, np.uint8).copy()),
}
LOCAL = threading.local()


def test_the_search_finds_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    held = {
        where: hold(watched.note(where, np.random.default_rng(place).bytes(32)))
        for place, (where, hold) in enumerate(HOLDERS.items())
    }
    assert watched.left() == set(held)
    del held
    LOCAL.__dict__.clear()
    assert watched.left() == set()


@BOTH
def test_a_masked_round_leaves_no_secret(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    backends(monkeypatch, backend)
    watched = Watched(monkeypatch)
    session: Any = Masked().open(SPEC)
    one_round(session, SPEC, watched)
    one_round(session, SPEC, watched, lost="south")
    assert "drawn" in watched.left()  # the next round's keys and the parties' identities
    del session
    watched.note_streams()
    assert watched.left() == set()


@BOTH
def test_a_stream_leaves_nothing_of_long_and_short_vectors(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    backends(monkeypatch, backend)
    watched = Watched(monkeypatch)
    for length in (1, 3, 4096, 70_000, 200_000):
        for use in (stream.add_mask, lambda total, seed: stream.expand(seed, total.size, total.dtype)):
            seed = watched.note("seed", np.random.default_rng(length).bytes(32))
            use(np.zeros(length, np.uint64), seed)
            whole = stream.expand(seed, length, np.uint64).tobytes()
            watched.note("key stream", whole[:64])
            watched.note("key stream", whole[-64:])
            del whole, seed
    assert watched.left() == set()


def test_the_stream_of_a_device_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    seed = watched.note("seed", np.random.default_rng(5).bytes(32))
    total = torch.zeros(5000, dtype=torch.int64)
    _add_with_torch(total, seed, subtract=False, offset=0, rounds=_rounds)
    watched.note("key stream", total.numpy().tobytes()[:64])
    del seed, total
    assert watched.left() == set()


@pytest.mark.parametrize(("backend", "numba"), [("openssl", True), ("pycryptodome", False)])
def test_a_split_key_round_leaves_no_secret(monkeypatch: pytest.MonkeyPatch, backend: str, numba: bool) -> None:
    backends(monkeypatch, backend)
    if not numba:
        from choral.protocols.homomorphic.ring import gaussian
        from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels
        from choral.protocols.homomorphic.split import party_and_server as split

        for module in (gaussian, split):
            monkeypatch.setattr(module, "kernels", lambda device="cpu": TorchKernels(device))
    else:
        pytest.importorskip("numba")
    watched = Watched(monkeypatch)
    session: Any = Homomorphic().open(LONG)
    one_round(session, LONG, watched)
    del session
    watched.note_streams()
    assert watched.left() == set()
    assert ring_kernels.kernels() is not None


def scratch_of_seal() -> bytes:
    """What SEAL's file in memory and the buffer beside it still hold."""
    held = seal_files.scratch()
    import os

    raw = os.pread(held._file, 1 << 24, 0)
    room = getattr(seal_files._local, "room", None)
    return raw + (bytes(room) if room is not None else b"")


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_a_shared_key_round_leaves_no_secret_in_memory_or_in_seals_files(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    watched = Watched(monkeypatch)
    session: Any
    if scheme == "bfv":
        session = Homomorphic(key="shared").open(SPEC)
        one_round(session, SPEC, watched)
    else:
        session = FloatSum().open(FloatSpec(parties=SPEC.parties, length=40, bound=1.0, precision=1e-4))
        summing = session.begin()
        for party in SPEC.parties:
            summing.submit(party, np.linspace(-1, 1, 40))
        summing.finish()
        del summing
    assert not any(scratch_of_seal())
    del session
    assert watched.left() == set()


def test_a_party_that_made_a_key_and_dropped_out_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from choral.protocols.homomorphic.shared.seal import RingKey, RingParameters, SealRing, primes_of

    primes = primes_of(2048, (54,))
    key = RingKey.from_seed(SealRing(RingParameters("bfv", 2048, primes, 0, 65537)), bytes(range(32)))
    assert not any(scratch_of_seal())
    del key


# --------------------------------------------------------------------------------------------------------------- fork

FORKED = """
import os, sys
import numpy as np
from choral.errors import ChoralError
from choral.protocols import Homomorphic, Masked, SumSpec
from choral.protocols.errors import StateUsedError

spec = SumSpec(parties=("a", "b", "c"), length=4, bound=10)
kind = {kind}
session = kind.open(spec)
summing = session.begin()
for party in spec.parties[:2]:
    summing.submit(party, np.array([1, 2, 3, 4]))

def child():
    refused = 0
    for use in (
        lambda: summing.submit("c", np.array([1, 2, 3, 4])),
        lambda: summing.finish(),
        lambda: session.begin().submit("a", np.array([1, 2, 3, 4])),
    ):
        try:
            use()
        except StateUsedError as error:
            refused += "fork" in str(error)
    os._exit(refused)

process = os.fork()
if process == 0:
    child()
code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
summing.submit("c", np.array([1, 2, 3, 4]))
print(code, summing.finish().total.tolist())
"""


@pytest.mark.parametrize("kind", ["Masked()", "Homomorphic()", 'Homomorphic(key="shared")'])
def test_a_forked_process_answers_from_no_state_and_its_parent_goes_on(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKED.format(kind=kind))], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[0] == "3 [3, 6, 9, 12]", done.stderr[-2000:]


NOISE = """
import os, sys
from choral.privacy.noise.gaussian import gaussian, os_stream

reader, writer = os.pipe()
before = os_stream(32)
process = os.fork()
if process == 0:
    os.write(writer, os_stream(32) + gaussian(4, os_stream).tobytes())
    os._exit(0)
os.waitpid(process, 0)
child = os.read(reader, 64)
parent = os_stream(32) + gaussian(4, os_stream).tobytes()
print(len(child), len({before, child[:32], parent[:32]}), child[32:] != parent[32:])
"""


def test_a_forked_process_draws_noise_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "64 3 True", done.stderr[-2000:]
