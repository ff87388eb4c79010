"""Layers used by two or more families."""
