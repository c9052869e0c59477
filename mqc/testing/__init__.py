"""Helpers for tests and demonstrations: a generated task, models with known activations."""
