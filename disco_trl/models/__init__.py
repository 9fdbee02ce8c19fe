"""Reward models: heads, loading, adapters, prefix sharing, inference and export."""
