"""Weights of other projects, both ways: every name, every value, and the same forward."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

import diffmoe
from diffmoe.conversion.foreign import Options, foreign_source, write_foreign
from diffmoe.conversion.release import config_from_release
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel
from diffmoe.export.sources import exported_source
from diffmoe.export.writing import write_exported
from diffmoe.models.dit import DiT
from tests.helpers.models import (
    DIFFMOE,
    RELEASE,
    options_of,
    reference,
    release_file,
    release_input,
    release_state,
    source_of,
)
from tests.helpers.networks import network_of
from tests.helpers.tiny import BYTES, tiny_config

FLOW = Options(objective="flow", heads=4, num_classes=10)
KIND = {"ecdit": "ECDiT", "tcdit": "TCDiT", "dense": "DiT"}


def converted(path: Path, target: Path, options: Options = FLOW, **how) -> DiT:
    with foreign_source(path, options=options, **how) as source:
        write_exported(source, target)
    return diffmoe.load(target, device="cpu")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", RELEASE)
def test_a_release_file_computes_what_the_release_did(name: str, tmp_path: Path):
    after = "buffers_eval" if name in DIFFMOE else None
    options = replace(FLOW, capacity=2 if "capacity2" in name else 1)
    network = converted(release_file(tmp_path / "a.pt", name, after), tmp_path / "out", options)
    x, t, labels = release_input(name)
    expected = reference(name)
    with torch.no_grad():
        close(network(x, t, labels).prediction, expected["eval.output"])
        close(network(x[:2], t[:2], labels[:2]).prediction, expected["eval.output_first_two"])


@pytest.mark.parametrize("name", RELEASE)
def test_what_the_tensors_show_is_what_the_options_said(name: str, tmp_path: Path):
    with foreign_source(release_file(tmp_path / "a.pt", name), options=FLOW) as source:
        found = source.metadata
    options = options_of(name)
    expected = config_from_release(KIND.get(name, "DiffMoE"), options)
    unseen = {"capacity", "capacity_loss_weight", "threshold_ema", "inference"}
    assert found.model.model_dump(exclude={"mlp_ratio"}) == expected.model.model_dump(
        exclude={"mlp_ratio"}
    )
    if found.moe.type == "dense":
        assert expected.moe.type == "dense"
    else:
        assert found.moe.model_dump(exclude=unseen) == expected.moe.model_dump(exclude=unseen)


@pytest.mark.parametrize("name", RELEASE)
def test_a_release_file_comes_back_as_it_was(name: str, tmp_path: Path):
    after = "buffers_eval" if name in DIFFMOE else None
    first = release_file(tmp_path / "a.pt", name, after)
    converted(first, tmp_path / "out")
    with exported_source(tmp_path / "out") as source:
        write_foreign(source, tmp_path / "b.pt", "release")
    state = torch.load(first, weights_only=True)["ema"]
    back = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        if key == "pos_embed":  # computed again, in another order
            close(back[key], tensor)
        else:
            assert torch.equal(back[key], tensor), key


def test_the_entry_that_is_asked_for_is_taken(tmp_path: Path):
    state = release_state("diffmoe_every_layer")
    other = {key: tensor * 2 if "fc1" in key else tensor for key, tensor in state.items()}
    options = argparse.Namespace(model="DiffMoE-S")  # as the release, DiT and SiT save theirs
    path = tmp_path / "a.pt"
    torch.save({"ema": state, "model": other, "opt": {"state": {}}, "args": options}, path)
    w_in = "blocks.0.feed_forward.experts.w_in"
    with (
        foreign_source(path, options=FLOW) as ema,
        foreign_source(path, "live", None, FLOW) as live,
    ):
        assert torch.equal(live.read(w_in), 2 * ema.read(w_in))
        assert (ema.metadata.weights, live.metadata.weights) == ("ema", "live")
        assert any("far too low" in note for note in ema.notes)
        assert not any("far too low" in note for note in live.notes)
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match="no ema weights, only the entries model"):
        converted(path, tmp_path / "out")


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


EXPERT = "blocks.1.mlp.experts.2.fc1.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: without(s, EXPERT), f"{EXPERT} is missing"),
        (lambda s: {**s, "blocks.1.mlp.spare": torch.ones(1)}, "blocks.1.mlp.spare is unexpected"),
        (
            lambda s: {**s, EXPERT: torch.ones(64, 32)},
            rf"{EXPERT} has the shape \(64, 32\), not \(128, 32\)",
        ),
        (lambda s: {**s, EXPERT: s[EXPERT] / 0}, "w_in contains .* numbers that are not finite"),
        (
            lambda s: {**s, "pos_embed": s["pos_embed"] + 0.1},
            "trained positions cannot be converted",
        ),
        (lambda s: {**s, "final_layer.linear.weight": torch.ones(31, 32)}, "linear.weight has the"),
        (lambda s: {**s, EXPERT: s[EXPERT].long()}, "is a torch.int64 tensor"),
        (lambda s: without(s, "x_embedder.proj.weight"), "x_embedder.proj.weight is missing"),
        (lambda s: {"blocks.0.other": torch.ones(2)}, "x_embedder.proj.weight is missing"),
    ],
)
def test_what_does_not_fit_is_named_as_the_file_has_it(change, told: str, tmp_path: Path):
    state = change(release_state("diffmoe_every_layer"))
    torch.save({"ema": state}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=told):
        converted(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_seen_is_asked_for(tmp_path: Path):
    path = release_file(tmp_path / "a.pt", "dense")
    with pytest.raises(UserError, match="--format dit, --format sit, or --objective"):
        converted(path, tmp_path / "out", replace(FLOW, objective=None))
    with pytest.raises(UserError, match="give --heads N"):
        converted(path, tmp_path / "out", replace(FLOW, heads=None))
    torch.save(without(release_state("dense"), "pos_embed"), path)
    with pytest.raises(UserError, match="give --input-size N"):
        converted(path, tmp_path / "out")
    converted(path, tmp_path / "out", replace(FLOW, input_size=8))


def test_the_published_widths_tell_their_heads(tmp_path: Path):
    config = tiny_config(model__width=384, model__heads=6, model__depth=1, moe__type="dense")
    write_foreign(source_of(config), tmp_path / "a.pt", "sit")
    options = Options(num_classes=5)
    with foreign_source(tmp_path / "a.pt", form="sit", options=options) as source:
        assert source.metadata.model == config.model
        assert source.metadata.diffusion.objective == "flow"


def test_a_file_of_another_format_than_said_is_refused(tmp_path: Path):
    mixture = release_file(tmp_path / "a.pt", "ecdit")
    with pytest.raises(UserError, match="not a file of --format sit: it has experts"):
        converted(mixture, tmp_path / "out", FLOW, form="sit")
    with pytest.raises(UserError, match="not a file of --format diffusers"):
        converted(mixture, tmp_path / "out", FLOW, form="diffusers")


@pytest.mark.parametrize(("form", "objective"), [("dit", "ddpm"), ("sit", "flow")])
def test_dit_and_sit_files_are_dense_models_of_their_objective(
    form: str, objective: str, tmp_path: Path
):
    # Their names, written out here once: the table that is tested must not make them.
    torch.manual_seed(0)
    width, depth = 16, 2
    sizes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (32, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        sizes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    state = {f"{name}.weight": torch.randn(size) for name, size in sizes.items()}
    state |= {f"{name}.bias": torch.randn(size[0]) for name, size in sizes.items()}
    state["y_embedder.embedding_table.weight"] = torch.randn(11, width)
    path = tmp_path / "a.pt"
    torch.save(state, path)  # published ones have no entries, nor are they wrapped
    network = converted(
        path, tmp_path / "out", Options(heads=2, input_size=8, num_classes=10), form=form
    )
    metadata = ExportedModel(tmp_path / "out").metadata
    assert metadata.diffusion.objective == objective
    assert metadata.model.learn_sigma
    assert (metadata.latents.autoencoder, metadata.latents.scale) == (
        "stabilityai/sd-vae-ft-ema",
        0.18215,
    )
    ours = dict(network.named_parameters())
    for name, tensor in state.items():
        assert any(torch.equal(tensor, parameter) for parameter in ours.values()), name
    assert torch.equal(ours["blocks.1.attention.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert sum(p.numel() for p in ours.values()) == sum(t.numel() for t in state.values())
    with exported_source(tmp_path / "out") as source:
        write_foreign(source, tmp_path / "b.pt", form)
        other = {"dit": "sit", "sit": "dit"}[form]
        with pytest.raises(UserError, match=f"was trained with {objective}, but {other} needs"):
            write_foreign(source, tmp_path / "c.pt", other)
    back = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]
    assert back.keys() - state.keys() == {"pos_embed"}
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)


def as_dit(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """With the timestep frequencies of DiT, which diffusers spaces a little otherwise."""
    for module in transformer.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0
    return transformer


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8, num_embeds_ada_norm=10, norm_eps=1e-6, norm_num_groups=1,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0, 0.15)
    embedder = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder)
    transformer.save_pretrained(tmp_path / "diffusers")
    return tmp_path / "diffusers"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 250.0, 900.0]), torch.tensor([0, 7, 10])


@torch.no_grad()
def test_a_diffusers_folder_computes_the_same(diffusers_folder: Path, tmp_path: Path):
    network = converted(diffusers_folder, tmp_path / "out", Options())
    x, t, labels = inputs()
    ours = network(x, t, labels).prediction
    transformer = DiTTransformer2DModel.from_pretrained(diffusers_folder).eval()
    # As it is: at t = 0 the frequencies do not matter.
    theirs = transformer(x, t, labels).sample
    close(ours[0], theirs[0])
    assert (ours[1:] - theirs[1:]).abs().max() > 1e-3
    close(ours, as_dit(transformer)(x, t, labels).sample)
    metadata = ExportedModel(tmp_path / "out").metadata
    assert metadata.diffusion.objective == "ddpm"
    assert metadata.model.learn_sigma


@torch.no_grad()
def test_diffusers_loads_what_we_write_for_it(tmp_path: Path):
    config = tiny_config(
        moe__type="dense", diffusion__objective="ddpm", model__in_channels=4,
        model__learn_sigma=True, model__num_classes=10,
    )  # fmt: skip
    write_foreign(source_of(config), tmp_path / "out", "diffusers")
    transformer, told = DiTTransformer2DModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, t, labels = inputs()
    ours = network_of(config)(x, t, labels).prediction
    close(as_dit(transformer.eval())(x, t, labels).sample, ours)
    network = converted(tmp_path / "out", tmp_path / "back", Options())
    for (name, a), b in zip(
        network.state_dict().items(), network_of(config).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_diffusers_model_whose_blocks_embed_otherwise_is_refused(
    diffusers_folder: Path, tmp_path: Path
):
    transformer = DiTTransformer2DModel.from_pretrained(diffusers_folder)
    with torch.no_grad():
        transformer.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias[3] += 1
    transformer.save_pretrained(diffusers_folder)
    told = re.escape("transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias differs from")
    with pytest.raises(UserError, match=told):
        converted(diffusers_folder, tmp_path / "out", Options())


HEAD = {"width": 20, "heads": 2}


@pytest.mark.parametrize(
    ("form", "changes", "told"),
    [
        ("diffusers", {"diffusion__objective": "ddpm"}, "is dense and has no experts"),
        ("sit", {}, "sit is dense; choose --to release"),
        (
            "release",
            {"model__rope": True},
            "model.rope=true: the release's networks do not have it",
        ),
        ("release", {"moe__gate": "identity"}, "gate=identity: the release's networks support on"),
        ("release", {"moe__gate_scale": "experts"}, "gate_factor=4.0: the release's networks sup"),
        ("release", {"moe__router_input": "plain"}, "router_input=plain: the release's networks"),
        ("diffusers", {"moe__type": "dense"}, "was trained with flow, but diffusers needs ddpm"),
        ("release", {"model__wide_head": HEAD}, "has a wide head, release supports none"),
        ("diffusers", {"model__wide_head": HEAD, "moe__type": "dense"}, "diffusers supports none"),
        ("release", {"model__text": BYTES}, "is text-conditioned, release supports only classes"),
    ],
)
def test_a_network_that_the_other_side_cannot_hold_is_refused(
    form, changes: dict, told: str, tmp_path: Path
):
    with pytest.raises(UserError, match=told):
        write_foreign(source_of(tiny_config(**changes)), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []
