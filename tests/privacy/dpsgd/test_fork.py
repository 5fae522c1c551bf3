"""A pass is paid for once: a process that is forked in the middle of it may neither step nor draw."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from choral.privacy import Privacy, PrivacyError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def in_fork(action: Any) -> str:
    """Run in a forked process; return the name of what it raised, or "nothing"."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            action()
        except BaseException as error:
            said = type(error).__name__
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def test_a_forked_process_neither_steps_nor_draws_on() -> None:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))
    model = torch.nn.Linear(3, 2)
    loader = torch.utils.data.DataLoader(data, batch_size=10)
    privacy = Privacy(epsilon=5.0, delta=1e-3)
    private, optimizer, batches = privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    drawn = iter(batches)
    x, y = next(drawn)
    torch.nn.functional.cross_entropy(private(x), y).backward()
    assert in_fork(optimizer.step) == PrivacyError.__name__
    optimizer.step()  # the process that paid goes on
    assert in_fork(lambda: next(drawn)) == PrivacyError.__name__
    for x, y in drawn:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
