#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh dev
# Tests wait for processes as much as they compute; and one may start four ranks.
workers=$(python -c "import os; print(min(os.cpu_count() + 1, 4))")
OMP_NUM_THREADS=1 python -m pytest -n "$workers" "$@"
