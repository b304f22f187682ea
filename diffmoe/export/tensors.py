"""The tensors that a network must have, and files of them: safetensors written as a stream.

A model of any size is written with one of its tensors in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.blocks import grid_positions, rotary_angles
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Tensor]

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
# Where Hugging Face splits as well.
MAX_SHARD_BYTES = 5_000_000_000
# In the header of safetensors.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def empty_network(
    model: ModelConfig,
    moe: MoEConfig,
    topology: Topology | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiT:
    """A network whose parameters, of `dtype`, are to be filled; buffers are in fp32.

    On the device `meta` it takes no memory.
    """
    with torch.device("meta"):
        network = DiT(model, moe, topology)
    cast_parameters(network, dtype)
    if str(device) == "meta":
        return network
    network.to_empty(device=device)
    network.positions.copy_(grid_positions(model.width, network.grid))
    if network.rotation is not None:
        network.rotation.copy_(rotary_angles(network.grid, model.width_of_head))
    return network.eval()


def parameter_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The type of a network's parameters by its name. Raises UserError for one they cannot have."""
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise UserError(f"dtype {name}: choose float32, bfloat16, float16 or float64")
    return getattr(torch, name)


def cast_parameters(network: nn.Module, dtype: torch.dtype) -> None:
    """Thresholds and positions stay in fp32, as in training."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def expected_shapes(model: ModelConfig, moe: MoEConfig) -> Shapes:
    """Every tensor of a network by name, experts under their global numbers (dimension 0)."""
    network = empty_network(model, moe, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def check_state_dict(found: Shapes, model: ModelConfig, moe: MoEConfig, where: str) -> None:
    """See that a source has every tensor of the network in its shape, and nothing else.

    Raises UserError naming the first tensors that are missing, left over or of another shape.
    """
    if model.blocks > len(found):
        raise UserError(
            f"{where}: {model.blocks} blocks, but there are {len(found)} tensors in all"
        )
    expected = expected_shapes(model, moe)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is left over" for name in found if name not in expected]
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


def finite(name: str, tensor: Tensor, where: str) -> Tensor:
    """The same tensor. Raises UserError where it holds NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        number = int((~tensor.isfinite()).sum())
        raise UserError(f"{where}: {name} holds {number} numbers that are not finite")
    return tensor


@torch.no_grad()
def fill(network: DiT, read: Callable[[str, slice | None], Tensor]) -> DiT:
    """Copy every tensor into the network, one at a time. read: (name, rows of dimension 0)."""
    experts, topology = network.expert_parameters(), network.topology
    for name, tensor in network.state_dict().items():
        rows = None
        if name in experts and topology.expert_parallel > 1:
            first = topology.expert_rank * len(tensor)
            rows = slice(first, first + len(tensor))
        tensor.copy_(read(name, rows))
    return network


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Thresholds are compared with probabilities in fp32, and are few."""
    return torch.float32 if name.endswith(".thresholds") else dtype


class Shard(NamedTuple):
    """A file to be: its tensors in order."""

    file: str
    names: list[str]


def plan_shards(shapes: Shapes, dtype: torch.dtype, limit: int = MAX_SHARD_BYTES) -> list[Shard]:
    """One file, or several of at most `limit` bytes of tensors (a larger tensor gets its own)."""
    # fp32 before bf16, so that every tensor begins at a multiple of its element.
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
        return [Shard(SINGLE, groups[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", names)
        for number, names in enumerate(groups, 1)
    ]


def total_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    return sum(_bytes(name, shapes, dtype) for name in shapes)


def write_tensors(
    folder: Path, shapes: Shapes, read: Read, dtype: torch.dtype, limit: int = MAX_SHARD_BYTES
) -> dict[str, dict[str, Any]]:
    """Write model.safetensors, or shards with an index. -> {file: {"bytes": ..., "sha256": ...}}.

    read: gives a tensor by name; asked for each once, and not kept.
    """
    shards = plan_shards(shapes, dtype, limit)
    written = {
        shard.file: _write_file(folder / shard.file, shard.names, shapes, read, dtype)
        for shard in shards
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total_bytes(shapes, dtype)},
            "weight_map": {name: shard.file for shard in shards for name in shard.names},
        }
        written[INDEX] = write_file(folder / INDEX, [json.dumps(index, indent=1).encode()])
    return written


def write_file(path: Path, blocks: Iterator[Any] | list[Any]) -> dict[str, Any]:
    """Write bytes to a new file, on the disk when this returns. -> its size and SHA-256."""
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
    """A safetensors file: the header's length, the header, the numbers."""
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
                raise ValueError(f"{name} came as {tuple(tensor.shape)}, not {shapes[name]}")
            yield memoryview(tensor.view(-1).view(torch.uint8).numpy())

    return write_file(path, blocks())


def _bytes(name: str, shapes: Shapes, dtype: torch.dtype) -> int:
    return torch.Size(shapes[name]).numel() * stored_dtype(name, dtype).itemsize
