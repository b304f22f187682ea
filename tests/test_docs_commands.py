"""Every command and Python block of the pages runs, shortened, in a folder laid out as they say."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from deepspeed.launcher import runner as deepspeed_runner
from torch.distributed.run import get_args_parser as torchrun_parser

from diffmoe.comparison.study import SHIPPED
from tests.helpers import runs
from tests.helpers.models import exported
from tests.helpers.pages import PAGES, ROOT, commands, quick_digits
from tests.helpers.pictures import NAME, pictures, write_samples
from tests.helpers.shards import build_vae, photograph
from tests.helpers.tiny import tiny_config
from tests.helpers.tools import forked


class Run(NamedTuple):
    """How a command is run.

    pattern: of the whole command. more: what is appended to make it short: of a flag or setting
    given twice the last counts. gives: a file that it must leave. tells: what it must print.
    """

    pattern: str
    more: str = ""
    gives: str = ""
    tells: str = ""


SMALL = "model.width=16 model.depth=2 model.heads=2"
TINY = f"{SMALL} training.batch_size=8 data.lanes=2"
TRAINING = f"{TINY} training.total_samples=16 logging.wandb=false"
TWO_RANKS = f"{TRAINING} parallel.expert_parallel=2"
FEW = "--num-samples 8 --steps 2"

RUNS = [
    # Data.
    Run("python tools/prepare_data.py mnist --out data/mnist", gives="data/mnist/manifest.json"),
    Run("python tools/prepare_data.py captioned-digits .*", gives="data/captioned/unseen.txt"),
    Run("python tools/encode_latents.py .* --size 32 .*", gives="data/photos/manifest.json"),
    Run(
        "python tools/encode_latents.py .* data/own",
        gives="data/own/manifest.json",
        tells="train.py --config mnist data.path=data/own model.in_channels=3 model.input_size=64 "
        "model.num_classes=3 output=runs/own",
    ),
    Run(
        "python tools/encode_latents.py .* --captions .*", "--size 64", "data/photos/manifest.json"
    ),
    Run(
        "python tools/encode_latents.py --images food101 .*",
        "--size 64",
        "data/food101/manifest.json",
    ),
    Run("torchrun .* tools/encode_latents.py .*", "--size 64", "data/imagenet256/manifest.json"),
    Run(
        "python tools/import_latents.py --format mar .*", gives="data/imagenet256-mar/manifest.json"
    ),
    Run("python tools/encode_text.py data/photos data/photos-t5 .*", tells="model.text="),
    Run(
        "python tools/encode_features.py data/photos data/photos-lite0 .*",
        "--encoder efficientnet_lite0@32",
        tells="align.width=112",
    ),
    Run("python tools/check_data.py data/photos", gives="data/photos/contact_sheet.png"),
    Run(".* data/photos --reshard 32 .*", gives="data/photos-32/000031.tar"),
    Run(
        ".* data/photos --hold-out .*", "--hold-out 4 data/held-out", "data/held-out/manifest.json"
    ),
    Run(".* data/mnist --hold-out 500 .*", gives="data/mnist-held-out/manifest.json"),
    # Training.
    Run("python train.py --config mnist", TRAINING, "runs/mnist/latest"),
    Run(
        "python train.py --config mnist data.path=data/mnist-train .*",
        f"{TRAINING} validation.samples=8 training.validate_every=8",
        "runs/mnist-validated/latest",
    ),
    Run("python train.py --config mnist data.path=data/own .*", TRAINING, "runs/own/latest"),
    Run("python train.py --config mnist training.init=.*", TRAINING, "runs/tuned/latest"),
    Run("python train.py .* optimizer.rate_multipliers=.*", TRAINING, "runs/gently/latest"),
    Run("python train.py --config mnist lora.rank=.*", TRAINING, "runs/lora/latest"),
    Run("python train.py .* align.block=2 .*", TRAINING, "runs/aligned/latest"),
    Run("python train.py .* model.wide_head.width=.*", TRAINING, "runs/wide/latest"),
    Run("torchrun .* train.py --config diffmoe_s_.*", TWO_RANKS, "runs/diffmoe_s_e16_flow/latest"),
    Run("deepspeed train.py --config diffmoe_l_.*", TWO_RANKS, "runs/diffmoe_l_e16_flow/latest"),
    Run("torchrun .* train.py --config captioned_.*", TWO_RANKS, "runs/captioned_digits/latest"),
    Run(
        "torchrun .* train.py --config t2i_s_e8 .*",
        f"{TWO_RANKS} model.text.width=16 model.text.depth=1",
        "runs/t2i_s_e8/latest",
    ),
    Run("torchrun .* train.py --config t2i_l_e16 .*", TWO_RANKS, "runs/t2i_l_e16/latest"),
    Run("python tools/compare.py mnist", gives="runs/studies/mnist/table.md"),
    # Cluster.
    Run("python tools/submit.py xl .* --dry-run", SMALL, tells="#SBATCH --nodes=4"),
    Run("python tools/plan.py --recipe xl_e16 .*", tells="GB"),
    Run("python tools/plan.py --recipe diffmoe_xl_e16_rae .*", tells="GB"),
    Run("python tools/plan.py --recipe mnist --parameters .*", tells="million by muon"),
    # Sampling.
    Run("python tools/sample.py runs/mnist .*", "--per-class 2 --steps 2", "grid.png"),
    Run("python tools/sample.py runs/own .*", "--per-class 2 --steps 2", "cats.png"),
    Run("python tools/sample.py runs/[ct].* --prompt .*", "--per-prompt 2 --steps 2", "grid.png"),
    Run("torchrun .* tools/sample.py runs/mnist .*", f"{FEW} --out made", "made/samples.json"),
    Run("python tools/calibrate.py runs/mnist .*", "--samples 8 --steps 2", tells="stored as"),
    Run("python tools/report_routing.py .*", "--samples 8 --steps 2", "runs/mnist/routing.html"),
    # Evaluation.
    Run("python tools/evaluate.py reference photos/test .*", gives="references/test.npz"),
    Run("python tools/evaluate.py runs/photos .*", FEW, "evaluation/photos/results.jsonl", "FD-"),
    Run("python tools/evaluate.py runs/captioned_digits .*", FEW, tells="digits"),
    Run(
        "python tools/evaluate.py images samples .*",
        f"--num 8 --extractor {NAME}",
        "evaluation/results.jsonl",
    ),
    Run("python tools/evaluate.py plot .*", gives="fd.png"),
    # Conversion.
    Run(".* runs/mnist exported/mnist", gives="exported/mnist/config.json"),
    Run(".* runs/lora exported/lora", gives="exported/lora/config.json"),
    Run(".* runs/lora adapters/lora --adapters", gives="adapters/lora/config.json"),
    Run(".* info exported/mnist", tells="made from     training checkpoint mnist/step-"),
    Run(".* exported/mnist shared/mnist --to diffusers", gives="shared/mnist/pipeline.py"),
    Run(".* exported/mnist served/mnist --to pt2", gives="served/mnist/network.pt2"),
    Run("python tools/publish.py exported/mnist .*", tells="not uploaded"),
    Run(".* exported/dense exported/moe --upcycle .*", gives="exported/moe/config.json"),
]
# Of Python blocks.
SHORTER = {
    '"output=runs/scripted"]': f'"output=runs/scripted", *"{TRAINING}".split()]',
    "request(500)": "request(8)",
    "steps=50": "steps=2",
}
NOT_RUN = {
    "bash tools/quickstart.sh": "installs, and takes minutes",
    "bash tools/test.sh.*": "installs, and is this test suite",
    "bash tools/gpu_check.sh": "needs a GPU; tests/benchmarks/test_command.py rehearses it",
    "bash tools/gpu_pack.sh .*": "asks a package registry",
    "SITE=site bash tools/gpu_check.sh": "needs a GPU",
    "source .venv/bin/activate": "belongs to the installation",
    "ruff check .*": "checks the code, as continuous integration does",
    "python tools/evaluate.py loss .*": "needs a validated run, as tests/evaluation/test_loss.py",
    ".* sbatch .*": "needs Slurm; tests/slurm runs these scripts",
    "python tools/demo.py runs/mnist": "serves until stopped; tests/sampling/test_demo.py opens it",
    "python tools/benchmark.py .*": "takes minutes; tests/benchmarks runs it in small sizes",
}
# What pages take as given is made by these, once.
FIRST = [
    "python tools/prepare_data.py mnist --out data/mnist",
    "python train.py --config mnist",
    "python tools/convert_checkpoint.py runs/mnist exported/mnist",
    "python tools/convert_checkpoint.py exported/mnist shared/mnist --to diffusers",
    "python tools/evaluate.py reference photos/test --out references/test.npz",
]


def commands_of(page: Path) -> list[str]:
    return [" ".join(words) for words in commands(page)]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


EVERY = [command for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize("command", sorted(set(EVERY)))
def test_each_command_is_run_or_has_a_reason_why_not(command: str):
    patterns = [*(run.pattern for run in RUNS), *NOT_RUN]
    found = [pattern for pattern in patterns if re.fullmatch(pattern, command)]
    assert len(found) == 1, f"give {command!r} one entry in RUNS or NOT_RUN; it has {found}"


def test_no_entry_is_left_over():
    patterns = [*(run.pattern for run in RUNS), *NOT_RUN, *map(re.escape, FIRST)]
    assert [one for one in patterns if not any(re.fullmatch(one, each) for each in EVERY)] == []


def start(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Forked; of a launcher two ranks, and tests/training/test_launch.py starts the real ones."""
    launcher, *rest = words
    if launcher == "python":
        return forked(*rest, cwd=folder, timeout=500, prepare=quick_digits)
    return forked(*started_by(launcher, rest), cwd=folder, timeout=500, ranks=2)


def started_by(launcher: str, words: list[str]) -> list[str]:
    """A script and its arguments, as the launcher itself reads them."""
    if launcher == "torchrun":
        read = torchrun_parser().parse_args(words)
        return [read.training_script, *read.training_script_args]
    read = deepspeed_runner.parse_args(words)
    return [read.user_script, *read.user_args]


def check(words: list[str], folder: Path, told: str = "") -> str:
    """Run a command of a page; what it printed. told: by the commands before."""
    command = " ".join(words)
    run = next((one for one in RUNS if re.fullmatch(one.pattern, command)), None)
    if run is None:
        return ""
    if "model.text={...}" in words:
        words[words.index("model.text={...}")] = re.findall(r"model\.text={.*?}", told)[-1]
    if words[:2] == ["python", "tools/compare.py"]:
        words = [*words[:-1], short_study(words[-1], folder)]
    if run.gives:
        (folder / run.gives).unlink(missing_ok=True)
    done = start([*words, *run.more.split()], folder)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert not run.gives or (folder / run.gives).exists(), f"{command} left no {run.gives}"
    assert run.tells in done.stdout, f"{command}\n{done.stdout}"
    return done.stdout


def short_study(name: str, folder: Path) -> str:
    """A file with one seed of the study's first two variants."""
    study = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    study["overrides"] += [*TRAINING.split(), "validation.samples=8", "training.validate_every=8"]
    study["variants"] = dict(list(study["variants"].items())[:2])
    study["seeds"] = [0]
    study["evaluate"] += ["--num", "8", "--steps", "2"]
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return "study.yaml"


def write_photos(folder: Path) -> None:
    for number in range(36):
        file = folder / ["bird", "cat", "test"][number % 3] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(number, 40, 36).save(file)
        file.with_suffix(".txt").write_text(f"a red bird, number {number}")


def write_moments(folder: Path) -> None:
    """As MAR caches them: (8,h,w), means and log-variances."""
    (folder / "n01").mkdir(parents=True)
    for number in range(36):
        moments = np.random.default_rng(number).standard_normal((2, 8, 8, 8)).astype(np.float32)
        file = folder / f"n01/{number}.JPEG.npz"
        np.savez(file, moments=moments[0], moments_flip=moments[1])


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that a reader of the pages has: the repository, data, a run, models."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("tools", "train.py", "deepspeed_configs"):
        (folder / name).symlink_to(ROOT / name)
    write_photos(folder / "photos")
    write_photos(folder / "imagenet/train")
    write_moments(folder / "cached")
    runs.pack(folder / "DIR", [8] * 32, shape=(4, 32, 32), classes=1000)
    build_vae().save_pretrained(folder / "stabilityai/sd-vae-ft-mse")
    exported(folder / "exported/dense", tiny_config(moe__type="dense"))
    exported(folder / "runs/photos", tiny_config(model__in_channels=3))
    write_samples(folder / "samples", pictures(8))
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=pictures(8, seed=1))
    pytest.importorskip("transformers", reason="transformers is not installed (extra text)")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra arrow)")
    from tests.helpers import tables
    from tests.helpers.text_folders import save_t5

    tables.save_to_disk(folder / "food101", {"train": [tables.labeled(0, 36)]})
    save_t5(folder / "models/t5-v1_1-xl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for command in FIRST:
            check(shlex.split(command), folder)
        yield folder


@pytest.fixture
def folder(given: Path, tmp_path: Path) -> Path:
    """A copy of its own, for each page."""
    return shutil.copytree(given, tmp_path / "page", symlinks=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.name
)
def test_commands_run(page: Path, folder: Path):
    """Those of README that are on another page as well, run there."""
    elsewhere = {command for other in PAGES[1:] for command in commands_of(other)}
    told = ""
    for words in commands(page):
        command = " ".join(words)
        if command not in FIRST and not (page == PAGES[0] and command in elsewhere):
            told += check(words, folder, told)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name
)
def test_python_blocks_run(page: Path, folder: Path):
    for block in python_blocks(page):
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        (folder / "block.py").write_text(f"{block}\nprint({{image.size for image in images}})\n")
        done = forked("block.py", cwd=folder, timeout=500)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "{(28, 28)}"
