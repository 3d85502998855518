"""RPC methods of denoise.v1, the Open Inference Protocol and grpc.health.v1."""
