"""The engine: models by name, and many callers' queries turned into few launches. No gRPC."""
