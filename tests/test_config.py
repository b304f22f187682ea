"""The configuration: recipes, overrides, and what a wrong value is told."""

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel

from diffmoe.capacity.meter import activated_parameters
from diffmoe.config import Config, TextConfig, WideHeadConfig
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.recipes import load_config, recipe_names
from tests.helpers.tiny import refusal

# Counts of the paper's release, with MoE in every second block.
PARAMETERS = {
    ("diffmoe_s_e16_flow", "model.input_size=16"): 140_191_616,  # also in a public training log
    ("diffmoe_s_e16_flow", "moe.experts=2"): 40_949_036,
    ("diffmoe_s_e16_flow", "moe.experts=4"): 55_137_080,
    ("diffmoe_s_e16_flow", "moe.experts=8"): 83_513_168,
    ("diffmoe_s_e16_flow",): 140_265_344,
    ("diffmoe_s_e16_ddpm",): 140_265_344,
    ("diffmoe_b_e16_flow",): 559_222_400,
    ("diffmoe_l_e8_flow",): 1_175_967_872,
    ("diffmoe_l_e16_flow",): 1_981_962_464,
    ("diffmoe_xl_e8_flow",): 1_734_997_392,
    ("diffmoe_xl_e16_flow",): 2_924_985_856,
    ("dense_s_flow",): 32_963_360,
    ("dense_b_flow",): 130_512_416,
    ("dense_l_flow",): 458_102_816,
    ("dense_xl_ddpm",): 675_129_632,
}


# Recipes -------------------------------------------------------------------------------------


def test_there_are_recipes_for_every_family_size_and_objective():
    names = recipe_names()
    assert len(names) == len(set(names)) == 6 + 2 * (4 + 7 * 6)
    assert {"mnist", "captioned_digits", "dense_xl_flow", "tc_b_e16_ddpm", "ec_l_e8_flow"} <= set(
        names
    )


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_what_its_name_says(name: str):
    config = load_config(name)
    assert config.output == f"runs/{name}"
    if name == "mnist":
        assert (config.moe.type, config.moe.experts, config.model.in_channels) == ("diffmoe", 4, 1)
        assert (config.optimizer.type, config.moe.gate) == ("muon", "identity")
        return
    if name == "captioned_digits":
        assert (config.moe.type, config.moe.experts, config.model.in_channels) == ("diffmoe", 8, 3)
        assert (config.model.text.encoder, config.model.input_size) == ("bytes", 32)
        assert (config.optimizer.type, config.moe.gate) == ("muon", "identity")
        return
    if name.startswith("t2i"):
        assert (config.moe.type, f"e{config.moe.experts}") == ("diffmoe", name.split("_")[2])
        assert config.diffusion.objective == "flow"
        assert (config.model.input_size, config.model.in_channels) == (32, 4)
        assert config.model.text is not None
        return
    if name == "diffmoe_l_e16_repa":  # but for alignment and length the recipe without it
        plain = load_config("diffmoe_l_e16_flow").model_dump(exclude={"align", "output"})
        plain["training"]["total_samples"] = 80 * 1_280_000
        assert config.model_dump(exclude={"align", "output"}) == plain
        assert config.align.block == config.model.depth // 3
        assert config.align.end == math.inf
        return
    if name == "diffmoe_xl_e16_rae":
        assert config.model.latent_shape == (768, 16, 16)
        assert config.model.width >= 768
        assert config.model.wide_head == WideHeadConfig(width=2048, depth=2, heads=16)
        shift = math.sqrt(math.prod(config.model.latent_shape) / 4096)
        assert config.timestep_shift == pytest.approx(shift, abs=5e-4)
        assert config.training.total_samples / config.training.batch_size == 100_000
        assert config.align.end == 0
        return
    family, size, *experts, objective = name.split("_")
    types = {"paper": "diffmoe", "ec": "expert_choice", "tc": "token_choice"}
    assert config.moe.type == types.get(family, family)
    gates = {"diffmoe": "identity", "race": "identity", "promoe": "identity", "dsmoe": "sigmoid"}
    assert config.moe.gate == gates.get(family, "softmax")
    assert config.diffusion.objective == objective
    shapes = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
    assert (config.model.depth, config.model.width, config.model.heads) == shapes[size]
    if family != "dense":
        assert experts == [f"e{config.moe.experts}"]
    # The paper's training, and the latents of ImageNet 256.
    assert (config.model.input_size, config.model.in_channels, config.model.patch_size) == (
        32,
        4,
        2,
    )
    assert config.model.learn_sigma
    assert config.training.batch_size == 256
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.weight_decay == 0
    assert config.training.ema_decay == 0.9999
    assert config.training.label_dropout == 0.1
    for world in (1, 2, 4, 8, 16, 32):
        config.check_world(world)


def test_a_name_may_hold_another_number_of_experts():
    for experts in (4, 16):  # the tables stay as they are
        config = load_config(f"ec_xl_e{experts}_ddpm", ["model.depth=2"])
        assert (config.moe.experts, config.moe.type) == (experts, "expert_choice")
    assert load_config("ec_xl_e16_ddpm").model.depth == 28
    for wrong in ("dense_s_e16_flow", "ec_s_flow", "ec_m_e16_flow", "ec_s_e16_edm", "imagenet"):
        assert f"no recipe '{wrong}'" in refusal(name=wrong)


@pytest.mark.parametrize("arguments", PARAMETERS, ids="-".join)
def test_parameter_counts_equal_the_release(arguments: tuple[str, ...]):
    name, *overrides = arguments
    config = load_config(name, overrides)
    with torch.device("meta"):
        network = DiT(config.model, config.moe)
    # The release counts its fixed positions too; ours are a buffer.
    count = network.parameter_count() + network.positions.numel()
    assert count == PARAMETERS[arguments]


@pytest.mark.parametrize(
    ("changes", "millions"), [([], 837.97), (["model.wide_head=null"], 676.55)]
)
def test_sizes_of_rae_are_those_of_its_paper(changes: list[str], millions: float):
    """Which has 839 and 676 million; its norms and gated MLPs are others."""
    config = load_config("diffmoe_xl_e16_rae", ["moe.type=dense", *changes])
    with torch.device("meta"):
        network = DiT(config.model, config.moe)
    assert network.parameter_count() / 1e6 == pytest.approx(millions, abs=5e-3)


# In billions: all, and those at work on an average token. The paper: 4.6 and 1.2.
@pytest.mark.parametrize(
    ("name", "total", "activated"), [("t2i_l_e16", 4.592, 1.260), ("t2i_s_e8", 0.098, 0.048)]
)
def test_sizes_of_the_text_recipes(name: str, total: float, activated: float):
    config = load_config(name)
    with torch.device("meta"):
        network = DiT(config.model, config.moe)
    assert network.parameter_count() / 1e9 == pytest.approx(total, abs=5e-4)
    assert activated_parameters(network, 1.0) / 1e9 == pytest.approx(activated, abs=5e-4)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.text.depth=2", "model.text.depth=2 belongs to model.text.encoder=bytes; t5 is"),
        ("model.text.encoder=bytes", "model.text.depth=0, but model.text.encoder=bytes is trained"),
        ("model.text={encoder: t5}", "model.text.width={'encoder': 't5'}: Field required"),
        (
            "model.text={encoder: bytes, width: 64, depth: 1, pooled: 8}",
            "model.text.pooled=8 belongs to a frozen encoder; bytes pools its own tokens",
        ),
        ("model.text={width: 100, depth: 1}", "model.text.width=100 is not divisible by 64"),
        ("model.text.widht=4", "unknown key model.text.widht=4; known: encoder, length, width"),
        ("model.text.length=0", "model.text.length=0: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_text_is_told(override: str, told: str):
    assert told in refusal(override, name="t2i_l_e16")


def test_experts_of_an_e16_recipe_are_16_in_the_network():
    config = load_config("diffmoe_s_e16_flow")
    with torch.device("meta"):
        layers = DiT(config.model, config.moe).moe_layers
    assert [layer.experts.w_in.shape[0] for layer in layers] == [16] * 6


@pytest.mark.parametrize(
    "name", ["nonsense", "diffmoe_s_flow", "dense_s_e16_flow", "diffmoe_m_e16_flow", "dit_s_flow"]
)
def test_an_unknown_recipe_is_told_the_known_ones(name: str):
    message = refusal(name=name)
    assert f"no recipe {name!r}" in message
    assert "give a YAML file's path (ending in .yaml) or one of:" in message
    assert all(known in message for known in recipe_names())


# Overrides and files -------------------------------------------------------------------------


def test_overrides_reach_nested_keys_and_numbers_are_numbers():
    config = load_config(
        "mnist",
        [
            "model.depth=8",
            "optimizer.learning_rate=3e-5",
            "optimizer.eps=1E-10",
            "optimizer.betas=[0.8, 0.95]",
            "training.precision=bf16",
            "logging.wandb=false",
            "data.path=null",
            "seed=7",
            "output=runs/a=b",
        ],
    )
    assert config.model.depth == 8
    assert config.optimizer.learning_rate == 3e-5
    assert config.optimizer.eps == 1e-10
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.training.precision == "bf16"
    assert config.logging.wandb is False
    assert config.data.path is None
    assert config.seed == 7
    assert config.output == "runs/a=b"
    assert config.model.width == 128  # the rest of the section is the recipe's


def test_a_later_override_wins():
    assert load_config("mnist", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.depth", "override 'model.depth' has no '='; write it as section.key=value"),
        ("model.depth=[1", "override 'model.depth=[1' is not valid YAML"),
        ("model.depth=deep", "model.depth='deep': Input should be a valid integer"),
        ("model.depth=0", "model.depth=0: Input should be greater than or equal to 1"),
        ("model.depth.more=3", "model.depth.more: depth is a value, not a section"),
        (
            "moe.type=soft",
            "Input should be 'diffmoe', 'expert_choice', 'token_choice', 'race', 'promoe', 'dsmoe' "
            "or 'dense'",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas.1=[0.9]: Field required"),
        ("training.ema_decay=1", "training.ema_decay=1: Input should be less than 1"),
        ("model=3", "model=3: Input should be a valid dictionary"),
    ],
)
def test_a_bad_override_is_told_its_key_and_value(override: str, told: str):
    assert told in refusal(override)


def test_an_unknown_key_is_told_the_known_ones_of_its_section():
    message = refusal("model.deph=6")
    assert "recipe mnist: unknown key model.deph=6; known: input_size, in_channels" in message
    assert "depth" in message.split("known:")[1]


def test_an_unknown_section_is_told_the_known_sections():
    message = refusal("modle.depth=6")
    assert "unknown key modle={'depth': 6}; known: output, seed, model, moe, diffusion" in message


def test_all_bad_keys_are_told_at_once():
    message = refusal("model.depth=0", "moe.topk=2", "seed=x")
    assert [key in message for key in ("model.depth=0", "moe.topk=2", "seed='x'")] == [True] * 3
    assert len(message.splitlines()) == 3


def test_a_yaml_file_is_a_configuration_and_its_stem_names_the_run(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {depth: 2}\noptimizer: {learning_rate: 1e-5}\n")
    config = load_config(str(file), ["moe.experts=2"])
    assert (config.model.depth, config.moe.experts) == (2, 2)
    assert config.optimizer.learning_rate == 1e-5
    assert config.output == "runs/mine"


def test_a_missing_file_is_told_its_path(tmp_path: Path):
    message = refusal(name=str(tmp_path / "none.yaml"))
    assert f"{tmp_path / 'none.yaml'} does not exist" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {depth: 2", "is not valid YAML"),
        ("- model", "must hold sections such as 'model:', it holds ['model']"),
        ("", "must hold sections such as 'model:', it holds None"),
        ("model: {deph: 2}", "unknown key model.deph=2; known: input_size"),
        ("model: 2", "model=2: Input should be a valid dictionary"),
    ],
)
def test_a_broken_file_is_told_what_is_wrong_with_it(tmp_path: Path, text: str, told: str):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    message = refusal(name=str(file))
    assert told in message
    assert str(file) in message


@pytest.mark.parametrize("printed", [Config.to_yaml, Config.explained])
@pytest.mark.parametrize("name", ["mnist", "tc_l_e8_ddpm", "dense_s_flow", "captioned_digits"])
def test_a_printed_configuration_reads_back_as_itself(name: str, printed, tmp_path: Path):
    awkward = [
        "optimizer.learning_rate=1e-5",
        "optimizer.eps=1e-12",
        "training.ema_stds=[0.05, 0.1]",
        "training.ema_decay=null",
        f"data.path='{'long ' * 50} # [no] comment: {{é}}'",
        r'validation.path="two\n  lines"',
        "evaluation.reference='null'",
    ]
    config = load_config(name, awkward)
    file = tmp_path / "config.yaml"
    file.write_text(printed(config))
    assert load_config(str(file)) == config


def test_an_explained_configuration_says_what_each_setting_means():
    shown = load_config("captioned_digits", ["data.path='# hidden'"]).explained()
    for wanted in (
        "# The DiT backbone.\nmodel:\n  input_size: 32                    # height and width of ",
        "  mlp_activation: gelu              # (gelu | swiglu) of dense MLPs\n",
        "\n  # The captions of a text model, and what encodes them.\n  text:\n    encoder: bytes  ",
        "  path: '# hidden'                  # folder of shards with its manifest.json\n",
        "  betas: [0.9, 0.99]                # decay of the two moments\n",
    ):
        assert wanted in shown
    assert shown.startswith("output: runs/captioned_digits       # folder of the run\n")


def test_every_setting_is_described():
    sections = [Config, TextConfig]
    sections += [field.annotation for field in Config.model_fields.values()]
    settings = [
        (section.__name__, name, field)
        for section in sections
        if isinstance(section, type) and issubclass(section, BaseModel)
        for name, field in section.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]
    assert len(settings) > 90
    assert [(where, name) for where, name, field in settings if not field.description] == []


def test_replace_changes_validates_and_keeps_the_rest():
    config = load_config("mnist")
    changed = config.replace({"training.precision": "bf16", "seed": 5})
    assert (changed.training.precision, changed.seed) == ("bf16", 5)
    assert changed.training.batch_size == config.training.batch_size == 64
    assert config.training.precision == "fp32"
    with pytest.raises(UserError, match=r"the configuration: unknown key training\.speed=1"):
        config.replace({"training.speed": 1})


# Values that do not go together --------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["moe.experts=12", "parallel.expert_parallel=8"],
            "moe.experts=12 is not divisible by parallel.expert_parallel=8; "
            "choose 1, 2, 3, 4, 6 or 12",
        ),
        (
            ["moe.type=dense", "parallel.expert_parallel=2"],
            "parallel.expert_parallel=2 needs experts, but moe.type is dense; set it 1",
        ),
        (["moe.top_k=5"], "moe.top_k=5 is more than moe.experts=4"),
        (
            ["moe.target_loss_weight=0.01"],
            "moe.target_loss_weight=0.01 belongs to moe.type=race; moe.type=diffmoe has no head "
            "that predicts the target, set it 0",
        ),
        (
            ["moe.type=token_choice", "moe.token_pool=global"],
            "moe.token_pool=global belongs to moe.type=diffmoe and race; moe.type=token_choice has "
            "no pool over ranks, leave token_pool at micro_batch",
        ),
        (
            ["training.batch_size=10", "training.accumulation=4"],
            "training.batch_size=10 is not divisible by data.lanes=4 times training.accumulation=4;"
            " choose a batch that is a multiple of 16, or other lanes or accumulation",
        ),
        (
            ["training.batch_size=60", "data.lanes=8"],
            "training.batch_size=60 is not divisible by data.lanes=8 times training.accumulation=1;"
            " choose a batch that is a multiple of 8, or other lanes",
        ),
        (
            ["training.batch_size=24", "data.lanes=4", "training.accumulation=4"],
            "training.batch_size=24 is not divisible by data.lanes=4 times training.accumulation=4;"
            " choose a batch that is a multiple of 16, or other lanes",
        ),
        (
            [
                "parallel.zero_stage=0",
                "parallel.expert_parallel=2",
                "optimizer.gradient_clipping=0.5",
            ],
            "parallel.zero_stage=0 clips wrongly with experts (it averages gradient norms over "
            "ranks that own different ones: expert_parallel=2, gradient_clipping=0.5); use stage 1",
        ),
        (["optimizer.betas=[0.9,1.5]"], "optimizer.betas.1=1.5: Input should be less than 1"),
        (
            ["optimizer.type=adamw", "optimizer.muon.steps=3"],
            "optimizer.muon.steps=3 belongs to optimizer.type=muon; optimizer.type=adamw has no",
        ),
        (
            ["optimizer.schedule=warmup_stable_decay"],
            "optimizer.decay_samples=0 with optimizer.schedule=warmup_stable_decay: "
            "warmup_stable_decay needs them",
        ),
        (
            ["optimizer.decay_samples=64"],
            "optimizer.decay_samples=64 with optimizer.schedule=cosine: warmup_stable_decay needs",
        ),
        (
            [
                "optimizer.schedule=warmup_stable_decay",
                "optimizer.decay_samples=64",
                "training.total_samples=6400",
            ],
            "optimizer.warmup_samples=6400 and optimizer.decay_samples=64 are more than "
            "training.total_samples=6400",
        ),
        (["optimizer.learning_rate=.inf"], "optimizer.learning_rate=inf: Input should be a finite"),
        (
            ["moe.expert_ratio=0.001"],
            "moe.expert_ratio=0.001 times model.width=128 leaves no hidden unit",
        ),
        (
            ["parallel.zero_stage=3"],
            "parallel.zero_stage=3: DeepSpeed refuses or mis-reduces expert parameters there; "
            "use stage 1 or 2",
        ),
        (
            ["model.patch_size=3"],
            "model.input_size=28 is not divisible by model.patch_size=3; choose 1, 2, 4, 7, 14 or",
        ),
        (
            ["model.heads=3"],
            "model.width=128 is not divisible by model.heads=3; choose 1, 2, 4, 8, 16, 32, 64 or",
        ),
        (["align.block=7"], "align.block=7 is none of the model.depth=6 blocks; choose 1 to 6"),
        (["model.width=6", "model.heads=1"], "model.width=6 must be divisible by 4"),
        (
            ["model.rope=true", "model.heads=64"],
            "model.rope needs a head width divisible by 4, and model.width=128 / model.heads=64 "
            "is 2",
        ),
        (
            ["diffusion.objective=ddpm"],
            "diffusion.timesteps=logit_normal belongs to diffusion.objective=flow; "
            "ddpm draws its timesteps uniformly",
        ),
        (
            [
                "diffusion.objective=ddpm",
                "diffusion.timesteps=uniform",
                "diffusion.timestep_shift=3",
            ],
            "diffusion.timestep_shift=3.0 belongs to diffusion.objective=flow",
        ),
        (
            ["diffusion.timestep_shift=large"],
            "diffusion.timestep_shift='large': Input should be 'by_size'",
        ),
    ],
)
def test_values_that_do_not_go_together_are_told_with_the_way_out(overrides: list[str], told: str):
    assert told in refusal(*overrides)


@pytest.mark.parametrize(
    ("world", "overrides", "told"),
    [
        (
            3,
            ["parallel.expert_parallel=2"],
            "3 ranks are not divisible by parallel.expert_parallel=2; choose 1 or 3, "
            "or start a multiple of 2 ranks",
        ),
        (
            8,
            ["training.batch_size=64", "data.lanes=4"],
            "data.lanes=4 is not divisible by 8 ranks; start 1, 2 or 4 ranks, "
            "or set data.lanes to a multiple of 8",
        ),
        (
            3,
            ["training.batch_size=64", "data.lanes=4"],
            "data.lanes=4 is not divisible by 3 ranks; start 1, 2 or 4 ranks, "
            "or set data.lanes to a multiple of 3",
        ),
    ],
)
def test_a_world_that_does_not_fit_is_told_with_the_way_out(
    world: int, overrides: list[str], told: str
):
    config = load_config("mnist", overrides)
    with pytest.raises(UserError) as caught:
        config.check_world(world)
    assert told in str(caught.value)


def test_worlds_that_fit_pass():
    config = load_config("mnist", ["parallel.expert_parallel=2", "training.accumulation=2"])
    config.check_world(2)
    config.check_world(4)
    assert config.samples_per_lane == 16


def test_a_configuration_does_not_change_under_its_user():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1


def _floats() -> list[str]:
    """All settings that are numbers with a fraction, by their dotted names."""
    return [
        f"{section}.{name}"
        for section, kind in Config.model_fields.items()
        if hasattr(kind.annotation, "model_fields")
        for name, field in kind.annotation.model_fields.items()
        if float in (field.annotation, *get_args(field.annotation))
    ]


@pytest.mark.parametrize("key", _floats())
def test_every_float_is_finite(key: str):
    for value in (".inf", "-.inf", ".nan"):
        with pytest.raises(UserError, match=rf"{key}="):
            load_config("mnist", [f"{key}={value}"])
