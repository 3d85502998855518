import numpy as np

from els_client import Client

with Client("127.0.0.1:50051") as client:
    shape = client.model("fashion-els").shape
    noisy, tangent = np.random.default_rng(0).normal(size=(2, 1, *shape))
    clean, product = client.jvp(noisy, tangent, model="fashion-els", sigma=0.5)
    moved = client.denoise(noisy + 1e-3 * tangent, model="fashion-els", sigma=0.5)
    print(np.abs((moved - clean) / 1e-3 - product).max())  # a finite difference
