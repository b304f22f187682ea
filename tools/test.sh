#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh dev
# Debian's packages that some tests use; without them these are skipped, with the reason.
need() { command -v "$1" >/dev/null || echo "$2"; }
packages=$(need chromium chromium)
if [ -n "$packages" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # shellcheck disable=SC2086  # several words
    { apt-get update && apt-get install -y --no-install-recommends $packages; } >/dev/null ||
        echo "not installed: $packages" >&2
fi
OMP_NUM_THREADS=1 python -m pytest "$@"
