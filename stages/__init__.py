"""One file = one DVC stage = one process: read parameters, open inputs, call lib, commit."""
