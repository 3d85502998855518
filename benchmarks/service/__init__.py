"""Load on the running server, with peers beside it in the same run."""
