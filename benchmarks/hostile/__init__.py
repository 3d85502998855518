"""Effect of hostile callers on a server and on its other callers."""
