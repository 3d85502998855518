"""Decoding and validation of messages, and encoding of responses; independent of gRPC."""
