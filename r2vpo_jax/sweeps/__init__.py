"""Sweeps: many runs of a grid, fused into programs or in processes, and what they found."""
