"""Benchmarks, as `benchmarks/gpu.sh` and the tests import them."""
