"""Folders that diffusers opens without this package: the same images, from a process of its own."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import diffmoe
from diffmoe.capacity.thresholds import Calibrated
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.sources import Source
from diffmoe.export.writing import write_exported
from diffmoe.text.encoders import TransformersEncoder
from tests.helpers.models import NAMES, source_of
from tests.helpers.processes import environment
from tests.helpers.tiny import BYTES, tiny_config
from tests.helpers.tools import tool

pytest.importorskip("diffusers", reason="diffusers is not installed (extra vae)")


class Case(NamedTuple):
    """A model, and how images of it are drawn.

    changes: of the tiny configuration. metadata: of the exported model, beside that. draw: the call
    of diffmoe.Pipeline, of which diffusers has some words otherwise. encoder: of the captions, t5
    or clip.
    """

    changes: dict[str, Any]
    draw: dict[str, Any]
    metadata: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    encoder: str = ""


LABELS = {"labels": [1, 4, 1], "seed": 5, "steps": 3, "guidance": 2.5}
PROMPTS = {"prompt": ["red two", "a blue one", "é"], "seed": 2, "steps": 3, "guidance": 3.0}
DDPM = {"diffusion__objective": "ddpm", "model__learn_sigma": True}
LATENTS = {
    "shape": (4, 8, 8), "scale": [0.3, 0.5, 0.4, 0.2], "shift": [0.1, 0.0, -0.2, 0.0],
    "pixel_range": (0.0, 1.0),
}  # fmt: skip
# A random network walks far away from the pixels' range.
FAR = {"scale": 200.0, "source": "noise"}
CASES = {
    "dense": Case(
        {
            "moe__type": "dense",
            "model__in_channels": 4,
            "model__rope": True,
            "model__rope_grid": [3, 2],
            "model__qk_norm": True,
            "diffusion__timestep_shift": 2.0,
        },
        LABELS | {"sampler": "heun", "guidance_interval": (0.2, 0.8)},
        {"latents": LATENTS},
    ),
    "diffmoe": Case(
        {"moe__shared_expert_ratio": 1.0, "moe__gate": "identity", "moe__gate_scale": "experts"},
        LABELS | {"labels": ["cat", 0, "cat", "plane"]},
        {"class_names": tuple(NAMES)},
    ),
    "capacity": Case({}, LABELS | {"capacity": 0.8}),
    "race": Case(
        {"moe__type": "race", "moe__target_loss_weight": 0.01, "moe__activation": "swiglu"},
        LABELS | {"sampler": "sde", "steps": 4},
    ),
    "expert_choice": Case(
        {"moe__type": "expert_choice", "moe__capacity": 0.7, "model__input_size": [8, 12], **DDPM},
        LABELS | {"steps": 4, "guided_channels": 1},
        {"latents": FAR | {"shape": (3, 8, 12)}},
    ),
    "token_choice": Case(
        {"moe__type": "token_choice", "moe__top_k": 2, "diffusion__objective": "ddpm"},
        LABELS | {"sampler": "ddim", "steps": 4, "eta": 0.5, "guidance_interval": (0.0, 0.7)},
        {"latents": FAR | {"shape": (3, 8, 8)}},
    ),
    "promoe": Case(
        {"moe__type": "promoe", "moe__every_block": True, "moe__shared_expert_ratio": 0.5},
        {"labels": [3, 0], "steps": 3},
    ),
    "dsmoe": Case(
        {"moe__type": "dsmoe", "moe__top_k": 2, "moe__router_input": "plain_with_time"}, LABELS
    ),
    "wide_head": Case(
        {
            "model__wide_head": {"width": 24, "depth": 2, "heads": 2},
            "model__rope": True,
            "model__rope_grid": [3, 2],
        },
        LABELS,
    ),
    "undropped": Case(
        DDPM,
        {"labels": [2, 3], "steps": 3},
        {"label_dropout": 0.0, "latents": FAR | {"shape": (3, 8, 8)}},
    ),
    "bytes": Case(
        {"model__text": BYTES, "model__head_width": 4},
        PROMPTS | {"negative_prompt": "two"},
        {"label_dropout": 0.0},
    ),
    "t5": Case({}, PROMPTS, encoder="t5"),
    "clip": Case({}, PROMPTS, encoder="clip"),
}
THEIR_WORDS = {
    "labels": "class_labels", "steps": "num_inference_steps", "guidance": "guidance_scale"
}  # fmt: skip
# Opens each folder with nothing of this package, and keeps its images.
DRAW = """
import json, sys
sys.modules["diffmoe"] = None
import numpy as np
import torch
from diffusers import DiffusionPipeline
for folder, encoder, call, file in json.load(open(sys.argv[1])):
    parts = {}
    if encoder:
        import transformers
        kind = "T5EncoderModel" if encoder.endswith("t5") else "CLIPTextModel"
        parts["text_encoder"] = getattr(transformers, kind).from_pretrained(
            encoder, dtype=torch.float32)
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(encoder)
    pipeline = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True, **parts)
    np.save(file, np.stack([np.asarray(image) for image in pipeline(**call).images]))
"""


def source(name: str, folder: Path, encoders: Path | None = None) -> Source:
    case = CASES[name]
    changes = {"model__in_channels": 3, **case.changes}
    if case.encoder:
        assert encoders is not None
        content = TransformersEncoder(encoders / case.encoder).content
        changes["model__text"] = content.model_dump()
    metadata = dict(case.metadata)
    if metadata.get("latents") is LATENTS:
        from tests.helpers.autoencoders import autoencoder

        vae = str(autoencoder(folder / "a vae"))
        metadata["latents"] = LATENTS | {"autoencoder": vae}
    made = source_of(tiny_config(**changes), **metadata)
    for place in [place for place in made.shapes if place.endswith(".selection_bias")]:
        made.read(place).copy_(torch.tensor([0.3, -0.2, 0.1, -0.4]))
    if name == "capacity":
        entry = Calibrated(
            weights="ema", capacity=0.8, measured=0.0, common=False, over="noise", samples=1,
            log_odds=[[0.1, -0.1, 0.3, 0.0], [0.2, 0.4, -0.3, 0.1]],
        )  # fmt: skip
        made.thresholds["0.8"] = entry
    return made


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Path:
    """Folders of all cases, and NAME.npy with what diffusers drew of each."""
    root = tmp_path_factory.mktemp("drawn")
    work = []
    for name, case in CASES.items():
        write_exported(source(name, root, folders), root / name, diffusers=True)
        call = {THEIR_WORDS.get(word, word): value for word, value in case.draw.items()}
        encoder = str(folders / case.encoder) if case.encoder else ""
        work.append([str(root / name), encoder, call, str(root / name)])
        if name == "diffmoe":
            work.append([*work[-1][:2], call | {"batch_size": 1}, str(root / "alone")])
    (root / "work.json").write_text(json.dumps(work))
    where = environment(HF_HOME=str(root / "cache"), HF_HUB_OFFLINE="1", PYTHONPATH="")
    done = subprocess.run(
        [sys.executable, "-c", DRAW, root / "work.json"],
        cwd=root, env=where, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    return root


def furthest(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_diffusers_draws_the_same_images_without_this_package(
    name: str, drawn: Path, folders: Path
):
    case = CASES[name]
    options = {"text_encoder": folders / case.encoder} if case.encoder else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the calibration's settings, and of guidance 1
        ours = diffmoe.Pipeline(drawn / name, device="cpu", **options)(**case.draw)
    images = np.stack([np.asarray(image) for image in ours])
    assert len(np.unique(images)) > 50
    assert furthest(np.load(drawn / f"{name}.npy"), images) <= 1  # of 255; rounding


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.encoder])
def test_the_network_in_the_folder_predicts_the_same_numbers(name: str, tmp_path: Path):
    written = write_exported(source(name, tmp_path), tmp_path / "out", diffusers=True)
    (note,) = [note for note in written.notes if "computes of the folder" in note]
    assert float(note.rpartition(" ")[2]) < 1e-5  # rounding of predictions of about 1


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(drawn: Path):
    together = np.load(drawn / "diffmoe.npy")
    assert furthest(np.load(drawn / "alone.npy"), together) <= 1
    assert furthest(together[0], together[2]) > 20  # of one class, but with other noise


@pytest.mark.slow
def test_the_same_folder_is_an_exported_model(drawn: Path, tmp_path: Path):
    folder = drawn / "dense"
    model = ExportedModel(folder)
    assert model.verify() == len([file for file in folder.rglob("*") if file.is_file()]) - 2
    plain = source("dense", tmp_path)
    assert all(torch.equal(model.read(name), plain.read(name)) for name in plain.shapes)
    code = folder / "pipeline.py"
    code.write_text(code.read_text() + "\n")
    with pytest.raises(UserError, match=r"pipeline\.py is missing, or differs from its checksum"):
        model.verify()


@pytest.mark.slow
def test_the_code_in_the_folder_imports_nothing_else(drawn: Path):
    allowed = {"torch", "diffusers", "PIL", *sys.stdlib_module_names}
    for name in ("pipeline.py", "transformer/diffmoe_transformer.py"):
        code = (drawn / "diffmoe" / name).read_text()
        assert set(re.findall(r"^\s*(?:from|import) (\w+)", code, re.M)) <= allowed
        assert len(code) > 10_000


@pytest.mark.parametrize("family", ["diffmoe", "race"])
@pytest.mark.parametrize("inference", ["pooled", "static"])
def test_routing_by_the_batch_is_refused(family: str, inference: str, tmp_path: Path):
    config = tiny_config(moe__type=family, moe__inference=inference)
    with pytest.raises(UserError, match=f"moe.inference={inference} makes an image depend on"):
        write_exported(source_of(config), tmp_path / "out", diffusers=True)
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_that_is_not_here_is_refused_and_one_of_the_hub_is_named(tmp_path: Path):
    config, shape = tiny_config(model__in_channels=4), (4, 8, 8)
    away = source_of(config, latents={"shape": shape, "autoencoder": str(tmp_path / "away")})
    with pytest.raises(UserError, match="away is not on this machine"):
        write_exported(away, tmp_path / "a", diffusers=True)
    hub = source_of(config, latents={"shape": shape, "autoencoder": "some/model/vae"})
    write_exported(hub, tmp_path / "b", diffusers=True)
    card = (tmp_path / "b/README.md").read_text()
    assert 'vae=AutoencoderKL.from_pretrained("some/model", subfolder="vae"),' in card
    with pytest.raises(ValueError, match=r"autoencoder some/model/vae is missing; .*vae=\.\.\."):
        opened(tmp_path / "b")(class_labels=[0])


def opened(folder: Path, **parts: Any) -> Any:
    """The pipeline of a folder, in this process."""
    from diffmoe.export.custom_pipeline.diffmoe_transformer import DiffMoETransformer
    from diffmoe.export.custom_pipeline.pipeline import DiffMoEPipeline

    index = json.loads((folder / "model_index.json").read_text())
    given = {name: index[name] for name in ("sampling", "latents", "id2label")}
    transformer = DiffMoETransformer.from_pretrained(folder / "transformer")
    given |= dict.fromkeys(("vae", "text_encoder", "tokenizer")) | parts
    return DiffMoEPipeline(transformer=transformer, **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call", "told"),
    [
        ("diffmoe", {"class_labels": [0], "sampler": "dopri5"}, "sampler='dopri5': this pipeline"),
        ("diffmoe", {"class_labels": [0], "sampler": "ddim"}, "a flow model has euler, heun, sde;"),
        ("diffmoe", {"class_labels": [5]}, r"class 5 is neither of 0\.\.4 nor one of the names"),
        ("diffmoe", {"class_labels": ["dog"]}, "class 'dog' is neither"),
        ("diffmoe", {"class_labels": []}, "asks for no image"),
        ("diffmoe", {"prompt": "a dog"}, r"give class_labels=\[\.\.\.\] to a model of classes"),
        ("diffmoe", {"class_labels": [0], "capacity": 0.5}, r"0\.5: calibrated are none"),
        ("capacity", {"class_labels": [0], "capacity": 0.5}, r"0\.5: calibrated are 0\.8"),
        ("diffmoe", {"class_labels": [0], "num_inference_steps": 0}, "euler takes 1 up"),
        ("diffmoe", {"class_labels": [0], "eta": 0.5}, "belongs to the sampler ddim"),
        ("diffmoe", {"class_labels": [0], "guided_channels": 4}, "choose 1 to 3"),
        ("diffmoe", {"class_labels": [0], "guidance_interval": (0.5, 0.1)}, "two rising times"),
        ("undropped", {"class_labels": [0], "guidance_scale": 2}, "trained without label dropout"),
        ("undropped", {"class_labels": [0], "shift": 2}, "spaces the steps of euler, heun, sde"),
        ("bytes", {"class_labels": [0]}, r"prompt=\.\.\. to a text model"),
        ("bytes", {"prompt": "a", "negative_prompt": "b", "guidance_scale": 1}, "acts through gui"),
        ("t5", {"prompt": "a"}, "the text encoder t5-[0-9a-f]{16} is missing"),
    ],
)  # fmt: skip
def test_what_the_pipeline_does_not_have_is_named(
    name: str, call: dict[str, Any], told: str, drawn: Path
):
    with pytest.raises(ValueError, match=told):
        opened(drawn / name)(**call)


@pytest.mark.slow
def test_the_network_computes_in_bf16_too(drawn: Path):
    pipeline, call = opened(drawn / "diffmoe"), {"class_labels": [1, 2], "num_inference_steps": 3}
    wanted, autocast = pipeline(**call).images, opened(drawn / "diffmoe")
    with torch.autocast("cpu", torch.bfloat16):
        under = autocast(**call).images
    cast = pipeline.to(torch.bfloat16)(**call).images
    for images in (under, cast):
        far = np.abs(np.stack(images).astype(int) - np.stack(wanted))
        assert 0 < far.mean() < 5  # of 255


@pytest.mark.slow
def test_another_text_encoder_is_refused(drawn: Path, folders: Path, tmp_path: Path):
    import transformers

    from tests.helpers.text_folders import save_t5

    other = save_t5(tmp_path / "other", seed=1)
    parts = {
        "text_encoder": transformers.T5EncoderModel.from_pretrained(other),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(other),
    }
    with pytest.raises(ValueError, match="are not those of t5-"):
        opened(drawn / "t5", **parts)(prompt="a")


def test_shards_are_opened(tmp_path: Path):
    made = source("diffmoe", tmp_path)
    written = write_exported(made, tmp_path / "out", max_shard_bytes=40_000, diffusers=True)
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    assert any("computes of the folder differs by up to" in note for note in written.notes)
    network = opened(tmp_path / "out").transformer
    name = "blocks.1.feed_forward.experts.w_in"
    assert torch.equal(network.state_dict()[name], made.read(name))


def test_tensors_outside_of_the_folder_are_refused_and_no_code_in_it_is_run(tmp_path: Path):
    folder = tmp_path / "out"
    write_exported(source("diffmoe", tmp_path), folder, diffusers=True)
    for code in ("pipeline.py", "transformer/diffmoe_transformer.py"):
        (folder / code).write_text("raise SystemExit('run')")
    assert len(diffmoe.Pipeline(folder, device="cpu", verify=False)("cat", steps=1)) == 1
    (folder / "transformer").rename(tmp_path / "elsewhere")
    (folder / "transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="transformer leads out of its folder"):
        diffmoe.load(folder, device="cpu", verify=False)


def test_a_folder_that_diffusers_computes_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from diffmoe.export.custom_pipeline import diffmoe_transformer

    monkeypatch.setattr(diffmoe_transformer, "modulate", lambda x, shift, scale: x)
    with pytest.raises(UserError, match="what diffusers computes of the written folder differs"):
        write_exported(source("diffmoe", tmp_path), tmp_path / "out", diffusers=True)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_what_diffusers_has_or_else_our_code(tmp_path: Path):
    dense = {"moe__type": "dense", "model__in_channels": 4, **DDPM}
    for name, changes in (("own", dense), ("custom", dense | {"model__rope": True})):
        write_exported(source_of(tiny_config(**changes)), tmp_path / name)
        words = (tmp_path / name, tmp_path / f"{name}-out", "--to", "diffusers")
        done = tool("convert_checkpoint", *words)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "own-out/pipeline.py").exists()
    config = json.loads((tmp_path / "own-out/config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel"
    assert (tmp_path / "custom-out/pipeline.py").exists()
    assert "what diffusers computes of the folder differs by up to" in done.stderr
    assert "bit for bit" in done.stdout


def test_flags_that_a_format_would_pass_over_are_refused(tmp_path: Path):
    dense = {"moe__type": "dense", "model__in_channels": 4, **DDPM}
    write_exported(source_of(tiny_config(**dense)), tmp_path / "dense")
    for words, said in (
        (
            ("--to", "diffusers", "--dtype", "bfloat16"),
            "the format diffusers is written in float32",
        ),
        (("--capacity", "2"), "was trained at 1, which TO keeps; choose C when sampling"),
    ):
        done = tool("convert_checkpoint", tmp_path / "dense", tmp_path / "out", *words)
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "out").exists()
