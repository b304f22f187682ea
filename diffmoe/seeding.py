"""Random generators keyed by their purpose, never by rank, worker or wall time."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone.

    The same key gives the same numbers in every process, so a draw keyed by (seed, purpose, clock,
    lane) is the same at any world size. Keys are hashed as tuples: (1, 23) and (12, 3) differ.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
