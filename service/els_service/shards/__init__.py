"""Banks in several processes, of one machine or of a Ray cluster: the bits of one process."""
