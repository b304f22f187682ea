"""Every option of the release that shapes its networks, in configurations nobody has published."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffmoe
from diffmoe.conversion.foreign import Options, foreign_source, write_foreign
from diffmoe.conversion.release import _ratio, config_from_release
from diffmoe.conversion.upcycling import upcycle
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.sources import exported_source
from diffmoe.export.writing import write_exported
from diffmoe.models.dit import DiT
from tests.helpers.models import RELEASE, options_of, reference, release_input, release_state
from tests.helpers.release_model import forward, random_state

KINDS = {"ecdit": "ECDiT", "tcdit": "TCDiT", "dense": "DiT"}
BASE = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2,
    "num_heads": 4, "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 10,
    "learn_sigma": True,
}  # fmt: skip
MOE = {"n_shared_experts": 0, "num_experts": 4, "capacity": 1, "interleave": True}


def options(moe: dict | None = None, **changes) -> dict:
    return {**BASE, "MoE_config": {**MOE, **(moe or {})}, **changes}


FRESH = {
    "dense swiglu": ("DiT", options(use_swiglu=True)),
    "dense head_dim": ("DiT", options(head_dim=12)),
    "dense no null row": ("DiT", options(class_dropout_prob=0.0)),
    "diffmoe swiglu interleaved": ("DiffMoE", options(use_swiglu=True)),
    "diffmoe swiglu shared": ("DiffMoE", options({"n_shared_experts": 1}, use_swiglu=True)),
    "diffmoe two shared": ("DiffMoE", options({"n_shared_experts": 2}, mlp_ratio=2.0)),
    "diffmoe head_dim": ("DiffMoE", options({"interleave": False}, head_dim=16)),
    "diffmoe capacity 2": ("DiffMoE", options({"capacity": 2}, learn_sigma=False)),
    "ec swiglu interleaved": ("ECDiT", options({"capacity": 2}, use_swiglu=True)),
    "ec shared": ("ECDiT", options({"n_shared_experts": 2, "interleave": False})),
    "ec head_dim, no null row": ("ECDiT", options(head_dim=4, class_dropout_prob=0.0)),
    "tc swiglu interleaved": ("TCDiT", options({"capacity": 2}, use_swiglu=True)),
    "tc shared": ("TCDiT", options({"n_shared_experts": 1, "capacity": 3}, mlp_ratio=3.0)),
}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", RELEASE)
def test_the_plain_networks_are_the_releases(name: str):
    after = "buffers_eval" if name.startswith("diffmoe") else None
    kind, state = KINDS.get(name, "DiffMoE"), release_state(name, after)
    expected = reference(name)["eval.output"]
    close(forward(kind, options_of(name), state, *release_input(name)), expected)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    return x, torch.rand(3, generator=generator), torch.tensor([0, 7, 9])


def said(kind: str, release: dict) -> Options:
    """What its user must tell of such a file."""
    moe = release["MoE_config"]
    return Options(
        objective="flow",
        heads=release["num_heads"],
        num_classes=release["num_classes"],
        capacity=1.0 if kind == "TCDiT" else moe["capacity"],
        top_k=moe["capacity"] if kind == "TCDiT" else 1,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", FRESH)
def test_any_network_of_the_release_computes_the_same_here(name: str, tmp_path: Path):
    kind, release = FRESH[name]
    state = random_state(kind, release)
    torch.save({"ema": state}, tmp_path / "a.pt")
    with foreign_source(tmp_path / "a.pt", options=said(kind, release)) as source:
        write_exported(source, tmp_path / "out")
    network = diffmoe.load(tmp_path / "out", device="cpu")
    close(network(*inputs()).prediction, forward(kind, release, state, *inputs()))
    with exported_source(tmp_path / "out") as source:
        write_foreign(source, tmp_path / "b.pt", "release")
    back = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        if key == "pos_embed":  # computed again, in another order
            close(back[key], tensor)
        else:
            assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("name", FRESH)
def test_the_releases_options_and_its_tensors_tell_the_same(name: str, tmp_path: Path):
    kind, release = FRESH[name]
    torch.save({"ema": random_state(kind, release)}, tmp_path / "a.pt")
    with foreign_source(tmp_path / "a.pt", options=said(kind, release)) as source:
        found = source.metadata
    expected = config_from_release(kind, release)
    assert found.model == expected.model
    if kind != "DiT":
        unseen = {"capacity_loss_weight"}
        assert found.moe.model_dump(exclude=unseen) == expected.moe.model_dump(exclude=unseen)
    assert (found.label_dropout == 0) == (release["class_dropout_prob"] == 0)


def test_options_of_training_that_no_tensor_shows():
    config = config_from_release("ECDiT", options({"init_MoeMLP": True}, use_swiglu=True))
    network = DiT(config.model, config.moe).initialize(0)
    plain = DiT(config.model, config.moe.model_copy(update={"expert_init_std": None})).initialize(0)
    there = dict(plain.named_parameters())
    for name, parameter in network.named_parameters():
        if ".experts." in name:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.02), name
        else:
            assert torch.equal(parameter, there[name]), name
    schedule = {"capacity_schedule": {"capacity_schedule_stage_I_iters": 10}}
    with pytest.raises(UserError, match=r"MoE_config\.capacity_schedule: .* cannot be trained"):
        config_from_release("DiffMoE", options(schedule))


@pytest.mark.parametrize("width", [44, 100])
def test_a_hidden_size_of_any_width_is_met(width: int):
    for hidden in range(1, 8 * width):
        assert int(width * _ratio(hidden, width)) == hidden


def saved(path: Path, state: dict[str, Tensor], **entries) -> Path:
    torch.save({"ema": state, **entries}, path)
    return path


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_the_number_of_classes_is_asked_for_or_taken_from_the_file(dropout: float, tmp_path: Path):
    release = options(class_dropout_prob=dropout)
    state = random_state("DiT", release)
    unsaid = replace(said("DiT", release), num_classes=None)
    path = saved(tmp_path / "a.pt", state)
    rows = 11 if dropout else 10
    told = rf"a\.pt: its label table has {rows} rows: .* give --num-classes N"
    with pytest.raises(UserError, match=told), foreign_source(path, options=unsaid):
        pass
    told = f"which do not fit 12 classes; give --num-classes {rows - 1}, or {rows}"
    wrong = replace(unsaid, num_classes=12)
    with pytest.raises(UserError, match=told), foreign_source(path, options=wrong):
        pass
    for kept in (argparse.Namespace(num_classes=10), {"num_classes": 10}):
        path = saved(tmp_path / "b.pt", state, args=kept)
        with foreign_source(path, options=unsaid) as source:
            assert source.metadata.model.num_classes == 10
            assert source.metadata.label_dropout == (None if dropout else 0)


def test_a_published_table_of_labels_needs_no_answer(tmp_path: Path):
    release = options(num_classes=1000)
    path = saved(tmp_path / "a.pt", random_state("DiT", release))
    with foreign_source(path, options=replace(said("DiT", release), num_classes=None)) as source:
        assert source.metadata.model.num_classes == 1000
        assert any("1000 classes" in note for note in source.notes)


@torch.no_grad()
def test_without_a_null_row_every_class_is_its_own(tmp_path: Path):
    kind, release = FRESH["dense no null row"]
    state = random_state(kind, release)
    with foreign_source(saved(tmp_path / "a.pt", state), options=said(kind, release)) as source:
        assert any("cannot be guided" in note for note in source.notes)
        write_exported(source, tmp_path / "out")
    network = diffmoe.load(tmp_path / "out", device="cpu")
    x, t, _ = inputs()
    y = torch.tensor([9, 8, 0])
    close(network(x, t, y).prediction, forward(kind, release, state, x, t, y))
    metadata = ExportedModel(tmp_path / "out").metadata
    assert metadata.config.training.label_dropout == 0
    assert torch.equal(network.label_embed.weight[10], torch.zeros(32))


def test_heads_of_another_width_that_cannot_be_seen_are_asked_for(tmp_path: Path):
    release = options(hidden_size=384, num_heads=6, head_dim=32, depth=1)
    path = saved(tmp_path / "a.pt", random_state("DiT", release))
    unsaid = replace(said("DiT", release), heads=None)
    with (
        pytest.raises(UserError, match=r"takes 192 channels .* give --heads N"),
        foreign_source(path, options=unsaid),
    ):
        pass
    for heads in (5, 0):
        with (
            pytest.raises(UserError, match=rf"which is not divisible by {heads} heads"),
            foreign_source(path, options=replace(unsaid, heads=heads)),
        ):
            pass
    with foreign_source(path, options=said("DiT", release)) as source:
        assert (source.metadata.model.heads, source.metadata.model.head_width) == (6, 32)


def test_heads_that_are_assumed_are_said(tmp_path: Path):
    release = options(hidden_size=384, num_heads=16, depth=1)
    path = saved(tmp_path / "a.pt", random_state("DiT", release))
    with foreign_source(path, options=replace(said("DiT", release), heads=None)) as source:
        assert source.metadata.model.heads == 6
        assert any("6 attention heads, as published" in note for note in source.notes)
    with foreign_source(path, options=said("DiT", release)) as source:
        assert source.metadata.model.heads == 16


WRAPPED = {
    "compiled whole": (lambda name: f"_orig_mod.{name}", "_orig_mod"),
    "compiled blocks": (
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        "_orig_mod",
    ),
    "compiled and DDP": (lambda name: f"module._orig_mod.{name}", "module. "),
    "DDP inside": (lambda name: f"_orig_mod.module.{name}", "module. "),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_what_wrappers_put_into_names_is_taken_off_and_said(how: str, tmp_path: Path):
    renamed, told = WRAPPED[how]
    kind, release = FRESH["diffmoe two shared"]
    state = random_state(kind, release)
    path = saved(tmp_path / "a.pt", {renamed(name): tensor for name, tensor in state.items()})
    plain = saved(tmp_path / "b.pt", state)
    how_read = {"options": said(kind, release)}
    with foreign_source(path, **how_read) as wrapped, foreign_source(plain, **how_read) as source:
        assert any(told in note for note in wrapped.notes)
        assert not any(told in note for note in source.notes)
        for name in source.shapes:
            assert torch.equal(wrapped.read(name), source.read(name)), name


def test_heads_that_align_are_left_out_and_said(tmp_path: Path):
    kind, release = FRESH["dense swiglu"]
    state = random_state(kind, release)
    heads = {f"_orig_mod.projectors.{i}.0.weight": torch.ones(2) for i in range(3)}
    with foreign_source(
        saved(tmp_path / "a.pt", {**state, **heads}), options=said(kind, release)
    ) as source:
        assert any("left out 3 tensors projectors.*" in note for note in source.notes)
    twice = {**state, "_orig_mod.pos_embed": state["pos_embed"]}
    with (
        pytest.raises(UserError, match=r"_orig_mod\.pos_embed exists with and without"),
        foreign_source(saved(tmp_path / "b.pt", twice), options=said(kind, release)),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"holds no tensors of a network; .*left out"),
        foreign_source(saved(tmp_path / "c.pt", heads), options=said(kind, release)),
    ):
        pass


@torch.no_grad()
def test_a_gated_dense_model_is_upcycled_with_the_same_output(tmp_path: Path):
    kind, release = FRESH["dense swiglu"]
    path = saved(tmp_path / "a.pt", random_state(kind, release))
    with foreign_source(path, options=said(kind, release)) as source:
        write_exported(source, tmp_path / "dense")
        write_exported(upcycle(source, 4), tmp_path / "moe")
        write_exported(upcycle(source, 4, how="copies", capacity=4), tmp_path / "copies")
    expected = diffmoe.load(tmp_path / "dense", device="cpu")(*inputs()).prediction
    found = diffmoe.load(tmp_path / "moe", device="cpu")(*inputs()).prediction
    assert torch.equal(found, expected)
    copies = diffmoe.load(tmp_path / "copies", device="cpu")
    copies.route_by("static")
    close(copies(*inputs()).prediction, expected)
