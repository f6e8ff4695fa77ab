"""Going on after a kill: a checkpoint per epoch, named by a hash of all inputs, and a lock against a second writer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from torch import nn

from hobs_rspar import checkpoint
from hobs_rspar.errors import UserError
from hobs_rspar.training import State


def key_of(files: list[Path], *values: object) -> str:
    """A hash of the contents of ``files`` (data, weights, source code) and of ``values`` (params, seed).

    A change of any of them starts training anew instead of continuing what the old code began.
    """
    total = hashlib.sha256(json.dumps([str(value) for value in values]).encode())
    for path in files:
        total.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return total.hexdigest()[:24]


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds the lock of a training run, so that a leftover process of a killed run blocks a second writer.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "owner"
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = owner.read_text() if owner.exists() else "unknown"
        raise UserError(f"{folder} is being written by process {who}; wait for it, or end it with 'kill {who}' and "
                        "run again: training goes on from its last epoch") from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def once(path: Path, work: Callable[[], dict]) -> dict:
    """The result in ``path`` (JSON); where there is none yet, that of ``work``, kept for a run that is killed later."""
    if path.exists():
        return json.loads(path.read_text())
    result, partial = work(), path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, path)
    return result


class Resume:
    """The resume checkpoint of one training run.

    Args:
        folder: git-ignored, outside DVC's outputs (which DVC deletes before a rerun).
        key: see :func:`key_of`; a checkpoint with another key is ignored.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.path = folder, folder / f"{key}.safetensors"

    def load(self, network: nn.Module) -> State:
        """The last saved state, with its weights loaded into ``network``; a fresh state if there is none."""
        if not self.path.exists():
            return State()
        tensors, metadata = checkpoint.load_tensors(self.path)
        network.load_state_dict({name[2:]: t for name, t in tensors.items() if name.startswith("w/")})
        momentum = {name[2:]: t for name, t in tensors.items() if name.startswith("m/")}
        return State(int(metadata["epoch"]), json.loads(metadata["history"]), momentum)

    def save(self, network: nn.Module, state: State) -> None:
        tensors = {f"w/{name}": t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
        tensors |= {f"m/{name}": t.detach().cpu().contiguous() for name, t in state.momentum.items()}
        metadata = {"epoch": str(state.epoch), "history": json.dumps(state.history)}
        checkpoint.save_tensors(self.path, tensors, metadata)

    def clear(self) -> None:
        """Removes the run's folder, once its outputs are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
