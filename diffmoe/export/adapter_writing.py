"""Writes what a LoRA run has trained as a folder of adapters, atomically."""

import json
from pathlib import Path

import torch

from diffmoe.capacity.thresholds import store
from diffmoe.export.adapters import AdapterMetadata, Base, fingerprint
from diffmoe.export.exported_model import CHECKSUMS
from diffmoe.export.metadata import FILE_NAME
from diffmoe.export.sources import Unmerged
from diffmoe.export.tensors import meta_network, total_bytes, write_file, write_tensors
from diffmoe.export.writing import new_folder, without_places


def write_adapters(source: Unmerged, target: Path, dtype: str = "float32") -> int:
    """Returns the bytes of its tensors. dtype: of the factors, float32 or bfloat16.

    Raises UserError if the source is damaged, the target exists or the disk is full; then nothing
    is left of it.
    """
    source = source.checked()
    metadata = source.metadata
    shapes = {name: shape for name, shape in source.shapes.items() if name in source.trained}
    kind = getattr(torch, dtype)
    experts = meta_network(metadata.model, metadata.moe).expert_parameters()
    base = fingerprint(source.shapes.keys() - shapes.keys(), source.read, experts)
    about = AdapterMetadata(
        lora=source.lora,
        base=Base(name=source.base, **base._asdict()),
        model=metadata.replace(dtype=dtype, latents=without_places(metadata.latents).model_dump()),
    )
    with new_folder(target, total_bytes(shapes, kind)) as temporary:
        files = write_tensors(temporary, shapes, source.read, kind)
        text = json.dumps(about.model_dump(mode="json"), indent=1)
        files[FILE_NAME] = write_file(temporary / FILE_NAME, [text.encode()])
        for name, entry in source.thresholds.items():
            store(temporary, name, entry)
        write_file(temporary / CHECKSUMS, [json.dumps({"files": files}, indent=1).encode()])
    return total_bytes(shapes, kind)
