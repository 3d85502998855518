"""A mixed load for Locust.

locust -f clients/examples/locustfile.py --host 127.0.0.1:50051 --headless -u 8 -t 30s
"""

from __future__ import annotations

import numpy as np
from locust import constant, task

from els_client.locust_user import DenoiserUser

MODEL = "fashion-els"
NOISY = np.random.default_rng(0).standard_normal((1, 1, 28, 28), np.float32)


class Caller(DenoiserUser):
    """Mostly denoises, sometimes requests a score or a sample."""

    wait_time = constant(0)

    @task(8)
    def denoise(self) -> None:
        """Denoise one image."""
        with self.counted("denoise"):
            self.client.denoise(NOISY, model=MODEL, sigma=1.0, label=7)

    @task(1)
    def score(self) -> None:
        """Request one score."""
        with self.counted("score"):
            self.client.score(NOISY, model=MODEL, sigma=1.0, label=7)

    @task(1)
    def sample(self) -> None:
        """Sample one image in five steps."""
        with self.counted("sample"):
            for _ in self.client.sample(model=MODEL, steps=5, label=7, want=()):
                pass
