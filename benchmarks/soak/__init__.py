"""Soak test: a server under every kind of load, whose memory and open files must not grow."""
