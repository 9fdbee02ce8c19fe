"""What the project measures of itself, each run as `python -m benchmarks.NAME`; `--help` says what it takes."""
