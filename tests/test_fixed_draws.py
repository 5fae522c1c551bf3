"""What the operating system's generator gives to a test is the same each time: see conftest.py."""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys

import pytest
from numpy.random import default_rng

fixed = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE", "fixed") != "fixed", reason="draws anew each time")


@fixed
def test_all_doors_to_the_generator_lead_to_the_stream_of_this_test(request: pytest.FixtureRequest) -> None:
    stream = random.Random(request.node.nodeid)
    assert os.urandom(8) == stream.randbytes(8)
    assert secrets.token_bytes(32) == stream.randbytes(32)
    assert random.SystemRandom().getrandbits(64) == int.from_bytes(stream.randbytes(8))
    seeded = default_rng(int.from_bytes(stream.randbytes(16)))
    assert default_rng().bytes(8) == seeded.bytes(8)


@fixed
@pytest.mark.parametrize("at", [0, 1])
def test_no_two_tests_and_no_two_draws_have_the_same(at: int) -> None:
    assert os.urandom(16).hex() == ["af8bb9bcc66694d8e89bb3b2e4559596", "1dde77911ba229670a80df05e82e7b87"][at]
    assert os.urandom(16) != os.urandom(16)


@fixed
def test_processes_have_the_real_one(request: pytest.FixtureRequest) -> None:
    expected = random.Random(request.node.nodeid).randbytes(16)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, os.urandom(16))
        os._exit(0)
    os.waitpid(child, 0)
    forked = os.read(read, 16)
    os.close(read)
    os.close(write)
    assert forked != expected
    started = subprocess.run(
        [sys.executable, "-c", "import os; print(os.urandom(16).hex())"], capture_output=True, text=True, check=True
    )
    assert len(started.stdout.strip()) == 32
    assert started.stdout.strip() not in (expected.hex(), forked.hex())
    assert os.urandom(16) == expected
