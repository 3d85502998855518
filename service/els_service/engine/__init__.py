"""Engine: models by name, queues, batching and devices. Does not know gRPC."""
