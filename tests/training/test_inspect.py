"""Reading checkpoints without a process group, and the command over it."""

import shutil
from pathlib import Path

import pytest
import torch

from diffmoe.checkpoints.inspect import compare, open_checkpoint
from diffmoe.checkpoints.network import load_network
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from tests.helpers.processes import command
from tests.helpers.runs import newest, pack, run_config, tensors, train

TOOL = "tools/checkpoint.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("inspect") / "data")


@pytest.fixture(scope="module")
def two_ranks(data: Path) -> Config:
    """Three steps on 2 ranks, P = 2, saved after each, with two lengths of averages."""
    config = run_config(
        data.parent,
        3,
        output=str(data.parent / "two"),
        training__checkpoint_samples=8,
        training__ema_stds=[0.05, 0.1],
        moe__token_pool="global",
        parallel__expert_parallel=2,
    )
    train(config, world=2)
    return config


@pytest.fixture(scope="module")
def one_rank(two_ranks: Config) -> Config:
    """The same run in one process, ZeRO stage 2."""
    output = str(Path(two_ranks.output).parent / "one")
    config = two_ranks.replace(
        {"output": output, "parallel.expert_parallel": 1, "parallel.zero_stage": 2}
    )
    train(config)
    return config


# Reading -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_tensor_has_its_global_shape_and_values(two_ranks: Config):
    flat = tensors(newest(two_ranks))
    network = load_network(newest(two_ranks), "live").network
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    with open_checkpoint(newest(two_ranks)) as stored:
        assert stored.shapes.keys() == flat.keys()
        assert stored.prefixes == [
            "weights", "exp_avg", "exp_avg_sq", "ema", "ema-0.05", "ema-0.1", "buffers"
        ]  # fmt: skip
        assert stored.shapes["weights/blocks.1.feed_forward.experts.w_in"] == (4, 16, 64)
        assert stored.pieces["weights/blocks.1.feed_forward.experts.w_in"] >= 2
        for name in stored.shapes:
            prefix, _, parameter = name.partition("/")
            tensor = stored.read(name)
            if prefix != "buffers":
                assert tuple(tensor.shape) == stored.shapes[name] == shapes[parameter]
            assert torch.equal(tensor.flatten(), flat[name].flatten()), name
        for name, parameter in network.named_parameters():
            assert torch.equal(stored.read(f"weights/{name}"), parameter)
        with pytest.raises(UserError, match="holds no weights/nothing; its tensors are "):
            stored.read("weights/nothing")


@pytest.mark.slow
def test_a_run_compares_with_itself_on_another_layout(two_ranks: Config, one_rank: Config):
    with open_checkpoint(newest(two_ranks)) as a, open_checkpoint(newest(two_ranks)) as again:
        assert all(d.problem is None and d.differing == 0 for d in compare(a, again))
    with open_checkpoint(newest(two_ranks)) as a, open_checkpoint(newest(one_rank)) as b:
        found = {difference.name: difference for difference in compare(a, b)}
        assert found.keys() == a.shapes.keys() == b.shapes.keys()
        assert [d for d in found.values() if d.problem is not None] == []
        # The same run to rounding; Adam makes steps of the learning rate of gradients near zero.
        assert max(d.largest for d in found.values()) < 0.03
        assert found["exp_avg/final.weight"].relative < 1e-4
        for name, difference in found.items():
            change = (a.read(name) - b.read(name)).abs()
            assert difference.size == change.numel()
            assert difference.differing == (change > 0).sum()
            assert difference.largest == pytest.approx(change.max().item(), rel=1e-6)


def test_tensors_of_other_models_are_told_by_name(two_ranks: Config, data: Path):
    other = run_config(data.parent, 1, output=str(data.parent / "other"), moe__type="dense")
    train(other)
    with open_checkpoint(newest(two_ranks)) as a, open_checkpoint(newest(other)) as b:
        problems = {d.name: d.problem for d in compare(a, b) if d.problem}
    assert problems["ema-0.05/final.weight"] == f"not in {newest(other)}"
    assert problems["weights/blocks.1.feed_forward.experts.w_in"] == f"not in {newest(other)}"
    assert "weights/final.weight" not in problems


@pytest.mark.parametrize("file", ["*.distcp", "index.json"])
@pytest.mark.parametrize("how", ["cut", "zeros", "gone"])
def test_damage_is_told_with_the_file_and_the_way_out(
    tmp_path: Path, two_ranks: Config, file: str, how: str
):
    copy = Path(shutil.copytree(newest(two_ranks), tmp_path / "step-00000003"))
    for path in copy.glob(file):
        size = path.stat().st_size
        if how == "cut":
            path.write_bytes(path.read_bytes()[: size // 2])
        elif how == "zeros":
            path.write_bytes(b"\0" * size)
        else:
            path.unlink()
    with pytest.raises(
        UserError, match=rf"{copy} is damaged[, ].*(checkpoint.py verify|take an older)"
    ):
        read_all(copy)


def read_all(path: Path) -> None:
    with open_checkpoint(path) as stored:
        for name in stored.shapes:
            stored.read(name)


def test_a_checkpoint_of_a_larger_model_is_read_on_the_meta_device(two_ranks: Config):
    """No network is allocated: shapes come from the configuration alone."""
    made = []
    constructed = DiT.__init__

    def noted(network, *arguments, **named):
        constructed(network, *arguments, **named)
        made.append({parameter.device.type for parameter in network.parameters()})

    DiT.__init__ = noted
    try:
        with open_checkpoint(newest(two_ranks)):
            pass
    finally:
        DiT.__init__ = constructed
    assert made == [{"meta"}]


# The command ---------------------------------------------------------------------------------


def test_list_names_every_checkpoint_and_what_is_wrong(tool, tmp_path: Path, two_ranks: Config):
    run = Path(shutil.copytree(two_ranks.output, tmp_path / "run"))
    (run / "step-00000002/checksums.json").unlink()
    code, told = tool("list", run)
    lines = told.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == [f"step-0000000{k}" for k in (1, 2, 3)]
    assert "8 samples     2 ranks" in lines[0]
    assert "not complete" in lines[1]
    assert "24 samples     2 ranks" in lines[2]
    code, told = tool("list", tmp_path / "nothing")
    assert (code, told) == (
        2,
        f"error: {tmp_path / 'nothing'} does not exist; give a run's output, which holds "
        "step-XXXXXXXX\n",
    )


def test_show_prints_clock_layout_shapes_and_norms(tool, two_ranks: Config):
    code, told = tool("show", two_ranks.output)
    assert code == 0
    assert "samples 24, step 3, skipped 0" in told
    assert "saved by 2 ranks, expert_parallel 2, zero_stage 1" in told
    lines = told.splitlines()
    header = next(line.split() for line in lines if " shape " in line)
    assert header[0] == "shape"
    line = next(line for line in lines if line.startswith("blocks.3.feed_forward.experts.w_in "))
    shape, *norms = line.split()[1:]
    assert shape == "4x16x64"
    flat = tensors(newest(two_ranks))
    kinds = [kind for kind in header[1:] if kind != "buffers"]
    assert len(kinds) == len(norms) == 6
    for kind, norm in zip(kinds, norms, strict=True):
        expected = flat[f"{kind}/blocks.3.feed_forward.experts.w_in"].double().norm().item()
        assert float(norm) == pytest.approx(expected, rel=1e-4)


def test_verify_tells_the_file_that_changed(tool, tmp_path: Path, two_ranks: Config):
    run = Path(shutil.copytree(two_ranks.output, tmp_path / "run"))
    code, told = tool("verify", run)
    assert (code, told.count("  intact")) == (0, 3)
    file = next((run / "step-00000002").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, told = tool("verify", run)
    assert (code, told.count("  intact")) == (2, 2)
    assert f"{run / 'step-00000002'}  DAMAGED" in told
    assert str(file) in told
    assert tool("verify", run / "step-00000003")[0] == 0


@pytest.mark.slow
def test_diff_compares_layouts_and_tells_by_its_exit_code(
    tool, two_ranks: Config, one_rank: Config
):
    code, told = tool("diff", newest(two_ranks), two_ranks.output)
    with open_checkpoint(newest(two_ranks)) as stored:
        count = len(stored.shapes)
    assert code == 0
    assert f"{count} tensors are equal, 0 differ" in told
    code, told = tool("diff", two_ranks.output, one_rank.output)
    assert code == 1
    assert "saved by 2 ranks, expert_parallel 2, zero_stage 1" in told
    assert "saved by 1 ranks, expert_parallel 1, zero_stage 2" in told
    line = next(line for line in told.splitlines() if " weights/final.weight: " in line)
    assert "of 128 elements, at most" in line


def test_prune_keeps_what_is_asked_and_never_the_last_complete_one(
    tool, tmp_path: Path, two_ranks: Config
):
    run = Path(shutil.copytree(two_ranks.output, tmp_path / "run"))
    (run / "step-00000003/checksums.json").unlink()
    assert tool("prune", run, "--keep-last", 0)[0] == 2
    code, told = tool("prune", run, "--keep-last", 1)
    assert code == 0
    assert "deleted step-00000001; kept step-00000002, step-00000003" in told
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert "deleted nothing" in tool("prune", run, "--keep-last", 1)[1]


def test_help_teaches(tool):
    code, told = tool("--help")
    assert code == 0
    for name in ("list", "show", "verify", "diff", "prune", "ema"):
        assert f"python tools/checkpoint.py {name} " in told
        assert len(tool(name, "--help")[1].split()) > 15


@pytest.mark.slow
def test_it_runs_in_a_plain_process(two_ranks: Config):
    done = command("python", TOOL, "list", two_ranks.output)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3
