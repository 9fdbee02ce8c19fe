"""Simulated populations of annotators, and planning how much to ask of real ones."""
