"""Folders of diffusers: a pipeline's own parts are used, and what differs is measured and said."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch
from PIL import Image

import diffmoe
from diffmoe.conversion import hugging_face
from diffmoe.conversion.foreign import Options, foreign_source, write_foreign
from diffmoe.data.autoencoders import DiffusersAutoencoder
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.sources import Source
from diffmoe.export.writing import write_exported
from diffmoe.seeding import keyed_generator
from tests.helpers.autoencoders import autoencoder
from tests.helpers.models import flip_bytes, source_of
from tests.helpers.networks import network_of
from tests.helpers.tiny import tiny_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A DiTPipeline's folder, with an autoencoder of another scale than Stable Diffusion's."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=10, norm_eps=1e-6, norm_num_groups=1,
    )  # fmt: skip
    embedder = transformer.transformer_blocks[0].norm1.emb.state_dict()
    transformer.transformer_blocks[1].norm1.emb.load_state_dict(embedder)
    folder = tmp_path / "pipeline"
    transformer.save_pretrained(folder / "transformer")
    autoencoder(folder / "vae", scale=0.3)
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiTPipeline", "id2label": {str(i): f"name {i}" for i in range(10)}}
    for part, kind in (
        ("transformer", "DiTTransformer2DModel"),
        ("vae", "AutoencoderKL"),
        ("scheduler", "DDIMScheduler"),
    ):
        index[part] = ["diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def converted(folder: Path, target: Path, options: Options | None = None) -> ExportedModel:
    with foreign_source(folder, options=options) as source:
        write_exported(source, target)
    return ExportedModel(target)


def test_a_pipelines_own_autoencoder_and_names_are_used(pipeline: Path, tmp_path: Path):
    DiTPipeline.from_pretrained(pipeline)  # it is one
    metadata = converted(pipeline, tmp_path / "out").metadata
    assert (metadata.latents.autoencoder, metadata.latents.scale) == ("vae", 0.3)
    assert metadata.class_names == tuple(f"name {i}" for i in range(10))
    assert metadata.diffusion.objective == "ddpm"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = DiffusersAutoencoder(str(pipeline / "vae"), 0.3).decode(latents)
    opened = diffmoe.Pipeline(tmp_path / "out", device="cpu")
    assert torch.equal(opened.autoencoder.decode(latents), expected)
    assert len(opened(labels=["name 7"], steps=2)) == 1


def test_what_the_user_says_wins(pipeline: Path, tmp_path: Path):
    other = autoencoder(tmp_path / "other", scale=0.7)
    metadata = converted(pipeline, tmp_path / "a", Options(autoencoder=str(other))).metadata
    assert metadata.latents.scale == 0.7
    metadata = converted(
        pipeline, tmp_path / "b", Options(autoencoder="some/vae", scale=0.2)
    ).metadata
    assert (metadata.latents.autoencoder, metadata.latents.scale) == ("some/vae", 0.2)
    wide = autoencoder(tmp_path / "wide", channels=8)
    with pytest.raises(UserError, match="wide have 8 channels, those of the model 4"):
        converted(pipeline, tmp_path / "c", Options(autoencoder=str(wide)))


def test_a_transformer_alone_has_the_published_autoencoder(pipeline: Path, tmp_path: Path):
    latents = converted(pipeline / "transformer", tmp_path / "out").metadata.latents
    assert (latents.autoencoder, latents.scale) == ("stabilityai/sd-vae-ft-ema", 0.18215)


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (
            DDIMScheduler(prediction_type="v_prediction"),
            "prediction_type='v_prediction' cannot be converted",
        ),
        (
            DDPMScheduler(beta_schedule="scaled_linear"),
            "beta_schedule='scaled_linear' cannot be converted",
        ),
        (DDIMScheduler(beta_end=0.012), r"beta_end=0\.012 cannot be converted, only 0\.02"),
        (
            DDIMScheduler(num_train_timesteps=500),
            "num_train_timesteps=500 cannot be converted, only 1000",
        ),
        (
            DDIMScheduler(rescale_betas_zero_snr=True),
            "rescale_betas_zero_snr=True cannot be converted, only False",
        ),
        (FlowMatch(), "FlowMatchEulerDiscreteScheduler is not a scheduler"),
    ],
)
def test_a_pipeline_of_another_diffusion_is_refused(
    scheduler, told: str, pipeline: Path, tmp_path: Path
):
    scheduler.save_pretrained(pipeline / "scheduler")
    with pytest.raises(UserError, match=rf"scheduler_config\.json: .*{told}"):
        converted(pipeline, tmp_path / "out")


def test_the_scheduler_is_told(pipeline: Path):
    with foreign_source(pipeline) as source:
        assert any("DDIMScheduler" in note and "--sampler" in note for note in source.notes)
        assert any("vae" in note and "scale 0.3" in note for note in source.notes)


def dense() -> Source:
    return source_of(
        tiny_config(
            moe__type="dense", diffusion__objective="ddpm", model__in_channels=4,
            model__learn_sigma=True, model__num_classes=10,
        )
    )  # fmt: skip


def test_the_difference_of_this_very_model_is_measured_and_said(tmp_path: Path):
    notes = write_foreign(dense(), tmp_path / "out", "diffusers")
    (note,) = [note for note in notes if "downscale_freq_shift" in note]
    readme = (tmp_path / "out" / "README.md").read_text()
    told = float(re.search(r"differ by up to ([0-9.e-]+)\.", note)[1])
    exact = float(re.search(r"README\.md reduces that to ([0-9.e-]+)", note)[1])
    assert f"up to {told:.3g}" in readme
    # Measured here in another way: on the network that was written, step by step.
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    network = network_of(dense().metadata.config)
    steps = torch.tensor([0.0, 1, 10, 100, 250, 500, 750, 999])
    x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)

    @torch.no_grad()
    def difference() -> float:
        return float(
            (transformer(x, steps, labels).sample - network(x, steps, labels)[0]).abs().max()
        )

    assert told == pytest.approx(difference(), rel=1)
    assert told > 1e-3
    # The lines of the README, run as they stand.
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(code.replace("PATH OF THIS FOLDER", str(tmp_path / "out")), names)
    transformer = names["transformer"].eval()
    assert difference() < 1e-5
    assert exact < 1e-5


def test_a_pipeline_of_diffusers_draws_the_same_images(tmp_path: Path):
    """In a process of its own, with nothing but the folder, by its README's lines."""
    source = dense()
    vae = autoencoder(tmp_path / "vae", scale=0.7)
    metadata = source.metadata.replace(
        latents={"shape": (4, 8, 8), "scale": 0.3, "autoencoder": str(vae)},
        class_names=tuple("abcdefghij"),
    )
    source = dataclasses.replace(source, metadata=metadata)
    write_foreign(source, tmp_path / "theirs", "diffusers")
    write_exported(source, tmp_path / "ours")
    # A thousand steps, since with fewer the two choose other ones.
    images = diffmoe.Pipeline(tmp_path / "ours", device="cpu")(
        labels=["d", "j"], seed=5, steps=1000, guidance=3.0, sampler="ddim"
    )
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "theirs/README.md").read_text(), re.DOTALL
    )
    code = (
        code.replace("PATH OF THIS FOLDER", "theirs")
        .replace(
            "class_labels=[0]", "class_labels=pipeline.get_label_ids(['d', 'j']), generator=noise"
        )
        .replace("steps=50", "steps=1000")
    )
    code = code.replace("guidance_scale=1.5", "guidance_scale=3")
    noise = [keyed_generator(5, "sample", image).get_state().tolist() for image in range(2)]
    script = f"""
import torch
noise = [torch.Generator() for _ in range(2)]
for one, state in zip(noise, {noise}):
    one.set_state(torch.tensor(state, dtype=torch.uint8))
{code}
assert len(pipeline.labels) == 10
for number, image in enumerate(images):
    image.save(f"{{number}}.png")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    for number, image in enumerate(images):
        theirs = np.asarray(Image.open(tmp_path / f"{number}.png")).astype(int)
        assert np.abs(theirs - np.asarray(image)).max() <= 1  # of 255
    with foreign_source(tmp_path / "theirs") as back:
        assert back.metadata.class_names == metadata.class_names
        assert all(torch.equal(back.read(name), source.read(name)) for name in source.shapes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shift": 0.1}, "latents.shift=0.1: DiTPipeline supports only 0.0"),
        ({"scale": [1.0, 2.0, 3.0, 4.0]}, "supports only one number"),
    ],
)
def test_latents_that_a_pipeline_does_not_have_are_refused(changes, told: str, tmp_path: Path):
    latents = {"shape": (4, 8, 8), "autoencoder": "some/vae"} | changes
    source = dense()
    source = dataclasses.replace(source, metadata=source.metadata.replace(latents=latents))
    with pytest.raises(UserError, match=re.escape(told)):
        write_foreign(source, tmp_path / "out", "diffusers")


@pytest.mark.parametrize(("dropout", "guidance"), [(0.0, "1"), (0.1, "1.5"), (None, "1.5")])
def test_a_pipeline_is_called_with_guidance_only_if_it_can_be_guided(
    dropout: float | None, guidance: str, tmp_path: Path
):
    source, vae = dense(), autoencoder(tmp_path / "vae", scale=0.7)
    latents = {"shape": (4, 8, 8), "autoencoder": str(vae)}
    metadata = source.metadata.replace(latents=latents, label_dropout=dropout)
    source = dataclasses.replace(source, metadata=metadata)
    notes = write_foreign(source, tmp_path / "out", "diffusers")
    readme = (tmp_path / "out/README.md").read_text()
    assert f"guidance_scale={guidance}, num_inference_steps=50" in readme
    assert ("the model cannot be guided: keep guidance_scale=1." in readme) == (dropout == 0)
    assert any("call the pipeline with guidance_scale=1" in one for one in notes) == (dropout == 0)


def test_more_classes_than_a_pipeline_guides_are_refused(tmp_path: Path):
    config = tiny_config(moe__type="dense", diffusion__objective="ddpm", model__num_classes=1001)
    source = source_of(config, latents={"shape": (2, 8, 8), "autoencoder": "some/vae"})
    with pytest.raises(UserError, match="class 1000 is the null label"):
        write_foreign(source, tmp_path / "out", "diffusers")


def test_without_diffusers_the_difference_is_said_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    notes = write_foreign(dense(), tmp_path / "out", "diffusers")
    (note,) = [note for note in notes if "downscale_freq_shift" in note]
    assert "not measured, since diffusers is not installed" in note
    assert "downscale_freq_shift = 0" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_diffusers_reads_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = hugging_face.diffusers_config
    monkeypatch.setattr(
        hugging_face, "diffusers_config", lambda *given: text(*given).replace("1e-06", "0.1")
    )
    with pytest.raises(UserError, match="diffusers' predictions differ by up to"):
        write_foreign(dense(), tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_damage_of_what_we_wrote_for_diffusers_is_noticed(tmp_path: Path):
    write_foreign(dense(), tmp_path / "out", "diffusers")
    converted(tmp_path / "out", tmp_path / "a")
    flip_bytes(tmp_path / "out" / WEIGHTS)
    with pytest.raises(UserError, match=f"{re.escape(WEIGHTS)} is missing, or differs from its"):
        converted(tmp_path / "out", tmp_path / "b")


def as_hub_cache(folder: Path) -> None:
    """Every file a link to a blob that is named for its SHA-256; the folder is a revision's."""
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        blob = folder.parent.parent / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)


def as_hub_download(folder: Path) -> None:
    """Beside the files what huggingface_hub notes of a download: revision, hash, time."""
    for file in [file for file in folder.rglob("*") if file.suffix == ".safetensors"]:
        notes = folder / ".cache" / "huggingface" / "download" / file.relative_to(folder)
        notes.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        notes.with_name(f"{notes.name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1.5\n")


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("laid_out", [as_hub_cache, as_hub_download])
def test_damage_of_a_download_is_noticed(laid_out, part: str, pipeline: Path, tmp_path: Path):
    (tmp_path / "model/snapshots").mkdir(parents=True)
    pipeline = pipeline.rename(tmp_path / "model/snapshots/0123")
    laid_out(pipeline)
    converted(pipeline, tmp_path / "a")
    flip_bytes(pipeline / part / WEIGHTS)
    with pytest.raises(UserError, match=rf"{part}/{re.escape(WEIGHTS)} is damaged"):
        converted(pipeline, tmp_path / "b")
    assert not (tmp_path / "b").exists()
