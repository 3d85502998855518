import numpy as np

from els_client import Client, Evidence

with Client("127.0.0.1:50051") as client:
    shape = client.model("fashion-els").shape
    noisy, cotangent = np.random.default_rng(0).normal(size=(2, 1, *shape))
    # Evidence of the first product spares later ones at the same point a pass over the bank.
    evidence = Evidence()
    for along in (cotangent, noisy):
        clean, product = client.vjp(noisy, along, evidence=evidence, model="fashion-els", sigma=0.5)
        print(product.shape)
