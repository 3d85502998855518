import numpy as np

from els_client import Client

with Client("127.0.0.1:50051") as client:
    shape = client.model("fashion-els").shape
    noisy = np.random.default_rng(0).normal(size=(1, *shape))
    found = client.explain(noisy, model="fashion-els", sigma=0.5, top=4)
    image, row, column = found.sources[0, 3, 2, 0]  # largest source of the pixel in row 3, column 2
    print(image, row, column, found.weights[0, 3, 2, 0], found.effective_sources.mean())
