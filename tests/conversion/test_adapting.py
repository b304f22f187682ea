"""A run starts from a model that differs from it: what fits is taken, what does not is told."""

from pathlib import Path
from shutil import rmtree

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import diffmoe
from diffmoe.config import Config
from diffmoe.conversion.adapting import Adapted, adapt
from diffmoe.conversion.detect_format import open_source
from diffmoe.errors import UserError
from diffmoe.export.sources import Source
from diffmoe.export.writing import write_exported
from diffmoe.models.blocks import rotary_angles
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology
from diffmoe.recipes import read_yaml
from diffmoe.training import init_from
from tests.helpers.models import exported, source_of
from tests.helpers.ranks import ranks_of
from tests.helpers.runs import newest, pack, run_config, tensors, train
from tests.helpers.tiny import BYTES, tiny_config


def adapted_network(adapted: Adapted, config: Config) -> DiT:
    """As a run of one rank starts."""
    network = DiT(config.model, config.moe, Topology()).initialize(config.seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name not in adapted.fresh:
                tensor.copy_(adapted.read(name))
    return network.eval()


def both(old: Config, new: Config, **names) -> tuple[Source, Adapted, dict[str, Tensor]]:
    """The source, what is made of it, and the new network's tensors."""
    there = {"class_names": names["there"]} if "there" in names else {}
    source = source_of(old, **there)
    adapted = adapt(source, new, names.get("here"))
    return source, adapted, adapted_network(adapted, new).state_dict()


def untouched(source: Source, state: dict[str, Tensor], *but: str) -> None:
    """All tensors of the new network but some are the source's."""
    for name, tensor in state.items():
        if not any(part in name for part in but):
            assert torch.equal(tensor, source.read(name)), name


def test_the_same_network_is_taken_whole_and_nothing_is_told():
    source, adapted, state = both(tiny_config(), tiny_config())
    assert adapted.notes == ()
    assert not adapted.fresh
    untouched(source, state)


def test_classes_follow_their_names():
    old, new = tiny_config(model__num_classes=4), tiny_config(model__num_classes=3)
    source, adapted, state = both(
        old, new, there=("cat", "dog", "ship", "car"), here=("ship", "frog", "cat")
    )
    assert adapted.notes == ("classes: 2 of 3 known by name, the others start anew",)
    before, after = source.read("label_embed.weight"), state["label_embed.weight"]
    start = DiT(new.model, new.moe).initialize(new.seed).label_embed.weight
    assert torch.equal(after[[0, 2, 3]], before[[2, 0, 4]])  # and the null label's
    assert torch.equal(after[1], start[1])
    untouched(source, state, "label_embed")


def test_other_classes_without_names_start_anew_but_for_the_null_label():
    old, new = tiny_config(model__num_classes=4), tiny_config(model__num_classes=3)
    source, adapted, state = both(old, new)
    assert "classes: 4 there, 3 here, not known by name" in adapted.notes[0]
    after = state["label_embed.weight"]
    start = DiT(new.model, new.moe).initialize(new.seed).label_embed.weight
    assert torch.equal(after[3], source.read("label_embed.weight")[4])
    assert torch.equal(after[:3], start[:3])


def test_another_size_changes_positions_alone():
    source, adapted, state = both(tiny_config(), tiny_config(model__input_size=16))
    assert adapted.notes == ("size: 8x8 in patches of 2 there, 16x16 in patches of 2 here: new "
                             "positions",)  # fmt: skip
    untouched(source, state)


def test_what_becomes_of_rotary_angles_is_told():
    old = tiny_config(model__rope=True)
    larger = old.replace({"model.input_size": [8, 16]})
    kept = adapt(source_of(old), larger.replace({"model.rope_grid": [4, 4]}))
    told = "rotary angles: made for 4x4 tokens, over which 4x8 tokens are spread"
    assert kept.notes[1:] == (told,)
    own = adapt(source_of(old), larger)
    told = "rotary angles: made for 4x4 tokens there, for 4x8 tokens here: attention changes"
    assert own.notes[1:] == (told,)


def test_other_channels_renew_the_first_and_the_last_layer():
    source, adapted, state = both(tiny_config(), tiny_config(model__in_channels=3))
    assert "2 channels there, 3 here" in adapted.notes[0]
    assert adapted.fresh == {"patch_embed.weight", "patch_embed.bias", "final.weight", "final.bias"}
    untouched(source, state, "patch_embed", "final.")


HEAD = {"width": 20, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (None, HEAD, "none there, 1 of width 20, 2 heads here: it and the last layer start anew"),
        (HEAD, None, "1 of width 20, 2 heads there, none here: the last layer starts anew"),
        (HEAD, HEAD | {"heads": 4}, "2 heads there, 1 of width 20, 4 heads here: it and the last"),
    ],
)
def test_another_wide_head_starts_anew_with_the_last_layer(old, new, told: str):
    before = tiny_config(model__wide_head=old)
    config = tiny_config(model__wide_head=new)
    source, adapted, state = both(before, config)
    assert len(adapted.notes) == 1
    assert adapted.notes[0].startswith("wide head: ")
    assert told in adapted.notes[0]
    untouched(source, state, "wide_head.", "final")
    start = DiT(config.model, config.moe).initialize(config.seed).state_dict()
    renewed = {name for name in state if name.startswith(("wide_head.", "final"))}
    assert adapted.fresh == renewed
    assert {"final.weight", "final_adaln.bias"} <= renewed
    for name in renewed:
        assert torch.equal(state[name], start[name]), name


def test_the_same_wide_head_is_taken_and_other_channels_renew_what_embeds_them():
    old = tiny_config(model__wide_head=HEAD)
    source, adapted, state = both(old, old)
    assert adapted.notes == ()
    untouched(source, state)
    source, adapted, state = both(old, tiny_config(model__wide_head=HEAD, model__in_channels=3))
    assert len(adapted.notes) == 1
    assert {"wide_head.patch_embed.weight", "patch_embed.bias"} <= adapted.fresh
    untouched(source, state, "patch_embed", "final.")


@pytest.mark.parametrize("patch", [1, 2])
def test_from_ddpm_to_flow_the_prediction_stays_and_the_variance_goes(patch: int):
    ddpm = {"diffusion__objective": "ddpm", "model__learn_sigma": True}
    old, new = tiny_config(model__patch_size=patch, **ddpm), tiny_config(model__patch_size=patch)
    source, adapted, _ = both(old, new)
    assert adapted.notes == (
        "the predicted variance is left out",
        "objective: ddpm there, flow here: weights alone fit",
    )
    before = adapted_network(adapt(source, old), old)
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = before(*inputs).prediction
        found = adapted_network(adapted, new)(*inputs).prediction
        torch.testing.assert_close(found, expected[:, :2])  # a product of another width rounds
        # And back: a variance of zeros beside the same prediction.
        back = adapt(source_of(new), old)
        plain = adapted_network(adapt(source_of(new), new), new)(*inputs).prediction
        wide = adapted_network(back, old)(*inputs).prediction
    torch.testing.assert_close(wide[:, :2], plain)
    assert not wide[:, 2:].any()


def test_captions_in_the_place_of_classes_add_nothing_at_first():
    source, adapted, state = both(tiny_config(), tiny_config(model__text=BYTES))
    assert adapted.notes[0] == "condition: classes there, captions (bytes) here"
    assert "cross_attention" in adapted.notes[1]
    outs = [name for name in state if "cross_attention.proj" in name]
    assert outs
    assert not any(state[name].any() for name in outs)
    untouched(source, state, "text_embed", "cross_attention", "norm_cross")
    _, adapted, _ = both(tiny_config(model__text=BYTES), tiny_config())
    assert adapted.notes[0] == "condition: captions (bytes) there, classes here"


def test_more_experts_are_copies_with_the_same_output():
    old = tiny_config()
    new = tiny_config(moe__experts=8, moe__capacity=2.0)
    source, adapted, _ = both(old, new)
    assert "4 there, 8 here: copies; at moe.capacity=2 moe.gate_scale=1" in adapted.notes[0]
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = adapted_network(adapt(source, old), old)(*inputs).prediction
        found = adapted_network(adapted, new)(*inputs).prediction
    torch.testing.assert_close(found, expected)


def test_fewer_experts_are_the_first_ones():
    source, adapted, state = both(tiny_config(), tiny_config(moe__experts=2))
    assert "the first 2 of 4 are taken" in adapted.notes[0]
    for name, tensor in state.items():
        assert torch.equal(tensor, source.read(name)[: len(tensor)]), name


def test_another_family_keeps_the_experts():
    source, adapted, state = both(tiny_config(), tiny_config(moe__type="promoe"))
    assert adapted.notes[0] == "routing: diffmoe there, promoe here"
    assert adapted.notes[1].startswith("gates: softmax times 1 there, identity times 1 here")
    experts = [name for name in state if ".experts." in name]
    assert experts
    assert not adapted.fresh & set(experts)
    untouched(source, state, "router", "unconditional_expert")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            {"model__depth": 2, "model__qk_norm": True},
            {},
            "has another structure than this run; set model.depth=2 model.qk_norm=true$",
        ),
        (
            {"moe__experts": 8, "moe__shared_expert_ratio": 4.0},
            {},
            r"set moe\.shared_expert_ratio=4\.0 moe\.experts=8$",
        ),
        ({}, {"moe__type": "dense"}, "set moe.type=diffmoe$"),
        (
            {"moe__type": "dense"},
            {"moe__expert_ratio": 2.0},
            "is dense, and its MLPs do not fit these experts; set moe.expert_ratio=4",
        ),
        ({}, {"moe__experts": 6}, "has 4; choose a multiple, such as 8"),
    ],
)
def test_what_cannot_be_adapted_names_all_settings(old: dict, new: dict, told: str):
    with pytest.raises(UserError, match=told):
        adapt(source_of(tiny_config(**old)), tiny_config(**new))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning")
    pack(folder / "data")
    return folder


def start_from(folder: Path, init: Path, world: int = 1, **changes) -> tuple[Config, str]:
    """A run of one step, and what it told."""
    config = run_config(
        folder, 1, output=str(folder / f"run-{init.name}-{world}"), training__init=str(init),
        optimizer__learning_rate=1e-30, **changes,
    )  # fmt: skip
    with ranks_of(config, world) as ranks:
        assert ranks.wait() == [0] * world, ranks.told()
        return config, ranks.told()


def test_a_run_becomes_a_mixture_on_two_ranks(home: Path):
    old = run_config(home, 2, moe__type="dense", output=str(home / "old"))
    train(old)
    mixture = {"moe__experts": 4, "moe__shared_expert_ratio": 4.0}
    run, told = start_from(home, Path(old.output), 2, parallel__expert_parallel=2, **mixture)
    assert f"starts from the weights of {old.output}; clock, optimizer and averages are new" in told
    assert "dense there: upcycled to 4 experts (shared" in told
    found, before = tensors(newest(run)), tensors(newest(old))
    for name in ("patch_embed.weight", "blocks.0.feed_forward.fc1.weight", "label_embed.weight"):
        assert torch.equal(found[f"weights/{name}"], before[f"ema/{name}"]), name
        assert torch.equal(found[f"ema/{name}"], before[f"ema/{name}"]), name
    dense = before["ema/blocks.1.feed_forward.fc1.weight"]
    experts = found["weights/blocks.1.feed_forward.experts.w_in"]
    shared = found["weights/blocks.1.feed_forward.shared_expert.fc1.weight"]
    assert torch.equal(shared, dense)
    width = run.model.width
    one = dense.view(-1, width).t().reshape(-1)
    assert all(torch.equal(expert, one) for expert in experts.view(4, -1))


def test_rotary_angles_stay_those_of_the_grid_that_they_were_made_for(home: Path):
    """In the run, when it goes on, in its export, and in a run that starts from that."""
    pack(home / "wide", shape=(2, 8, 16))
    model = exported(home / "rotary", run_config(home, 1, model__rope=True))
    wide = {"model__rope": True, "model__input_size": [8, 16], "data__path": str(home / "wide")}
    run, told = start_from(home, model, **wide)
    assert "\n  rotary angles: made for 4x4 tokens, over which 4x8 tokens are spread" in told
    rmtree(model)  # the run has a checkpoint of its own now
    with ranks_of(run.replace({"training.total_samples": 16, "training.init": None}), 1) as ranks:
        assert ranks.wait() == [0], ranks.told()
        assert "resumed" in ranks.told()
    assert read_yaml(Path(run.output) / "config.yaml")["model"]["rope_grid"] == [4, 4]
    head = run.model.width_of_head
    expected = rotary_angles((4, 8), head, (4, 4))
    assert not torch.equal(expected, rotary_angles((4, 8), head))
    with open_source(Path(run.output)) as source:
        write_exported(source, home / "exported")
    for path in (run.output, home / "exported"):
        assert torch.equal(diffmoe.load(path, device="cpu").rotation, expected)

    changes = {"model.input_size": 16, "training.init": str(home / "exported")}
    chained = run.replace({**changes, "output": str(home / "chained")})
    assert init_from.with_rope_grid(chained, None).model.rope_grid == (4, 4)
    for settled in ({"model.input_size": 8}, {"model.rope_grid": [8, 8]}, {"model.rope": False}):
        config = chained.replace(settled)  # the grid of before; given; without rotary angles
        assert init_from.with_rope_grid(config, None) == config


def test_other_classes_start_anew_on_a_run(home: Path):
    config = run_config(home, 1)
    model = exported(home / "other", config.replace({"model.num_classes": 7}))
    run, told = start_from(home, model)
    assert "\n  classes: 7 there, 5 here, not known by name" in told
    before = load_file(model / "model.safetensors")["label_embed.weight"]
    after = tensors(newest(run))["weights/label_embed.weight"].view(6, -1)
    start = DiT(run.model, run.moe).initialize(run.seed).label_embed.weight
    assert torch.equal(after[5], before[7])
    assert torch.equal(after[:5], start[:5])
    rmtree(model)  # the run has a checkpoint of its own now
    with ranks_of(run.replace({"training.total_samples": 16}), 1) as ranks:
        assert ranks.wait() == [0], ranks.told()
        assert "resumed" in ranks.told()
