"""The affine model for MLServer's ``mlserver start FOLDER``; runs in its venv."""

from __future__ import annotations

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Affine(MLModel):
    """The posterior mean of a Gaussian prior of variance 1/4: ``x · v / (v + σ²)``."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Return ``denoised``."""
        inputs = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        x, sigma = inputs["x"], inputs["sigma"].reshape(-1, 1, 1, 1)
        denoised = x * (0.25 / (0.25 + sigma**2))
        return InferenceResponse(
            id=payload.id,
            model_name=self.name,
            outputs=[NumpyCodec.encode_output("denoised", denoised)],
        )
