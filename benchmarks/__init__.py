"""Benchmarks and studies, run as `python -m benchmarks.NAME`. The figures in the documentation are made by them."""
