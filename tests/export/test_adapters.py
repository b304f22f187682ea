"""What a LoRA run trained: merged at export, or apart and merged when it is opened."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import diffmoe
from diffmoe.capacity.thresholds import Calibrated, store
from diffmoe.checkpoints.network import load_network
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.evaluation.results import read
from diffmoe.export.adapter_writing import write_adapters
from diffmoe.export.adapters import Adapters, with_adapters
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.open import open_network
from diffmoe.export.sources import checkpoint_source, unmerged_source
from diffmoe.export.writing import probe, write_exported
from diffmoe.models.lora import factor_names, is_factor
from diffmoe.parallel.topology import Topology
from diffmoe.sampling.sampler import Sampler
from tests.helpers.models import NAMES, flip_bytes
from tests.helpers.runs import newest, pack, tensors
from tests.helpers.tools import command, told


def export(run: str | Path, target: Path, **how) -> Path:
    with checkpoint_source(Path(run)) as source:
        write_exported(source, target, **how)
    return target


def write_apart(run: str | Path, target: Path, weights: str = "ema", **how) -> Path:
    with unmerged_source(Path(run), weights) as source:
        write_adapters(source, target, **how)
    return target


@pytest.fixture(scope="module")
def base(lora_run: Config) -> Path:
    assert lora_run.training.init is not None
    return Path(lora_run.training.init)


@pytest.fixture(scope="module")
def adapters(lora_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_apart(lora_run.output, tmp_path_factory.mktemp("adapters") / "own")


@pytest.fixture(scope="module")
def merged(lora_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(lora_run.output, tmp_path_factory.mktemp("merged") / "own")


def test_an_export_holds_base_and_factors_in_one(lora_run: Config, base: Path, merged: Path):
    model, there = ExportedModel(merged), tensors(newest(lora_run))
    before = load_network(base / (base / "latest").read_text()).network.state_dict()
    changed = 0
    for name, shape in model.shapes.items():
        a, b = (there.get(f"ema/{factor}") for factor in factor_names(name))
        if a is None or b is None:
            continue
        weight = before[name].double()
        if weight.dim() == 3:
            expected = (
                weight + 4 * a.view(shape[0], -1, 2).double() @ b.view(shape[0], 2, -1).double()
            )
        else:
            expected = weight + 4 * b.view(-1, 2).double() @ a.view(2, -1).double()
        torch.testing.assert_close(model.read(name).double(), expected, rtol=0, atol=1e-6)
        changed += 1
    assert changed == 16
    assert not any(map(is_factor, model.shapes))
    assert model.metadata.provenance.steps == ("LoRA of rank 2 merged",)


def test_adapters_hold_what_was_trained_alone(lora_run: Config, adapters: Path):
    found, there = Adapters(adapters), tensors(newest(lora_run))
    names = {name.partition("/")[2] for name in there if name.startswith("exp_avg/")}
    buffers = {name.partition("/")[2] for name in there if name.startswith("buffers/")}
    assert found.shapes.keys() == names | buffers
    for name in names:
        assert torch.equal(found.read(name).view(-1), there[f"ema/{name}"]), name
    assert found.metadata.base.name == "base"
    assert len(found.metadata.base.experts) == 4
    told = (adapters / "config.json").read_text()
    assert str(Path(lora_run.output).parent) not in told


def test_adapters_on_the_base_are_the_merged_model_bit_for_bit(
    lora_run: Config, base: Path, adapters: Path, merged: Path, tmp_path: Path
):
    metadata = ExportedModel(merged).metadata
    expected = probe(diffmoe.load(merged, device="cpu"), metadata)
    own = probe(load_network(newest(lora_run)).network, metadata)
    for one in (base, export(base, tmp_path / "exported")):  # the same numbers in other files
        found = probe(diffmoe.load(one, device="cpu", adapters=adapters), metadata)
        for how, output in expected.items():
            assert torch.equal(found[how], output)
            assert torch.equal(own[how], output)
    for how, output in probe(diffmoe.load(base, device="cpu"), metadata).items():
        assert not torch.equal(output, expected[how])


def test_images_are_those_of_the_merged_model(base: Path, adapters: Path, merged: Path):
    how = {"labels": ["cat", 0], "seed": 3, "steps": 2, "guidance": 2.0}
    images = diffmoe.Pipeline(base, device="cpu", dtype="bf16", adapters=adapters)(**how)
    expected = diffmoe.Pipeline(merged, device="cpu", dtype="bf16")(**how)
    for found, image in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(image))
    plain = diffmoe.Pipeline(base, device="cpu", dtype="bf16")(**how)
    assert not np.array_equal(np.asarray(plain[0]), np.asarray(images[0]))


def test_a_pipeline_with_adapters_is_not_saved(base: Path, adapters: Path, tmp_path: Path):
    pipeline = diffmoe.Pipeline(base, device="cpu", adapters=adapters)
    with pytest.raises(UserError, match=r"adapters .* are merged into .* here, and no file holds"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_ranks_that_share_the_experts_take_their_own(base: Path, adapters: Path):
    whole = open_network(base, adapters=adapters).network
    parts = [
        open_network(
            base, topology=Topology(expert_parallel=2, expert_rank=rank), adapters=adapters
        ).network
        for rank in range(2)
    ]
    for name, parameter in whole.expert_parameters().items():
        joined = torch.cat([part.get_parameter(name) for part in parts])
        assert torch.equal(joined, parameter), name


def test_another_base_is_refused_by_name(
    lora_run: Config, base: Path, adapters: Path, merged: Path, single_run: Config, tmp_path: Path
):
    for other in (merged, export(base, tmp_path / "rounded", dtype="bfloat16")):
        with pytest.raises(UserError) as caught:
            diffmoe.load(other, device="cpu", adapters=adapters)
        assert f"{adapters} belongs to the model base (SHA-256 " in str(caught.value)
        assert f"and {other} holds other weights" in str(caught.value)
    with pytest.raises(UserError, match=r"base, with patch_embed.weight of \(16, 3, 2, 2\)"):
        diffmoe.load(single_run.output, device="cpu", adapters=adapters)
    # One expert's numbers are enough.
    opened = open_network(base)
    opened.network.get_parameter("blocks.3.feed_forward.experts.w_out").data[3, 0, 0] += 1e-3
    with pytest.raises(UserError, match="holds other weights"):
        with_adapters(opened, adapters, base)


def test_what_are_no_adapters_is_refused(base: Path, adapters: Path, merged: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds no adapters; those of a LoRA run are written by"):
        diffmoe.load(base, device="cpu", adapters=merged)
    with pytest.raises(UserError, match=r"belong to a model: open that, with --adapters"):
        diffmoe.load(adapters, device="cpu")
    with pytest.raises(UserError, match=r"was trained without LoRA \(lora.rank\)"):
        write_apart(base, tmp_path / "out")
    with pytest.raises(UserError, match="adapters are of ema or live weights"):
        write_apart(base, tmp_path / "out", "ema:0.1")
    assert not (tmp_path / "out").exists()
    damaged = shutil.copytree(adapters, tmp_path / "damaged")
    flip_bytes(damaged / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is missing, or differs"):
        diffmoe.load(base, device="cpu", adapters=damaged)
    about = json.loads((adapters / "config.json").read_text())
    for field, value, message in (
        (("lora", "rank"), 3, "weight_lora_a has the shape"),
        (("lora", "targets"), ["attention"], "lora_a has the shape"),
        (("model", "model", "depth"), 1 << 19, "of 524288 blocks"),
    ):
        changed = json.loads(json.dumps(about))
        section = changed
        for key in field[:-1]:
            section = section[key]
        section[field[-1]] = value
        (damaged / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            diffmoe.load(base, device="cpu", adapters=damaged, verify=False)


def test_calibrated_capacities_go_along(lora_run: Config, base: Path, tmp_path: Path):
    checkpoint = shutil.copytree(newest(lora_run), tmp_path / newest(lora_run).name)
    entry = Calibrated(
        weights="ema", capacity=0.5, measured=0.5, common=False, over="noise", samples=8,
        log_odds=[[0.1] * 4] * 2,
    )  # fmt: skip
    store(checkpoint, "0.5", entry)
    adapters = write_apart(checkpoint, tmp_path / "own")
    sampler = Sampler.open(base, adapters=adapters).with_capacity(0.5)
    assert sampler.choice.calibrated == entry
    assert sampler.identity()["adapters"] == "own"
    with pytest.raises(UserError, match=r"has no thresholds for capacity 0\.5"):
        Sampler.open(base).with_capacity(0.5)


@pytest.mark.slow
def test_evaluation_and_the_report_are_those_of_the_merged_model(
    base: Path, adapters: Path, merged: Path, tmp_path: Path
):
    held_out = pack(tmp_path / "held-out", [9], first=100, shape=(3, 8, 8), class_names=NAMES)
    found: dict[str, list] = {}
    for name, words in {
        "apart": (base, "--adapters", adapters), "merged": (merged,), "base": (base,),
    }.items():  # fmt: skip
        out = tmp_path / name
        how = ("--steps", "2", "--guidance", "2", "--device", "cpu")
        told(
            "tools/evaluate.py", "loss", *words, "--data", held_out, "--samples", "8", "--out", out
        )
        judge = ("--classifier", "tests.helpers.pictures:brightest_channel")
        told("tools/evaluate.py", *words, "--num", "4", *how, *judge, "--out", out)
        report = ("--samples", "4", *how, "--out", out / "routing.html")
        said = told("tools/report_routing.py", *words, *report)
        loss, images = read(out / "results.jsonl")
        (samples,) = out.glob("*/samples-*.npz")
        arrays = np.load(samples)
        found[name] = [loss["by_time"], arrays["images"].tolist(), said.partition(":")[0]]
        assert (str(adapters) in loss["model"]) == (name == "apart")
        assert (str(adapters) in images["model"]) == (name == "apart")
        assert (f"with {adapters}" in (out / "routing.html").read_text()) == (name == "apart")
    assert found["apart"] == found["merged"]
    assert found["base"][0] != found["merged"][0]
    assert found["base"][1] != found["merged"][1]
    for words in (("loss", base), (base, "--num", "4")):
        refused = command("tools/evaluate.py", *words, "--adapters", adapters, "--every-snapshot")
        assert refused.returncode == 2
        assert "--every-snapshot: not allowed with argument --adapters" in refused.stderr


@pytest.mark.slow
def test_the_commands(lora_run: Config, base: Path, merged: Path, tmp_path: Path):
    out = tmp_path / "own"
    said = told("tools/convert_checkpoint.py", lora_run.output, out, "--adapters")
    assert said.endswith("MB of float32, for the model base\n")
    how = ("--classes", "cat", "--per-class", "2", "--steps", "2", "--guidance", "2", "--out")
    told("tools/sample.py", base, "--adapters", out, *how, tmp_path / "apart.png")
    told("tools/sample.py", merged, *how, tmp_path / "merged.png")
    assert (tmp_path / "apart.png").read_bytes() == (tmp_path / "merged.png").read_bytes()
    refused = command("tools/sample.py", merged, "--adapters", out, *how, tmp_path / "x.png")
    assert refused.returncode == 2
    assert "belongs to the model base" in refused.stderr
