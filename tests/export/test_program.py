"""Networks that run without this package: torch.export's network.pt2, ONNX, and their sampler."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import diffmoe
from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.export import program, standalone
from diffmoe.export.program import write_program
from diffmoe.export.sources import exported_source
from diffmoe.sampling.sampler import Sampler
from tests.helpers.models import NAMES, exported, source_of
from tests.helpers.processes import ROOT, environment
from tests.helpers.tiny import BYTES, tiny_config

LABELS = [0, 2, 4, 1, 1]

# In a process that has torch, and of the other packages of ours none.
ALONE = """
import json, sys
for name in ("diffmoe", "numpy", "PIL", "safetensors", "pydantic", "yaml"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import sample, torch
network, about = sample.load(sys.argv[1] + "/network.pt2")
drawn = [sample.draw(network, about, **settings) for settings in json.loads(sys.argv[2])]
torch.save(drawn, sys.argv[1] + "/drawn.pt")
elsewhere, _ = sample.load(sys.argv[1] + "/network.pt2", "meta")
x = torch.randn(2, *about["shape"], device="meta")
print(elsewhere(x, x[:, 0, 0, 0], torch.arange(2, device="meta")).device)
print(json.dumps(about))
"""


def equal(found: Tensor, expected: Tensor) -> bool:
    """To rounding: samplers multiply in another order, and steps of ddpm make numbers large."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def drawn_alone(folder: Path, *settings: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Latents of each of the settings, in a new process, and what is known about the network."""
    words = [sys.executable, "-c", ALONE, str(folder), json.dumps(settings)]
    env = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    device, about = done.stdout.splitlines()[-2:]
    assert device == "meta"  # it moves to other devices as a whole
    return torch.load(folder / "drawn.pt"), json.loads(about)


def drawn_here(ours: Sampler, batch: int, **settings: Any) -> Tensor:
    chosen = ours.fitted(SamplingSettings(**{"guidance": None, "shift": None, **settings}))
    return ours.latents(LABELS, chosen, batch=batch)


def served(model: Path, target: Path, *options: Any) -> Path:
    with exported_source(model) as source:
        write_program(source, target, *options)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"moe__type": "diffmoe", "diffusion__timestep_shift": 2.0},
        {"moe__type": "dense", "diffusion__objective": "ddpm", "model__learn_sigma": True},
    ],
    ids=["diffmoe_flow", "dense_ddpm"],
)
def test_torch_alone_draws_the_same_latents(changes: dict[str, Any], tmp_path: Path):
    latents = {"shape": (2, 8, 8), "scale": [2.0, 0.5], "source": "/home/somebody/cats"}
    model = exported(
        tmp_path / "model",
        tiny_config(model__depth=2, **changes),
        latents=latents,
        class_names=NAMES,
    )
    out = served(model, tmp_path / "served")
    sampler, routed = Sampler.open(model), changes["moe__type"] == "diffmoe"
    if routed:
        sampler = sampler.with_capacity(None, "static")
    others = ("heun",) if routed else ("ddim",)
    settings = [
        {"steps": 4, "seed": 3},  # guidance and sampler by default
        *({"steps": 3, "guidance": 1.0, "sampler": other} for other in others),
    ]
    asked = [{"labels": LABELS, "batch": size, **some} for some in settings for size in (2, 5)]
    found, about = drawn_alone(out, *asked)
    expected = [drawn_here(sampler, size, **some) for some in settings for size in (2, 5)]
    for ours, theirs in zip(expected, found, strict=True):
        assert equal(theirs, ours)
    # Static routing depends on the batch, a dense network does not.
    assert equal(found[0], found[1]) != routed
    assert about["class_names"] == NAMES
    assert about["latents"]["scale"] == [2.0, 0.5]
    assert about["latents"]["source"] == "cats"
    assert (about["routing"], about["capacity"]) == (("static", 1.0) if routed else (None, None))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({"diffusion__timestep_shift": "by_size", "model__input_size": [4, 12]}, "euler"),
        ({"model__learn_sigma": True}, "heun"),
        *(
            ({"diffusion__objective": "ddpm", "model__learn_sigma": learned}, sampler)
            for learned in (True, False)
            for sampler in ("ddpm", "ddim")
        ),
    ],
)
def test_its_samplers_compute_what_ours_do(changes, sampler: str, guidance: float):
    """Without a file between: the network is called as it is."""
    config = tiny_config(moe__type="dense", model__depth=2, **changes)
    ours, network, about = in_memory(config)
    theirs = standalone.draw(
        network, about, LABELS, seed=7, steps=6, guidance=guidance, sampler=sampler, batch=3
    )
    expected = drawn_here(ours, 3, seed=7, steps=6, guidance=guidance, sampler=sampler)
    assert equal(theirs, expected)


def in_memory(
    config: Config, **metadata: Any
) -> tuple[Sampler, standalone.Network, dict[str, Any]]:
    source = source_of(config, **metadata)
    network = program.empty_network(config.model, config.moe)
    program.fill(network, lambda name, _: source.read(name))
    about = json.loads(json.dumps(program._about(source.metadata, network, "float32")))
    about["device"] = "cpu"
    return (
        Sampler(network, source.metadata.config),
        lambda x, t, labels: network(x, t, labels).prediction,
        about,
    )


@pytest.mark.slow
def test_the_command_and_its_sampler_draw_the_pipelines_images(tmp_path: Path):
    model = exported(
        tmp_path / "model",
        tiny_config(moe__type="dense", model__depth=2, model__in_channels=3),
        class_names=NAMES,
    )
    out = tmp_path / "served"
    words = [sys.executable, "tools/convert_checkpoint.py", model, out, "--to", "pt2"]
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "predicted numbers equal the source's bit for bit" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["network.pt2", "sample.py"]
    words = [sys.executable, "sample.py", "--classes", "2,deer", "--per-class", "2", "--out"]
    done = subprocess.run([*words, "grid.png"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = diffmoe.Pipeline(model, device="cpu")([2, 2, "deer", "deer"])
    found = np.asarray(Image.open(out / "grid.png")).astype(int)
    rows = [np.concatenate([np.asarray(image) for image in expected[i : i + 2]], 1) for i in (0, 2)]
    # Rounding may end on the other side of a half.
    assert np.abs(found - np.concatenate(rows)).max() <= 1


@pytest.mark.parametrize(
    ("changes", "words", "told"),
    [
        ({}, ["--classes", "1,5"], "labels [1, 5]: choose from 0 to 4"),
        ({}, ["--classes", "dog"], "class 'dog': give a number, or one of plane, car, bird, "),
        ({}, ["--sampler", "ddpm"], "sampler ddpm: choose euler or heun"),
        ({"diffusion__objective": "ddpm"}, ["--steps", "1"], "steps 1, batch 50: 2 to 1000 steps"),
        ({}, ["--out", "images.png"], "the network draws latents of vae; give a .pt"),
        ({}, ["--out", "images.npy"], "--out images.npy: give a .png, or a .pt"),
        ({}, ["--guidance", "2"], "guidance 2: trained without label dropout; choose 1"),
        ({}, ["--network", "nowhere.pt2"], "nowhere.pt2 does not exist"),
    ],
)
def test_its_command_names_what_does_not_fit(changes, words, told, monkeypatch):
    _, network, about = in_memory(
        tiny_config(moe__type="dense", **changes),
        class_names=NAMES,
        label_dropout=0.0,
        latents={"shape": (2, 8, 8), "autoencoder": "vae"},
    )
    monkeypatch.setattr(standalone, "load", lambda *_: (network, about))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--network", __file__, "--out", "x.pt", *words])
    with pytest.raises(SystemExit) as caught:
        standalone.main()
    assert str(caught.value).startswith("error: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({"model__text": BYTES}, (), "pt2 supports only classes"),
        ({"moe__type": "token_choice"}, (), "moe.type=token_choice has shapes that depend on data"),
        ({"moe__type": "promoe"}, ("onnx",), "choose --to diffmoe"),
        ({"moe__type": "race"}, ("onnx",), "choose --to pt2"),
        ({}, ("onnx", "bfloat16"), "onnxruntime computes in float32"),
        ({"moe__type": "expert_choice"}, ("pt2", "float32", 0.5), "no capacity to choose"),
        ({}, ("pt2", "float32", 5.0), "choose one above 0, at most 4 (experts)"),
        (
            {"moe__capacity_rounding": "release", "moe__experts": 7},
            ("pt2", "float32", 7.0),
            "capacity 7 rounds in a way that pt2 cannot hold",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_work(changes, options, told, tmp_path: Path):
    source = source_of(tiny_config(**changes))
    with pytest.raises(UserError) as caught:
        write_program(source, tmp_path / "served", *options)
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_of_onnx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r'onnxscript is not installed.*"diffmoe\[onnx\]"'):
        write_program(source_of(tiny_config()), tmp_path / "served", "onnx")


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch):
    def wrong(file: Path):
        return lambda x, t, labels: torch.zeros_like(x), {}

    monkeypatch.setattr(program, "_write", lambda network, file, about: file.touch())
    monkeypatch.setattr(standalone, "load", wrong)
    with pytest.raises(UserError, match="differs from the source's by up to"):
        write_program(source_of(tiny_config()), tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "dtype", "capacity"),
    [
        ({"moe__capacity_rounding": "release"}, "bfloat16", 2.0),
        (
            {"model__wide_head": {"width": 20, "depth": 1, "heads": 1}, "model__rope": True},
            "float32",
            1.0,
        ),
        (
            {"moe__type": "race", "model__rope": True, "model__rope_grid": [3, 2]},
            "float32",
            0.5,
        ),
        ({"moe__type": "expert_choice", "moe__activation": "swiglu"}, "float32", None),
    ],
)
def test_other_families_types_and_capacities(changes, dtype, capacity, tmp_path: Path):
    model = exported(tmp_path / "model", tiny_config(model__depth=2, **changes))
    network, about = standalone.load(
        served(model, tmp_path / "served", "pt2", dtype, capacity) / "network.pt2"
    )
    expected = diffmoe.load(model, device="cpu", dtype=dtype)
    if expected.has_thresholds:
        expected.route_by("static", capacity)
    for batch in (1, 7):
        given = program._inputs(expected, batch)
        with torch.inference_mode():
            assert torch.equal(network(*given), expected(*given).prediction)
    assert about["capacity"] == capacity


@pytest.mark.slow
def test_onnxruntime_draws_the_same_latents(tmp_path: Path):
    model = exported(tmp_path / "model", tiny_config(model__depth=2))
    out = served(model, tmp_path / "served", "onnx")
    network, about = standalone.load(out / "network.onnx")
    sampler = Sampler.open(model).with_capacity(None, "static")
    for batch in (2, 5):
        found = standalone.draw(network, about, LABELS, steps=4, batch=batch)
        assert equal(found, drawn_here(sampler, batch, steps=4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, g++")
def test_aot_inductor_compiles_it_for_any_number_of_images(tmp_path: Path):
    """As docs/conversion.md says."""
    # One block, with experts: most of the time is that of the C++ compiler.
    config = tiny_config(model__depth=1, moe__every_block=True)
    model = exported(tmp_path / "model", config)
    out = served(model, tmp_path / "served")
    stored, compiled = torch.export.load(out / "network.pt2"), str(tmp_path / "compiled.pt2")
    torch._inductor.aoti_compile_and_package(stored, package_path=compiled)
    network = torch._inductor.aoti_load_package(compiled)
    _, about = standalone.load(out / "network.pt2")
    sampler = Sampler.open(model).with_capacity(None, "static")
    for batch in (2, 5):
        found = standalone.draw(network, about, LABELS, steps=4, batch=batch)
        assert equal(found, drawn_here(sampler, batch, steps=4))
