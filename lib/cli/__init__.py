"""The `kumiki` command: main (parser, dispatch), commands (one module each), what they share."""
