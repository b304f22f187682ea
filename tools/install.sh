# Sourced by quickstart.sh and test.sh: makes (once) and enters a virtual environment with DiffMoE
# and the extras named. A torch that is already there stays; without a GPU the CPU build is taken.
venv=${DIFFMOE_VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
source "$venv/bin/activate"
constraints=()
if ! python -c "import torch" 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    constraints=(-c tools/constraints-cpu.txt)
fi
python -m pip install --quiet --disable-pip-version-check --no-compile "${constraints[@]}" -e ".[$1]"
# pip would compile on one core, for longer than all else takes. What is compiled is passed over, and
# so are the templates, no Python yet, that some packages hold.
python -m compileall -qq -j 0 "$venv/lib" || true
