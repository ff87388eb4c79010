"""Optimisation: schedules, optimizers, and the loop that serves every family."""
