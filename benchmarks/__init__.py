"""Benchmarks, a package for `benchmarks/gpu.sh` and the tests."""
