"""Calls: receiving, status, context, and what gRPC itself needs."""
