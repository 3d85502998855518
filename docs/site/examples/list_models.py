from els_client import Client

with Client("127.0.0.1:50051") as client:
    for model in client.models():
        print(model.name, model.kind, model.shape, model.has_gradients)
