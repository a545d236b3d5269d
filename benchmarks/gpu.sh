#!/usr/bin/env bash
# Correctness, speed and memory on this machine's NVIDIA GPU; with --smoke all of it at tiny sizes on the CPU.
#
#     benchmarks/gpu.sh [--smoke] [--only correctness|operator|model|memory] [--again] [--seconds N]
#         [--output DIR]
#
# Needs Python with torch and triton, of PYTHON or python3; diffusers for the whole model, natten to be compared with.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for argument in "$@"; do
    # Kernels run in Triton's interpreter
    if [ "$argument" = --smoke ]; then export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=; fi
done
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
