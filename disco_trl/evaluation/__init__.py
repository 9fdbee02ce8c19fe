"""How good a reward model is on held-out data, and how honest: metrics, benchmarks, reports and comparisons."""
