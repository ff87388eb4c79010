"""Between text and ids: tokenizers of every kind, and the frame of conversations."""
