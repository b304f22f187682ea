"""A run's checkpoint becomes a folder for inference: every tensor, whole or not at all."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffmoe
from diffmoe.capacity.thresholds import Calibrated, store, stored
from diffmoe.checkpoints.network import load_network
from diffmoe.checkpoints.profiles import power_prefix
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.export import writing
from diffmoe.export.exported_model import ExportedModel, load_exported
from diffmoe.export.open import locate, open_network, weights_of
from diffmoe.export.sources import Source, checkpoint_source, exported_source
from diffmoe.export.tensors import meta_network
from diffmoe.export.writing import probe, write_exported
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology
from tests.helpers.models import exported, source_of
from tests.helpers.runs import newest, tensors
from tests.helpers.tiny import BYTES, tiny_config


def export(config: Config, target: Path, weights: str = "ema", **how) -> Path:
    with checkpoint_source(Path(config.output), weights) as source:
        write_exported(source, target, **how)
    return target


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("run", ["single_run", "spread_run"])
@pytest.mark.parametrize(("weights", "prefix"), [("ema", "ema"), ("live", "weights")])
def test_an_export_holds_every_tensor_of_the_checkpoint(
    run: str, weights: str, prefix: str, request: pytest.FixtureRequest, tmp_path: Path
):
    config = request.getfixturevalue(run)
    model = ExportedModel(export(config, tmp_path / "out", weights))
    there = tensors(newest(config))
    expected = {
        name.partition("/")[2]: tensor
        for name, tensor in there.items()
        if name.partition("/")[0] in (prefix, "buffers")
    }
    assert model.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(model.read(name).view(-1), tensor.view(-1)), name
    assert model.shapes["blocks.1.feed_forward.experts.w_in"] == (4, 16, 64)
    assert model.metadata.weights == weights
    assert model.metadata.clock.samples == 24
    assert model.metadata.class_names[2] == "bird"


def test_an_export_computes_what_its_checkpoint_does(spread_run: Config, tmp_path: Path):
    folder = export(spread_run, tmp_path / "out")
    metadata = ExportedModel(folder).metadata
    expected = probe(load_network(newest(spread_run)).network, metadata)
    found = probe(diffmoe.load(folder, device="cpu"), metadata)
    assert found.keys() == {"per_token", "static"}
    for how, output in found.items():
        assert torch.equal(output, expected[how])


def test_an_average_of_any_length_is_exported_without_a_detour(single_run: Config, tmp_path: Path):
    model = ExportedModel(export(single_run, tmp_path / "out", "ema:0.10"))
    assert model.metadata.weights == "ema:0.1"
    assert model.metadata.calibrated_for == "ema"
    # The run tracked this length itself, so the combination is that average.
    tracked = {
        name.partition("/")[2]: tensor
        for name, tensor in tensors(newest(single_run)).items()
        if name.startswith(f"{power_prefix(0.1)}/")
    }
    assert len(tracked) > 20
    for name, tensor in tracked.items():
        torch.testing.assert_close(model.read(name).view(-1), tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", ["mean", "live:0.1", "ema:long"])
def test_unknown_weights_are_refused(weights: str, single_run: Config, tmp_path: Path):
    with pytest.raises(UserError, match="--weights"):
        export(single_run, tmp_path / "out", weights)


def test_one_loader_takes_a_run_a_checkpoint_and_an_export(single_run: Config, tmp_path: Path):
    folder = export(single_run, tmp_path / "out", "live")
    run = Path(single_run.output)
    assert locate(run) == locate(newest(single_run)) == newest(single_run)
    assert locate(folder) == folder
    assert weights_of(folder, "ema") == "live"
    assert weights_of(newest(single_run), "ema") == "ema"
    a, b = open_network(run, "live"), open_network(folder)
    for (name, x), y in zip(
        a.network.state_dict().items(), b.network.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
    assert a.clock == b.clock
    assert a.config.model == b.config.model
    assert b.latents.autoencoder == "identity"


def test_a_rank_reads_its_own_experts_alone(tmp_path: Path):
    folder = exported(tmp_path / "out")
    whole, _ = load_exported(folder)
    # Groups are joined when a forward runs, not while a model is loaded.
    parts = [
        load_exported(folder, topology=Topology(rank=r, world=2, expert_parallel=2, expert_rank=r))
        for r in range(2)
    ]
    for name, parameter in whole.expert_parameters().items():
        joined = torch.cat([dict(part.named_parameters())[name] for part, _ in parts])
        assert torch.equal(joined, parameter)


def test_bfloat16_rounds_parameters_and_keeps_thresholds(tmp_path: Path):
    source = source_of(tiny_config())
    write_exported(source, tmp_path / "out", dtype="bfloat16")
    model = ExportedModel(tmp_path / "out")
    for name in source.shapes:
        expected = source.read(name)
        if not name.endswith(".thresholds"):
            expected = expected.bfloat16()
        assert torch.equal(model.read(name), expected), name
    network = diffmoe.load(tmp_path / "out", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.positions.dtype == network.thresholds_LE.dtype == torch.float32
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    in_bf16 = network(x, t, labels).prediction
    in_fp32 = diffmoe.load(tmp_path / "out", device="cpu")(x, t, labels).prediction
    assert in_bf16.dtype == torch.float32
    # A few roundings of 2^-8 on the way; routing may flip a token near its threshold.
    assert (in_bf16 - in_fp32).norm() / in_fp32.norm() < 0.05


def test_shards_with_an_index_hold_the_same(tmp_path: Path):
    source = source_of(tiny_config())
    write_exported(source, tmp_path / "out", max_shard_bytes=40_000)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    read_by_others = {k: v for file in files for k, v in load_file(file).items()}
    assert index["weight_map"].keys() == read_by_others.keys() == source.shapes.keys()
    for name, tensor in read_by_others.items():
        assert torch.equal(tensor, source.read(name))
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 40_000 for f in files)


def test_calibrated_thresholds_of_the_same_weights_come_along(single_run: Config, tmp_path: Path):
    checkpoint = shutil.copytree(newest(single_run), tmp_path / "step-00000003")
    for name, weights in (("0.5", "ema"), ("0.8", "live")):
        entry = Calibrated(
            weights=weights, capacity=float(name), measured=0.5, common=False, over="noise",
            samples=8, log_odds=[[0.1] * 4] * 2,
        )  # fmt: skip
        store(checkpoint, name, entry)
    with checkpoint_source(checkpoint) as source:
        write_exported(source, tmp_path / "out")
    assert stored(tmp_path / "out").keys() == {"0.5"}
    assert "| calibrated capacities | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    with exported_source(tmp_path / "out") as source:
        write_exported(source, tmp_path / "again", dtype="bfloat16")
    assert stored(tmp_path / "again").keys() == {"0.5"}


def test_the_model_card_tells_the_run_and_its_figures(single_run: Config, tmp_path: Path):
    run = shutil.copytree(single_run.output, tmp_path / "run")
    (run / "results.jsonl").write_text('{"fid": 12.3456789, "capacity": 0.8}\n{"fid": 11}\n')
    with checkpoint_source(run) as source:
        write_exported(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "| samples seen | 24 |",
        "38,272, of which 25,504",  # 4 experts of 4,256 in 2 layers work as 1 on average
        "| data | tests; 5 classes: plane, car, bird, cat, deer |",
        "| fid: 12.3457, capacity: 0.8 |",
        "run/step-00000003",
        "license: # fill in",
        "pipeline(labels=['plane', 'car'], seed=0, steps=50, guidance=1.5)",
    ):
        assert text in card, text


def test_a_damaged_line_of_the_figures_is_named(single_run: Config, tmp_path: Path):
    run = shutil.copytree(single_run.output, tmp_path / "run")
    (run / "results.jsonl").write_text('{"fid": 12}\nnot json\n')
    with checkpoint_source(run) as source, pytest.raises(UserError, match=r"jsonl, line 2"):
        write_exported(source, tmp_path / "out")
    assert left_behind(tmp_path) == ["run"]


def changed(source: Source, name: str, tensor: torch.Tensor | None) -> Source:
    """The source with another tensor of a name; None: without it."""
    shapes = dict(source.shapes)
    if tensor is None:
        del shapes[name]
    else:
        shapes[name] = tuple(tensor.shape)
    read = source.read
    return Source(
        source.where,
        source.metadata,
        shapes,
        lambda asked: tensor if asked == name else read(asked),
    )


W_IN = "blocks.1.feed_forward.experts.w_in"


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        (W_IN, None, f"{W_IN} is missing"),
        (W_IN, torch.zeros(3, 16, 64), f"{W_IN} holds 3 experts, not 4"),
        (W_IN, torch.full((4, 16, 64), torch.nan), f"{W_IN} contains 4096 numbers that are not"),
        ("final.bias", torch.zeros(9), r"final.bias has the shape \(9,\), not \(8,\)"),
        ("blocks.9.extra", torch.zeros(1), "blocks.9.extra is unexpected"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(
    name: str, tensor: torch.Tensor | None, told: str, tmp_path: Path
):
    with pytest.raises(UserError, match=told):
        write_exported(changed(source_of(tiny_config()), name, tensor), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_result_that_computes_otherwise_is_not_kept(tmp_path: Path, monkeypatch):
    def one_number_off(folder: Path, **how):
        network, metadata = load_exported(folder, **how)
        network.blocks[1].feed_forward.experts.w_out[3, 0, 0] += 1e-3
        return network, metadata

    monkeypatch.setattr(writing, "load_exported", one_number_off)
    with pytest.raises(UserError, match="differs from the source's by up to"):
        write_exported(source_of(tiny_config()), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_missing_expert_of_a_checkpoint_is_named(spread_run: Config, tmp_path: Path):
    checkpoint = shutil.copytree(newest(spread_run), tmp_path / "step-00000003")
    file = checkpoint / "index.json"
    index = json.loads(file.read_text())
    item = index["tensors"]["ema/" + W_IN]
    # What the second rank of the expert-parallel group wrote: experts 2 and 3.
    half = item["shape"][0] // 2
    item["pieces"] = [piece for piece in item["pieces"] if piece["start"][0] < half]
    file.write_text(json.dumps(index))
    listed = json.loads((checkpoint / "checksums.json").read_text())
    listed["files"]["index.json"]["bytes"] = file.stat().st_size
    (checkpoint / "checksums.json").write_text(json.dumps(listed))
    told = rf"\(of experts 2 to 3\) of ema/{W_IN} are in no file"
    with pytest.raises(UserError, match=told), checkpoint_source(checkpoint) as source:
        write_exported(source, tmp_path / "out")
    assert left_behind(tmp_path) == ["step-00000003"]


def test_an_existing_target_is_refused_even_if_empty(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists"):
        write_exported(source_of(tiny_config()), tmp_path / "out")
    assert left_behind(tmp_path) == ["out"]


def test_too_little_space_is_told_before_work(tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 0\.00 GB, 0\.00 GB are free"):
        write_exported(source_of(tiny_config()), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="out was not written: File too large"):
            write_exported(source_of(tiny_config()), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_behind(tmp_path) == []


def test_what_a_kill_left_is_no_hindrance(tmp_path: Path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "model.safetensors").write_bytes(b"half")
    exported(tmp_path / "out")
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modle": {}}, "config.json: modle is unknown"),
        ({"version": 2}, "config.json: version=2"),
        ({"model": {"width": 10**15}}, "model.width=1000000000000000 is not the size"),
        (
            {"model": {"text": {"length": 10**15}}},
            "model.text.length=1000000000000000 is not the size",
        ),
        ({"model": {"text": BYTES}}, "text_embed.null_token is missing"),
        ({"model": {"heads": 3}}, "model.width=16 is not divisible by model.heads=3"),
        ({"model": {"depth": 5}}, "blocks.4.attention.qkv.weight is missing"),
        ({"latents": {"shape": [4, 8, 8]}}, r"latents.shape=\(4, 8, 8\), but the model takes"),
        ({"dtype": "bfloat16"}, "is F32, config.json says BF16"),
    ],
)
def test_a_config_that_does_not_fit_is_named(change: dict, told: str, tmp_path: Path):
    file = exported(tmp_path / "out") / "config.json"
    values = json.loads(file.read_text())
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=told):
        diffmoe.load(tmp_path / "out")


def test_an_extra_or_missing_tensor_of_a_folder_is_named(tmp_path: Path):
    file = exported(tmp_path / "out") / "model.safetensors"
    state = load_file(file)
    save_file({**state, "spare": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="spare is unexpected"):
        diffmoe.load(tmp_path / "out")
    del state["final.bias"]
    save_file(state, file)
    with pytest.raises(UserError, match=r"final\.bias is missing"):
        diffmoe.load(tmp_path / "out")


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path):
    write_exported(source_of(tiny_config()), tmp_path / "out", max_shard_bytes=40_000)
    file = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["final.bias"] = "../secret.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of its folder"):
        diffmoe.load(tmp_path / "out")


def test_a_network_is_built_once_to_learn_its_shapes(tmp_path: Path, monkeypatch):
    folder = exported(tmp_path / "out")
    meta_network.cache_clear()
    built = []
    build = DiT.__init__

    def counted(network: DiT, *args, **how):
        built.append(args[0])
        build(network, *args, **how)

    monkeypatch.setattr(DiT, "__init__", counted)
    with exported_source(folder) as opened:
        write_exported(opened, tmp_path / "again")
    # For the shapes, and with tensors: the source's and the written one's predictions.
    assert len(built) == 3
