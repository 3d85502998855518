from els_client import Client

with Client("127.0.0.1:50051") as client:
    *_, last = client.sample(model="fashion-els", seed=0, label=1, steps=4)
    (found,) = client.originality(last.x, model="fashion-els", label=1)
    print(found.memorised, found.gap_ratio, found.nearest[:3], found.distances[:3])
