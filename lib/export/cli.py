"""Stands in for `lib.cli.main` until every environment has been installed again."""

import importlib

main = importlib.import_module("lib.cli.main").main
