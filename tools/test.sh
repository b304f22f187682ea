#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh dev
workers=$(python -c "import os; print(min(os.cpu_count(), 4))") # a test may start four ranks
OMP_NUM_THREADS=1 python -m pytest -n "$workers" "$@"
