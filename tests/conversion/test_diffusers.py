"""Folders of diffusers: a pipeline's own parts are used, and what differs is measured and said."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch

import diffmoe
from diffmoe.conversion import hugging_face
from diffmoe.conversion.foreign import Options, foreign_source, write_foreign
from diffmoe.data.autoencoders import KLAutoencoder
from diffmoe.errors import UserError
from diffmoe.export.exported import ExportedModel
from diffmoe.export.sources import Source
from diffmoe.export.writing import write_exported
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
    about = converted(pipeline, tmp_path / "out").about
    assert (about.latents.autoencoder, about.latents.scale) == ("vae", 0.3)
    assert about.class_names == tuple(f"name {i}" for i in range(10))
    assert about.diffusion.objective == "ddpm"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = KLAutoencoder(str(pipeline / "vae"), 0.3).decode(latents)
    opened = diffmoe.Pipeline(tmp_path / "out", device="cpu")
    assert torch.equal(opened.autoencoder.decode(latents), expected)
    assert len(opened(labels=["name 7"], steps=2)) == 1


def test_what_the_user_says_wins(pipeline: Path, tmp_path: Path):
    other = autoencoder(tmp_path / "other", scale=0.7)
    about = converted(pipeline, tmp_path / "a", Options(autoencoder=str(other))).about
    assert about.latents.scale == 0.7
    about = converted(pipeline, tmp_path / "b", Options(autoencoder="some/vae", scale=0.2)).about
    assert (about.latents.autoencoder, about.latents.scale) == ("some/vae", 0.2)
    wide = autoencoder(tmp_path / "wide", channels=8)
    with pytest.raises(UserError, match="wide makes latents of 8 channels, the model takes 4"):
        converted(pipeline, tmp_path / "c", Options(autoencoder=str(wide)))


def test_a_transformer_alone_has_the_published_autoencoder(pipeline: Path, tmp_path: Path):
    latents = converted(pipeline / "transformer", tmp_path / "out").about.latents
    assert (latents.autoencoder, latents.scale) == ("stabilityai/sd-vae-ft-ema", 0.18215)


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (DDIMScheduler(prediction_type="v_prediction"), "prediction_type='v_prediction'; only"),
        (DDPMScheduler(beta_schedule="scaled_linear"), "beta_schedule='scaled_linear'; only"),
        (DDIMScheduler(beta_end=0.012), r"beta_end=0\.012; only 0\.02"),
        (DDIMScheduler(num_train_timesteps=500), "num_train_timesteps=500; only 1000"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True; only False"),
        (FlowMatch(), "FlowMatchEulerDiscreteScheduler; only"),
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
    told = float(re.search(r"differ by up to ([0-9.e-]+) ", note)[1])
    exact = float(re.search(r"README\.md makes that ([0-9.e-]+)", note)[1])
    assert f"up to {told:.3g}" in readme
    # Measured here in another way: on the network that was written, step by step.
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    network = network_of(dense().about.config)
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
        hugging_face, "diffusers_config", lambda model: text(model).replace("1e-06", "0.1")
    )
    with pytest.raises(UserError, match="diffusers computes something else from it"):
        write_foreign(dense(), tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_damage_of_what_we_wrote_for_diffusers_is_noticed(tmp_path: Path):
    write_foreign(dense(), tmp_path / "out", "diffusers")
    converted(tmp_path / "out", tmp_path / "a")
    flip_bytes(tmp_path / "out" / WEIGHTS)
    with pytest.raises(UserError, match=f"{re.escape(WEIGHTS)} is missing, or not what was"):
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
