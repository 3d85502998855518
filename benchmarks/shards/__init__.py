"""Banks in shards beside one process."""
