"""The wire: messages to tensors and back, two services, health, metrics, and their assembly."""
