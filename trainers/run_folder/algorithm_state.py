"""What an algorithm keeps between rounds: the server's tensors and each party's own, in the run's folder.

    DIR/memory.R.safetensors    "server|NAME", "party|PARTY|NAME" and "clip|HOLDER" after round R

Named by round, and written before the weights, which make the round complete. The parties' part is here because one
process plays them all; where they are apart it stays with each, as their data does: an update can be told from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import torch

from choral.trainers.run_folder.run import RunFolderError, read_tensors, write_side_file

State = dict[str, torch.Tensor]


@dataclass
class Memory:
    """server: the server's tensors by name. parties: each party's, for those that keep any.

    clips: by data holder, where adaptive clipping of records has come to; no secret, since what moves it is noisy.
    """

    server: State = field(default_factory=dict)
    parties: dict[str, State] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether the algorithm keeps anything."""
        return bool(self.server) or any(self.parties.values())


def write_memory(folder: Path, memory: Memory, round_number: int) -> None:
    flat: dict[str, torch.Tensor] = {f"server|{name}": tensor for name, tensor in memory.server.items()}
    for party, state in memory.parties.items():
        flat |= {f"party|{quote(party, safe='')}|{name}": tensor for name, tensor in state.items()}
    for holder, clip in memory.clips.items():
        flat[f"clip|{quote(holder, safe='')}"] = torch.tensor(clip, dtype=torch.float64)
    write_side_file(folder, "memory", flat, round_number, kept="yes")


def read_memory(folder: Path, round_number: int) -> Memory:
    """Raises: RunFolderError if the file is damaged or of another round."""
    path = folder / f"memory.{round_number}.safetensors"
    if not path.is_file():
        return Memory()
    tensors, metadata = read_tensors(path)
    if int(metadata["round"]) != round_number:
        raise RunFolderError(f"{path} belongs to round {metadata['round']}", hint="restore the file of this round")
    memory = Memory()
    for key, tensor in tensors.items():
        owner, _, rest = key.partition("|")
        if owner == "server":
            memory.server[rest] = tensor
        elif owner == "clip":
            memory.clips[unquote(rest)] = float(tensor)
        else:
            party, _, name = rest.partition("|")
            memory.parties.setdefault(unquote(party), {})[name] = tensor
    return memory
