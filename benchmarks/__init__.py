"""Benchmarks: `python -m benchmarks.bench_coreset`. A result is compared with the reference before anything is timed."""
