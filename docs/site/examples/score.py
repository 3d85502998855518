import numpy as np

from els_client import Client

with Client("127.0.0.1:50051") as client:
    shape = client.model("fashion-els").shape
    noisy = np.random.default_rng(0).normal(size=(1, *shape))
    score = client.score(noisy, model="fashion-els", sigma=0.5)
    # (D(x) - x)/σ² at a = 1.
    clean = client.denoise(noisy, model="fashion-els", sigma=0.5)
    print(np.abs(score - (clean - noisy) / 0.5**2).max())
