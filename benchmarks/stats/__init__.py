"""Statistics of the keep masks and of the words below them: `python -m benchmarks.stats`."""
