"""A real server under every kind of load for minutes or hours: its memory and files stay flat."""
