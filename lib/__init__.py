"""Kumiki's library: everything worth testing. Imports go down only (tests/test_dag.py)."""
