from els_client import Client, NotFoundError

with Client("127.0.0.1:50051") as client:
    model = client.model("fashion-els")
    print(model.machine, model.padding, model.label_names, model.limits.max_images)
    try:
        client.model("another")
    except NotFoundError as error:
        print(error)  # lists the models that are served
