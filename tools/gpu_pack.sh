#!/usr/bin/env bash
# Lays what training and tests need beside torch into FOLDER, for a machine that has a CUDA torch but
# reaches no package registry:  tools/gpu_pack.sh FOLDER [PYTHON_VERSION, default 3.12]
# Run it where `pip install -e ".[train,mnist]"` was done; then tools/gpu_check.sh there, see docs/gpu.md.
set -euo pipefail
folder=${1:?tools/gpu_pack.sh FOLDER [PYTHON_VERSION]} version=${2:-3.12}
mkdir -p "$folder"
# With their dependencies, less what comes with every CUDA torch or is not needed for a check.
requirements=$(python - <<'PYTHON'
from importlib.metadata import version

names = """annotated-types braceexpand einops hjson megatron-core mlxtend msgpack packaging psutil py-cpuinfo
    pydantic pydantic-core safetensors tqdm typing-extensions typing-inspection webdataset"""
print(*(f"{name}=={version(name)}" for name in names.split()))
PYTHON
)
# shellcheck disable=SC2086 # one word a requirement
python -m pip install --quiet --no-deps --upgrade --target "$folder" --python-version "$version" \
    --only-binary=:all: --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux_2_17_x86_64 --platform any $requirements
# DeepSpeed is published as source alone; installed, it is plain Python.
site=$(python -c "import importlib.util as u, pathlib as p; print(p.Path(u.find_spec('deepspeed').origin).parents[1])")
cp -r "$site"/deepspeed "$site"/deepspeed-*.dist-info "$folder"/
rm -rf "$folder"/deepspeed/ops/csrc
find "$folder" -name __pycache__ -prune -exec rm -rf {} +
du -sh "$folder"
