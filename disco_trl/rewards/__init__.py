"""The hand-off: reward functions for policies, best-of-N, and scoring and filtering of datasets."""
