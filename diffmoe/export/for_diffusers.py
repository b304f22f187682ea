"""What an exported folder holds beside our own files so that diffusers opens it, too.

model_index.json   names the parts, and has what sampling needs
pipeline.py        copied from export/custom_pipeline/
transformer/       config.json, diffmoe_transformer.py (copied), and the tensors, which are not
                   stored twice: ours are read from there
vae/               as in any exported folder
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffmoe.conditions import Condition, Text
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import FOLDER, read_autoencoder_config
from diffmoe.export.metadata import Metadata
from diffmoe.export.tensors import write_file
from diffmoe.files import contained

if TYPE_CHECKING:
    from diffmoe.capacity.thresholds import Calibrated

INDEX = "model_index.json"
TRANSFORMER = "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Where code goes in the folder, and its module in export/custom_pipeline/.
CODE = {
    "pipeline.py": "pipeline.py",
    f"{TRANSFORMER}/diffmoe_transformer.py": "diffmoe_transformer.py",
}
# Relative to the size of a prediction. Rounding may move a token over a threshold; anything wrong
# changes far more.
_MOST = 0.01


def tensors_folder(path: Path) -> Path | None:
    """Where the tensors of an exported folder are that diffusers opens; None of any other."""
    return contained(path, TRANSFORMER) if (path / INDEX).exists() else None


def check(metadata: Metadata, where: str) -> None:
    """Raise UserError for a model whose images depend on their batch: pipeline.py has no batch."""
    moe = metadata.moe
    if moe.type in ("diffmoe", "race") and moe.inference != "per_token":
        raise UserError(
            f"{where}: moe.inference={moe.inference} makes an image depend on its batch, and the "
            "pipeline for diffusers routes per_token alone; choose --to diffmoe"
        )


def write_parts(
    folder: Path, metadata: Metadata, thresholds: "dict[str, Calibrated]"
) -> dict[str, dict[str, Any]]:
    """Write all but the tensors and the autoencoder. Returns {file: {"bytes": ..., "sha256": ...}}.

    thresholds: calibrated capacities by name.
    """
    config = {
        "_class_name": "DiffMoETransformer",
        "model": metadata.model.model_dump(mode="json"),
        "moe": metadata.moe.model_dump(mode="json"),
        "calibrated": {name: entry.log_odds for name, entry in thresholds.items()},
    }
    contents = {
        INDEX: json.dumps(_index(folder, metadata), indent=2),
        f"{TRANSFORMER}/config.json": json.dumps(config, indent=2),
    }
    code = files("diffmoe.export.custom_pipeline")
    contents |= {place: code.joinpath(name).read_text() for place, name in CODE.items()}
    return {name: write_file(folder / name, [text.encode()]) for name, text in contents.items()}


def _index(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """model_index.json: the parts by library and class, and what DiffMoEPipeline registers."""
    vae: list[str | None] = [None, None]
    if metadata.latents.autoencoder == FOLDER:
        kind = read_autoencoder_config(folder / FOLDER).get("_class_name", "AutoencoderKL")
        vae = ["diffusers", kind]
    config, latents = metadata.config, metadata.latents
    return {
        "_class_name": ["pipeline", "DiffMoEPipeline"],
        "transformer": ["diffmoe_transformer", "DiffMoETransformer"],
        "vae": vae,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "sampling": {
            "objective": metadata.diffusion.objective,
            "shift": config.timestep_shift,
            "can_guide": config.training.label_dropout > 0,
        },
        "latents": latents.model_dump(
            mode="json", include={"scale", "shift", "autoencoder", "pixel_range"}
        ),
        "id2label": {str(k): name for k, name in enumerate(metadata.class_names or ())},
    }


def loading_lines(metadata: Metadata, place: str, call: str) -> str:
    """Python that opens the folder with diffusers and draws. place: of the folder, or its name on
    the hub. call: what is asked for, as arguments.
    """
    name, text = metadata.latents.autoencoder, metadata.model.text
    imports, before, parts = ["DiffusionPipeline"], "", ""
    if name not in (FOLDER, "identity"):
        imports.insert(0, "AutoencoderKL")
        owner, _, inside = name.rpartition("/") if name.count("/") == 2 else (name, "", "")
        subfolder = f', subfolder="{inside}"' if inside else ""
        parts += f'    vae=AutoencoderKL.from_pretrained("{owner}"{subfolder}),\n'
    if text is not None and text.encoder != "bytes":
        kind = "CLIPTextModel" if text.pooled else "T5EncoderModel"
        before = (
            f"import torch\nfrom transformers import AutoTokenizer, {kind}\n\n"
            f'encoder = "FOLDER OF {text.encoder}"\n'
        )
        parts += f"    text_encoder={kind}.from_pretrained(encoder, dtype=torch.float32),\n"
        parts += "    tokenizer=AutoTokenizer.from_pretrained(encoder),\n"
    return f"""from diffusers import {", ".join(imports)}
{before}
pipeline = DiffusionPipeline.from_pretrained(
    "{place}",
    custom_pipeline="{place}",
    trust_remote_code=True,
{parts})
images = pipeline({call}).images"""


@torch.inference_mode()
def difference(
    folder: Path, inputs: tuple[Tensor, Tensor, Condition], expected: Tensor, where: str
) -> float | None:
    """The largest difference to `expected` of what the written transformer predicts.

    None where diffusers is not installed. Raises UserError where it is more than rounding.
    """
    try:
        from diffmoe.export.custom_pipeline.diffmoe_transformer import DiffMoETransformer
    except ImportError:
        return None
    network = DiffMoETransformer.from_pretrained(folder / TRANSFORMER, low_cpu_mem_usage=False)
    x, t, condition = inputs
    given = {"text" if isinstance(condition, Text) else "class_labels": condition}
    found = network.eval()(x, t, **given)
    if not (found - expected).norm() <= _MOST * expected.norm():
        raise UserError(
            f"{where}: what diffusers computes of the written folder differs by up to "
            f"{float((found - expected).abs().max()):.3g}; nothing was kept"
        )
    return float((found - expected).abs().max())
