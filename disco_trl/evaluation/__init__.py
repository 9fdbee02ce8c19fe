"""Evaluation of reward models on held-out data: metrics, benchmarks, reports and comparisons."""
