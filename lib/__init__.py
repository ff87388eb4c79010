"""Kumiki's library: everything worth testing. Imports go down only, see docs/architecture.md."""
