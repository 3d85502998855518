import numpy as np

from els_client import Client, ElsError, Query

with Client("127.0.0.1:50051") as client:
    shape = client.model("fashion-els").shape
    noisy = np.random.default_rng(0).normal(size=(1, *shape))
    queries = [Query(noisy, model="fashion-els", sigma=sigma) for sigma in (0.2, 0.5, -1.0)]
    # Answers come in order; a request that fails is an error in its place, and ends nothing.
    answers = client.denoise_many(queries, return_exceptions=True)
    for query, clean in zip(queries, answers, strict=True):
        print(query.sigma, clean if isinstance(clean, ElsError) else clean.mean())
