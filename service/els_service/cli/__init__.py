"""The command line of the server: ``els-server``."""
