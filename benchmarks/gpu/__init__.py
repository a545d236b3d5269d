"""Correctness, speed and memory of window attention and of FLUX.1's step on a GPU: run `benchmarks/gpu.sh`."""
