"""The study of Roth et al. 2022 (arXiv:2106.08265) on any data set: ``python -m benchmarks.paper ROOT --dataset NAME``."""
