"""Messages to validated requests and back; knows no gRPC."""
