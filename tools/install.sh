# Sourced by quickstart.sh and test.sh: makes (once) and enters a virtual environment with DiffMoE
# and the extras named. A torch that is already there stays; without a GPU the CPU build is taken.
venv=${DIFFMOE_VENV:-.venv}
fresh=
[ -x "$venv/bin/python" ] || { "${PYTHON:-python3}" -m venv "$venv" && fresh=yes; }
source "$venv/bin/activate"
constraints=()
if ! python -c "import torch" 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    constraints=(-c tools/constraints-cpu.txt)
fi
python -m pip install --quiet --disable-pip-version-check --no-compile "${constraints[@]}" -e ".[$1]"
# pip would compile on one core, which takes longer than all else; some packages hold templates that do not compile.
[ -z "$fresh" ] || python -m compileall -qq -j 0 "$venv/lib" || true
