"""From raw shards to packed token rows: sources, cleaning, tokenizers, token files."""
