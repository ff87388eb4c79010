"""Models as users meet them: generation, Hugging Face folders, the `kumiki` command."""
