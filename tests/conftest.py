"""Fixtures that several rooms share: real data, tiny encoders, runs on real ranks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe.config import Config
from diffmoe.data import fetching
from tests.helpers.devices import DEVICES, fp32_products
from tests.helpers.runs import pack as pack_run
from tests.helpers.runs import run_config, train
from tests.helpers.shards import FIELDS, build_vae, pack, photograph
from tests.helpers.tools import tool

# Else the question whether there is a GPU takes one, which ranks that are forked later cannot.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# In the order of the time they take; the others take a minute at most.
LONGEST = [
    "slurm",
    "tests/test_docs_commands.py",
    "tests/benchmarks/test_command.py",
    "tests/training/test_elastic.py",
    "tests/training/test_launch.py",
    "tests/training/test_orphans.py",
    "tests/comparison/test_study.py",
    "tests/planning/test_against_reality.py",
    "tests/export/test_program.py",
    "tests/training/test_resume.py",
    "tests/training/test_compile.py",
    "tests/training/test_wandb.py",
    "tests/training/test_watchdog.py",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n: a file's tests stay together, as they share fixtures, and so do those of Slurm.

    The longest begin first, so that none is left alone at the end; then those of many tests.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            first = next((name for name in LONGEST if name in self.workqueue), None)
            if first is not None:
                self.workqueue.move_to_end(first, last=False)
            super()._assign_work_unit(node)

    return Files(config, log)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the numbers of an oracle are computed; on a GPU in full fp32."""
    with fp32_products("highest"):
        yield torch.device(request.param)


@pytest.fixture
def compiler() -> None:
    """torch.compile as in a new process: what other tests compiled counts to its limits."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """No waiting between attempts."""
    monkeypatch.setattr(fetching, "BACK_OFF", 0.0)


@pytest.fixture(name="pack", scope="session")
def pack_fixture():
    return pack


@pytest.fixture
def fields():
    return dict(FIELDS)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """30 images in 3 class folders: JPEG and PNG, other modes, a subfolder, files to pass over."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(30):
        folder = root / ["cat", "Ant", "bee 2.0"][index % 3]
        if index == 4:
            folder = folder / "more"
        folder.mkdir(exist_ok=True, parents=True)
        image = photograph(index, 20 + index)
        if index in (5, 6, 7):
            image = image.convert({5: "L", 6: "CMYK", 7: "P"}[index])
        kind = "png" if index in (7, 8, 9) else "jpg" if index % 2 else "JPEG"
        image.save(folder / f"photo {index}.x.{kind}")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "readme.md").write_text("beside the classes")
    return root


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """Its folder, with a scale and a shift."""
    folder = tmp_path_factory.mktemp("vae")
    build_vae(scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(name="tool", scope="session")
def tool_fixture():
    return tool


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders t5 and clip of tiny encoders."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra text)")
    from tests.helpers.text_folders import save_clip, save_t5

    root = tmp_path_factory.mktemp("encoders")
    save_t5(root / "t5")
    save_clip(root / "clip")
    return root


def _run(folder: Path, world: int, **changes) -> Config:
    pack_run(folder / "data", class_names=["plane", "car", "bird", "cat", "deer"])
    config = run_config(
        folder, 3, training__ema_stds=[0.05, 0.1], logging__log_samples=24, **changes
    )
    train(config, world)
    return config


@pytest.fixture(scope="session")
def spread_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two ranks that share the experts, ZeRO stage 2."""
    folder = tmp_path_factory.mktemp("spread")
    return _run(folder, 2, parallel__expert_parallel=2, parallel__zero_stage=2)


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Six steps beside the weights of another run: two ranks that share the experts, in bf16."""
    folder = tmp_path_factory.mktemp("lora")
    names = ["plane", "car", "bird", "cat", "deer"]
    pack_run(folder / "data", shape=(3, 8, 8), class_names=names)
    rgb = {"model__in_channels": 3, "moe__token_pool": "global"}
    base = run_config(folder, 2, output=str(folder / "base"), **rgb)
    train(base)
    config = run_config(
        folder,
        6,
        training__checkpoint_samples=24,
        training__init=base.output,
        training__train_only=("label_embed.*",),
        training__precision="bf16",
        lora={"rank": 2, "alpha": 8.0, "targets": ("attention", "mlp", "experts")},
        parallel__expert_parallel=2,
        **rgb,
    )
    train(config, 2)
    return config


@pytest.fixture(scope="session")
def single_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One rank, stage 1."""
    return _run(tmp_path_factory.mktemp("single"), 1)
