"""The torch cipher is the CPU one, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES
from hypothesis import given
from hypothesis import strategies as st

from choral.protocols.crypto import mask_stream as stream
from choral.protocols.crypto import mask_stream_device as device_stream
from choral.protocols.crypto.mask_stream_device import add_mask_tensor
from choral.protocols.errors import SpecError

SEED = bytes(range(32))
DTYPES = [(torch.int32, np.uint32), (torch.int64, np.uint64)]


def with_torch(target: torch.Tensor, seed: bytes, *, subtract: bool = False, offset: int = 0) -> None:
    device_stream._add_with_torch(target, seed, subtract, offset, device_stream._rounds)


def unsigned(tensor: torch.Tensor) -> Any:
    return tensor.cpu().numpy().view(np.uint32 if tensor.dtype == torch.int32 else np.uint64)


def test_fips_197_example() -> None:
    """FIPS 197, appendix C.1, through the rounds themselves."""
    keys = device_stream._int32(device_stream._round_keys(bytes(range(16))), torch.device("cpu")).view(11, 4)
    block = torch.frombuffer(bytearray.fromhex("00112233445566778899aabbccddeeff"), dtype=torch.int32).view(1, 4)
    out = device_stream._rounds(block, keys, *device_stream._tables(torch.device("cpu")))
    assert out.numpy().tobytes().hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"


def test_fips_197_key_schedule() -> None:
    """FIPS 197, appendix A.1: the last round key."""
    words = device_stream._round_keys(bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c"))
    assert b"".join(word.to_bytes(4, "little") for word in words[40:]).hex() == "d014f9a8c9ee2589e13f0cc8b6630ca6"


def test_sbox_is_a_permutation_without_fixed_points() -> None:
    box = device_stream._sbox()
    assert sorted(box) == list(range(256))
    assert (box[0x00], box[0x53], box[0xFF]) == (0x63, 0xED, 0x16)  # FIPS 197, 5.1.1 and figure 7
    assert all(box[value] not in (value, value ^ 0xFF) for value in range(256))


@given(key=st.binary(min_size=16, max_size=16), block=st.binary(min_size=16, max_size=16))
def test_one_block_is_aes(key: bytes, block: bytes) -> None:
    target = torch.zeros(4, dtype=torch.int32)
    with_torch(target, key + block)
    assert target.numpy().tobytes() == AES.new(key, AES.MODE_ECB).encrypt(block)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), DTYPES)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 1000])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 7, 2**31])
def test_same_bytes_as_on_the_cpu(dtype: torch.dtype, numpy_dtype: Any, length: int, offset: int) -> None:
    target = torch.zeros(length, dtype=dtype)
    with_torch(target, SEED, offset=offset)
    assert (unsigned(target) == stream.expand(SEED, length, numpy_dtype, offset=offset)).all()


@pytest.mark.parametrize(("dtype", "numpy_dtype"), DTYPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
@pytest.mark.parametrize(
    "counter", [2**128 - 1, 2**128 - 77, 2**64 - 1, 2**64 - 50, 2**63 - 3, 0, (9 << 64) - 8, 2**127]
)
def test_chunks_and_carries(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, numpy_dtype: Any, chunk: int, counter: int
) -> None:
    monkeypatch.setattr(device_stream, "_CHUNK_BLOCKS", chunk)
    seed = SEED[:16] + counter.to_bytes(16, "big")
    target = torch.zeros(501, dtype=dtype)
    with_torch(target, seed, offset=3)
    assert (unsigned(target) == stream.expand(seed, 501, numpy_dtype, offset=3)).all()


@pytest.mark.parametrize(("dtype", "numpy_dtype"), DTYPES)
@pytest.mark.parametrize("add", [add_mask_tensor, with_torch])
def test_adding_wraps_and_subtracting_undoes(dtype: torch.dtype, numpy_dtype: Any, add: Any) -> None:
    start = torch.full((5000,), torch.iinfo(dtype).max, dtype=dtype)
    target = start.clone()
    expected = unsigned(start).copy()
    stream.add_mask(expected, SEED, offset=3)
    add(target, SEED, offset=3)
    assert (unsigned(target) == expected).all()
    add(target, SEED, subtract=True, offset=3)
    assert torch.equal(target, start)


def test_the_rounds_are_one_graph() -> None:
    """What torch.compile is given has no graph break; 'aot_eager' traces it as inductor would, without a compiler."""
    traced = torch.compile(device_stream._rounds, fullgraph=True, backend="aot_eager")
    target = torch.zeros(400, dtype=torch.int32)
    device_stream._add_with_torch(target, SEED, False, 0, traced)
    assert (unsigned(target) == stream.expand(SEED, 400, np.uint32)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "numpy_dtype"), DTYPES)
def test_same_bytes_on_a_gpu(dtype: torch.dtype, numpy_dtype: Any, compiled: bool) -> None:
    length = 4 * device_stream._CHUNK_BLOCKS + 1001
    target = torch.zeros(length, dtype=dtype, device="cuda")
    add_mask_tensor(target, SEED, offset=5, compiled=compiled)
    assert (unsigned(target) == stream.expand(SEED, length, numpy_dtype, offset=5)).all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4),
        torch.zeros(4, dtype=torch.int16),
        torch.zeros((2, 2), dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32)[::2],
        torch.zeros(8, dtype=torch.int32, device="meta")[::2],
        torch.zeros((2, 2), dtype=torch.int32, device="meta"),
        torch.zeros(4, dtype=torch.uint8, device="meta"),
    ],
)
def test_other_tensors_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(SpecError):
        add_mask_tensor(tensor, SEED)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_seeds_and_offsets_are_refused(device: str) -> None:
    with pytest.raises(SpecError):
        add_mask_tensor(torch.zeros(4, dtype=torch.int32, device=device), SEED[:31])
    with pytest.raises(SpecError):
        add_mask_tensor(torch.zeros(4, dtype=torch.int32, device=device), SEED, offset=-1)
