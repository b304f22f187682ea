"""The tensors of a network: which there must be, and writing them as safetensors.

A model of any size is written with one of its tensors in memory at a time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.blocks import grid_positions, rotary_angles
from diffmoe.models.dit import DiT
from diffmoe.models.moe import ROUTING_STATE
from diffmoe.models.precision import DTYPES
from diffmoe.parallel.topology import Topology

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Tensor]

SINGLE = "model.safetensors"
# Where Hugging Face splits files, too.
MAX_SHARD_BYTES = 5_000_000_000
# Names in the header of safetensors.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def empty_network(
    model: ModelConfig,
    moe: MoEConfig,
    topology: Topology | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiT:
    """A network, for evaluation, whose parameters of `dtype` are still to be filled.

    Its buffers are fp32. For names and shapes alone, see `meta_network`.
    """
    with torch.device("meta"):
        network = DiT(model, moe, topology)
    cast_parameters(network, dtype)
    network.to_empty(device=device)
    network.positions.copy_(grid_positions(model.width, model.grid))
    for part in (network, network.wide_head):
        if part is not None and part.rotation is not None:  # (2, T, h/2)
            part.rotation.copy_(
                rotary_angles(model.grid, 2 * part.rotation.shape[-1], model.rope_grid)
            )
    return network.eval()


@lru_cache(maxsize=8)
def meta_network(model: ModelConfig, moe: MoEConfig) -> DiT:
    """The network without memory for its parameters: names and shapes. Do not change it."""
    with torch.device("meta"):
        return DiT(model, moe)


def parameter_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The type of parameters by its name. Raises UserError for one that they cannot have."""
    name = str(DTYPES.get(str(dtype), dtype)).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise UserError(f"dtype {name}: choose float32, bfloat16, float16 or float64")
    return getattr(torch, name)


def cast_parameters(network: nn.Module, dtype: torch.dtype) -> None:
    """Change the parameters' type. Thresholds and positions stay fp32, as in training."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def expected_shapes(model: ModelConfig, moe: MoEConfig) -> Shapes:
    """The shape of every tensor of a network, by name; experts' tensors hold all experts."""
    state = meta_network(model, moe).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_state_dict(found: Shapes, model: ModelConfig, moe: MoEConfig, where: str) -> None:
    """Check that there is every tensor of the network in its shape, and no other.

    where: names the source in errors. Raises UserError naming the first tensors that are missing,
    unexpected or of another shape.
    """
    if model.blocks > len(found):
        raise UserError(
            f"{where}: {model.blocks} blocks, but there are {len(found)} tensors in all"
        )
    expected = expected_shapes(model, moe)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if found[name] == expected[name]:
            continue
        problem = f"{name} has the shape {found[name]}, not {expected[name]}"
        if ".experts." in name and found[name][1:] == expected[name][1:]:
            problem = f"{name} holds {found[name][0]} experts, not {expected[name][0]}"
        problems.append(problem)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where} does not fit the network: {'; '.join(problems[:3])}{more}")


def require_finite(name: str, tensor: Tensor, where: str) -> Tensor:
    """The same tensor. Raises UserError if it contains NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        number = int((~tensor.isfinite()).sum())
        raise UserError(f"{where}: {name} contains {number} numbers that are not finite")
    return tensor


@torch.no_grad()
def fill(network: DiT, read: Callable[[str, slice | None], Tensor]) -> DiT:
    """Copy every tensor into the network, one at a time. Returns the network.

    read: gives a tensor by its name, and of an expert's the rows of dimension 0 (None: all).
    """
    experts, topology = network.expert_parameters(), network.topology
    for name, tensor in network.state_dict().items():
        rows = None
        if name in experts and topology.expert_parallel > 1:
            first = topology.expert_rank * len(tensor)
            rows = slice(first, first + len(tensor))
        tensor.copy_(read(name, rows))
    return network


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a tensor is stored: fp32 for what scores are compared with in fp32."""
    return torch.float32 if name.endswith(ROUTING_STATE) else dtype


class Shard(NamedTuple):
    """A file to be written, and the names of its tensors in order."""

    file: str
    names: list[str]


def plan_shards(
    shapes: Shapes, dtype: torch.dtype, limit: int = MAX_SHARD_BYTES, single: str = SINGLE
) -> list[Shard]:
    """One file, or several with at most `limit` bytes of tensors (a larger tensor gets its own)."""
    # fp32 before bf16, so that every tensor is aligned to the size of its numbers.
    ordered = sorted(shapes, key=lambda name: stored_dtype(name, dtype) != torch.float32)
    groups: list[list[str]] = [[]]
    size = 0
    for name in ordered:
        more = _bytes(name, shapes, dtype)
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    if len(groups) == 1:
        return [Shard(single, groups[0])]
    stem = single.removesuffix(".safetensors")
    return [
        Shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", names)
        for number, names in enumerate(groups, 1)
    ]


def total_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """Bytes of all tensors as they are stored."""
    return sum(_bytes(name, shapes, dtype) for name in shapes)


def write_tensors(
    folder: Path,
    shapes: Shapes,
    read: Read,
    dtype: torch.dtype,
    limit: int = MAX_SHARD_BYTES,
    single: str = SINGLE,
) -> dict[str, dict[str, Any]]:
    """Write the file `single`, or shards named after it with an index.

    read: gives a tensor by name; called once for each. Returns {file: {"bytes": ..., "sha256":
    ...}}.
    """
    shards = plan_shards(shapes, dtype, limit, single)
    written = {
        shard.file: _write_file(folder / shard.file, shard.names, shapes, read, dtype)
        for shard in shards
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total_bytes(shapes, dtype)},
            "weight_map": {name: shard.file for shard in shards for name in shard.names},
        }
        name = f"{single}.index.json"
        written[name] = write_file(folder / name, [json.dumps(index, indent=1).encode()])
    return written


def write_file(path: Path, blocks: Iterator[Any] | list[Any]) -> dict[str, Any]:
    """Write and sync a new file. Returns {"bytes": its size, "sha256": ...}."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for block in blocks:
            digest.update(block)
            size += len(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_file(
    path: Path, names: list[str], shapes: Shapes, read: Read, dtype: torch.dtype
) -> dict[str, Any]:
    """Write a safetensors file: the header's length, the header, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + _bytes(name, shapes, dtype)
        header[name] = {
            "dtype": DTYPE_NAMES[stored_dtype(name, dtype)],
            "shape": shapes[name],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name in names:
            tensor = read(name).to(stored_dtype(name, dtype)).contiguous()
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {shapes[name]}")
            yield tensor.view(-1).view(torch.uint8).numpy().data

    return write_file(path, blocks())


def _bytes(name: str, shapes: Shapes, dtype: torch.dtype) -> int:
    return torch.Size(shapes[name]).numel() * stored_dtype(name, dtype).itemsize
