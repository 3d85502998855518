"""Imported last by the process that servers are forked from.

A collection of garbage then skips what it has imported. A server collects when it starts: it would
walk all of that, and copy the memory that it shares with its parent.
"""

import gc

gc.collect()
gc.freeze()
