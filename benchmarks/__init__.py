"""Benchmarks of dropout_ext beside torch: `python -m benchmarks` (see README.md in this folder)."""
