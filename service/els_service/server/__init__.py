"""gRPC server: services, requests, transport, security, telemetry and lifecycle."""
