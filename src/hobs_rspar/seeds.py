"""Random generators that depend on (seed, stage, method) and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, stage: str, method: str = "") -> int:
    """A 63-bit seed, so that no two stages or methods share a random stream by accident."""
    digest = hashlib.sha256(f"{seed}/{stage}/{method}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stage: str, method: str = "") -> torch.Generator:
    """A CPU ``torch.Generator`` seeded by (seed, stage, method)."""
    return torch.Generator().manual_seed(derived_seed(seed, stage, method))
