"""Judging a model through the family contract alone: bits per byte, and what to compare it with."""
