#!/usr/bin/env bash
# The first minutes on a GPU: tests, training, speed and memory, in one report (docs/gpu.md).
#   tools/gpu_check.sh                              report.md and report.json in gpu_check/
#   SITE=FOLDER tools/gpu_check.sh                  with what tools/gpu_pack.sh laid into FOLDER
#   tools/gpu_check.sh --device cpu --out DIR       a rehearsal in small sizes, a minute or two
# A machine with a CUDA torch (2.9 or newer) is enough, and no package registry is asked.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="${SITE:+$SITE:}$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m diffmoe.benchmarks.gpu_check "$@"
