"""What comes before documents: the sources of params.yaml and their verified shards."""
