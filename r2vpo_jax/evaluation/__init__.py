"""Scores of a model: validation while training, benchmarks of any checkpoint."""
