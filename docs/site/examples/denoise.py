import numpy as np

from els_client import Client

with Client("127.0.0.1:50051") as client:
    shape = client.model("fashion-els").shape
    noisy = np.random.default_rng(0).normal(size=(3, *shape))
    # Each image has its own level; a label restricts the bank to the images that have it.
    clean = client.denoise(noisy, model="fashion-els", sigma=[0.2, 0.5, 1.0], label=[0, 1, 2])
    print(clean.shape, clean.dtype)  # (3, C, H, W) float32
