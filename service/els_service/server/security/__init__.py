"""Access control, tokens, TLS and files that are reloaded on change."""
