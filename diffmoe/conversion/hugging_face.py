"""diffusers' DiTTransformer2DModel, a dense DiT: to ours and back."""

import json
import re
from pathlib import Path
from typing import Any

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.conversion.layouts import Layout, concatenated, padded, repeated, same
from diffmoe.errors import UserError
from diffmoe.export.metadata import Metadata
from diffmoe.files import contained, read_json

CLASS = "DiTTransformer2DModel"
PIPELINE = "DiTPipeline"
VAE = "AutoencoderKL"
NULL_LABEL = 1000  # a constant of that class, however many classes the transformer has
# In a pipeline's folder, which has the model's in a subfolder.
INDEX = "model_index.json"
# Fields of a scheduler's configuration that we can convert, with their only values and defaults.
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
}
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
DIFFERENCE = (
    "diffusers spaces the timestep frequencies over 127 steps (downscale_freq_shift=1), DiT and "
    "this project over 128, and its published config.json has norm_eps=1e-5 instead of 1e-6: "
    "weights of facebookresearch/DiT are exact here, but predictions of diffusers differ slightly"
)


def transformer_folder(path: Path) -> Path | None:
    """The model's folder: the path itself, or its `transformer` (of a pipeline). Else None."""
    for folder in (path, path / "transformer"):
        if not (folder / "config.json").exists():
            continue
        values = read_json(contained(folder, "config.json"))
        if isinstance(values, dict) and values.get("_class_name") == CLASS:
            return folder
    return None


def check_scheduler(pipeline: Path) -> str:
    """The scheduler's class. Raises UserError unless its noise is that of our samplers."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    values = read_json(file)
    name = str(values.get("_class_name")) if isinstance(values, dict) else "nothing"
    if not re.fullmatch(r"(DDPM|DDIM|DPM|DEIS|PNDM|LMS|Euler|Heun|KDPM|UniPC).*", name):
        raise UserError(f"{file}: {name} is not a scheduler for DDPM's noise, which is required")
    for key, wanted in _NOISE.items():
        if values.get(key, wanted) != wanted:
            raise UserError(f"{file}: {key}={values[key]!r} cannot be converted, only {wanted!r}")
    return name


def class_names(pipeline: Path, rows: int) -> tuple[str, ...] | None:
    """The names of classes 0, 1, ... in model_index.json; None if it does not name them so.

    rows: of the label table without the null label; there may be more of them than classes.
    """
    values = read_json(pipeline / INDEX)
    labels = values.get("id2label") if isinstance(values, dict) else None
    if not isinstance(labels, dict) or not 0 < len(labels) <= rows:
        return None
    if labels.keys() != {str(i) for i in range(len(labels))}:
        return None
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def read_sections(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and moe sections of a folder's config.json."""
    file = folder / "config.json"
    values = read_json(file)
    for key, wanted in _FIXED.items():
        if values.get(key, wanted) != wanted:
            raise UserError(f"{file}: {key}={values[key]!r} cannot be converted, only {wanted!r}")
    try:
        heads, head_width = values["num_attention_heads"], values["attention_head_dim"]
        channels = values["in_channels"]
        model = {
            "input_size": values["sample_size"],
            "in_channels": channels,
            "patch_size": values["patch_size"],
            "width": heads * head_width,
            "depth": values["num_layers"],
            "heads": heads,
            "num_classes": values["num_embeds_ada_norm"],
            "learn_sigma": (values["out_channels"] or channels) == 2 * channels,
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: {error} is missing or of another type") from None
    return model, {"type": "dense"}


def diffusers_layout(model: ModelConfig, moe: MoEConfig, rows: int) -> Layout:
    """The layout of a network. rows: of diffusers' label table, the null label's included.

    Raises UserError for a network that diffusers' class cannot represent.
    """
    if moe.type != "dense":
        raise UserError(f"moe.type={moe.type}: diffusers' {CLASS} is dense and has no experts")
    supported = {"qk_norm": False, "rope": False, "mlp_ratio": 4.0, "mlp_activation": "gelu"}
    supported |= {"width_of_head": model.width // model.heads, "wide_head": None}
    for key, wanted in supported.items():
        if getattr(model, key) != wanted:
            raise UserError(f"model.{key}={getattr(model, key)}: {CLASS} supports only {wanted}")
    every = [f"transformer_blocks.{i}.norm1.emb" for i in range(model.depth)]
    why = "diffusers has embedders of timesteps and labels in each block, our network one for all"
    layout: Layout = {}
    for leaf in ("weight", "bias"):
        layout[f"patch_embed.{leaf}"] = same(f"pos_embed.proj.{leaf}")
        for number in (1, 2):
            names = [f"{prefix}.timestep_embedder.linear_{number}.{leaf}" for prefix in every]
            layout[f"timestep_embed.fc{number}.{leaf}"] = repeated(names, why)
        layout[f"final_adaln.{leaf}"] = same(f"proj_out_1.{leaf}")
        layout[f"final.{leaf}"] = same(f"proj_out_2.{leaf}")
        for i in range(model.depth):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            layout[f"{ours}.attention.qkv.{leaf}"] = concatenated(
                [f"{theirs}.attn1.to_{part}.{leaf}" for part in "qkv"]
            )
            for own, other in (
                ("attention.proj", "attn1.to_out.0"),
                ("adaln", "norm1.linear"),
                ("feed_forward.fc1", "ff.net.0.proj"),
                ("feed_forward.fc2", "ff.net.2"),
            ):
                layout[f"{ours}.{own}.{leaf}"] = same(f"{theirs}.{other}.{leaf}")
    labels = [f"{prefix}.class_embedder.embedding_table.weight" for prefix in every]
    layout["label_embed.weight"] = padded(repeated(labels, why), model.num_classes + 1, rows)
    return layout


def has_own_class(metadata: Metadata) -> bool:
    """Whether diffusers itself has such models: plain dense ones of classes, trained with DDPM."""
    model = metadata.model
    if metadata.diffusion.objective != "ddpm" or model.text is not None:
        return False
    try:
        diffusers_layout(model, metadata.moe, model.num_classes + 1)
        if metadata.latents.autoencoder != "identity":
            check_pipeline(metadata)
    except UserError:
        return False
    return isinstance(model.input_size, int)


def check_pipeline(metadata: Metadata) -> None:
    """Raise UserError for classes or latents that a DiTPipeline does not have."""
    classes, latents = metadata.model.num_classes, metadata.latents
    if classes > NULL_LABEL:
        raise UserError(
            f"model.num_classes={classes}: for diffusers' {PIPELINE} class {NULL_LABEL} is the "
            f"null label, so it has at most {NULL_LABEL} classes; choose --to dit"
        )
    for name, wanted in (("shift", 0.0), ("pixel_range", (-1.0, 1.0))):
        if getattr(latents, name) != wanted:
            raise UserError(
                f"latents.{name}={getattr(latents, name)}: {PIPELINE} supports only {wanted}"
            )
    if isinstance(latents.scale, list):
        raise UserError(f"latents.scale={latents.scale}: {PIPELINE} supports only one number")


def pipeline_files(metadata: Metadata, with_vae: bool) -> dict[str, Any]:
    """Contents of the JSON files of a pipeline's folder, by name, beside its transformer's.

    with_vae: whether an autoencoder lies in the folder; else the user gives one.
    """
    names = metadata.class_names or tuple(map(str, range(metadata.model.num_classes)))
    index = {
        "_class_name": PIPELINE,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", CLASS],
    }
    if with_vae:
        index["vae"] = ["diffusers", VAE]
    noise = {key: value for key, value in _NOISE.items() if key != "use_flow_sigmas"}
    # Steps at equal distances that end at 0, each of which leads to the next one.
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": True}
    return {INDEX: index, "scheduler/scheduler_config.json": scheduler | noise}


def diffusers_config(model: ModelConfig, rows: int) -> str:
    """config.json of the model's folder. rows: of its label table, the null label's included."""
    values = {
        "_class_name": CLASS,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": model.in_channels,
        "out_channels": model.in_channels * (2 if model.learn_sigma else 1),
        "num_layers": model.depth,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": rows - 1,
        "upcast_attention": False,
        "norm_eps": 1e-6,
        **_FIXED,
    }
    return json.dumps(values, indent=2)
