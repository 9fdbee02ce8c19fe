"""Simulated populations of annotators, and plans for how much to ask of real ones."""
