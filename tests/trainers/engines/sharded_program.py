"""What test_sharded.py runs in one process and in several: python sharded_program.py KIND FOLDER."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Privacy

sys.path.insert(0, str(Path(__file__).parents[2]))
from flat_arguments import federate

from choral.trainers import FSVRG, Availability, Dropouts, Epochs, FedSGD, Participation, Run, Scaffold, VirtualParties

RANK = int(os.environ.get("RANK", "0"))


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    seen: list[str] = []
    parties = parties_of([40, 25, 30, 12, 50])

    def build(dataset: Any) -> Any:
        model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
        if kind == "unready" and RANK == 1:
            raise RuntimeError("no model here")
        rate = float("inf") if kind == "diverges" else 0.1
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        return model, optimizer, DataLoader(dataset, batch_size=8, shuffle=True)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        seen.append(f"trained at {RANK}")
        if kind == "fails" and len(loader.dataset) == 25:
            raise ValueError("this party's table is odd")
        if kind == "dies" and RANK == 1 and len(seen) > 2:  # in round 2
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "ahead" and RANK == 1 and len(seen) == 2:
            (folder / "rank 1 has trained two").touch()
        if kind == "ahead" and RANK == 0:
            wait_for(folder / "rank 1 has trained two")
        Epochs(criterion=nn.functional.binary_cross_entropy_with_logits)(model, optimizer, loader)

    job: dict[str, Any] = {
        "build": build,
        "fit": fit,
        "loss": Epochs(criterion=nn.functional.binary_cross_entropy_with_logits).loss,
        "evaluate": lambda model: float(next(model.parameters()).sum()),
        "parties": parties,
        "rounds": 3,
        "seed": 4,
    }

    def keep(name: str, run: Run) -> None:
        save_file(dict(run.state), folder / f"{name}-rank-{RANK}.safetensors")
        (folder / f"{name}-rank-{RANK}.txt").write_text("\n".join(seen))

    if kind == "trials":
        for part in ("diverges", "unready", "strangers"):
            try_out(part, folder)
        kind = "ahead"
    if kind == "strangers":
        strange = job | {"parties": parties_of([12, 40, 30, 25, 50])} if RANK else job
        federate(**strange, privacy=Privacy(epsilon=3.0, delta=1e-3), out=folder / f"strange-{RANK}")
    masked = Masked(min_survivors=3)
    keep("masked", federate(**job, secure_sum=masked, out=folder / "masked", resume=(folder / "masked").exists()))
    if kind == "all":
        keep("scaffold", federate(**job, algorithm=Scaffold(), out=folder / "scaffold"))
        keep("fsvrg", federate(**job, algorithm=FSVRG(step=0.5), out=folder / "fsvrg"))
        steps = FedSGD(batch_size=40, steps_per_round=2)
        keep("fedsgd", federate(**job, algorithm=steps, out=folder / "fedsgd"))
        known = job | {"fit": Epochs(criterion=nn.functional.binary_cross_entropy_with_logits)}
        keep("epochs", federate(**known))
        many = VirtualParties(
            500, lambda number: parties_of([count_of(number)])["party-0"], count_of, total=5000, largest=12
        )
        world = Participation(
            draw="seed",
            rate=0.02,
            availability=Availability(peak=0.9, trough=0.5),
            dropouts=Dropouts(vector=0.1, unmasking=0.1),
        )
        keep("world", federate(**job | {"parties": many, "rounds": 5}, participation=world))
        six, few = Participation(cohort=6, draw="seed"), Masked(min_survivors=3, corrupt=1)
        keep("virtual", federate(**job | {"parties": many}, participation=six, secure_sum=few))
        keep("private", federate(**job, privacy=Privacy(epsilon=3.0, delta=1e-3), out=folder / "private"))


def count_of(number: int) -> int:
    return 8 + number % 5


def parties_of(sizes: list[int]) -> dict[str, TensorDataset]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"party-{k}": TensorDataset(
            torch.randn(n, 6, generator=generator), torch.randint(2, (n,), generator=generator).float()
        )
        for k, n in enumerate(sizes)
    }


def wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.1)
    raise SystemExit(f"no {file.name} after a minute")


def try_out(kind: str, folder: Path) -> None:
    """A federation that fails. Its ranks live on, so that no closed process tells the others of it."""
    (folder / kind).mkdir(exist_ok=True)
    try:
        main(kind, folder / kind)
    except Exception as error:
        (folder / f"{kind}-rank-{RANK}.txt").write_text(f"{type(error).__name__}: {error}")
    wait_for(folder / f"{kind}-rank-{1 - RANK}.txt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
