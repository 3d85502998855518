"""Imported last by the process that servers are forked from.

What it has imported is then never garbage: a server that collects garbage when it starts would walk
all of it, and copy the memory that it shares with its parent.
"""

import gc

gc.collect()
gc.freeze()
