"""One module a command of `kumiki`, imported when the command is called."""
