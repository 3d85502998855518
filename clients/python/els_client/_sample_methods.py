"""Methods of the blocking client that draw images."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Unpack

from els_client._channel import own_errors, timeout_of
from els_client._connection import Connection
from els_client._retries import RetryState, Trajectory
from els_client._sample_codec import encode_sample
from els_client._step import Step
from els_client._types import SampleOptions
from els_client.errors import ResourceExhaustedError, UnavailableError
from els_proto.denoise.v1 import denoise_pb2 as pb


class SampleMethods(Connection):
    """Trajectories of samplers."""

    def sample(
        self, *, timeout_s: float | None = None, **options: Unpack[SampleOptions]
    ) -> Generator[Step, None, None]:
        """Sample images by reverse diffusion and yield each step; ``x`` of the last is the result.

        Leaving the loop early cancels the call; a slow loop applies back-pressure. A trajectory
        that ends early, as its server shuts down or preempts it, is resumed from its last step.

        Args:
            timeout_s: Deadline of all steps together; by default the client's.
            **options: Sampling options.

                - model: Name of the model; required.
                - count: Number of images, 1 to ``Limits.max_images``; by default 1.
                - seed: 0 to 2**64 - 1, by default 0; the noise of image i depends only on (seed,
                i),
                  in any batch.
                - steps: 1 to ``Limits.max_steps``, by default 20; at least 2 for ddim_released. For
                  pyramid those of each scale, by default ``Model.scale_steps``.
                - sampler: "ddim", the default, "ddim_released", "ddpm", "heun", "euler",
                  "dpmpp_2m" or, for models of kind "picture", "pyramid".
                - timesteps: "aligned", the default: the steps of this package; "folder": those of
                  the scheduler of a diffusers folder, for models with ``Model.scheduler``.
                - times: Times of the steps instead of ``steps``, falling, 0 < t <= 1.
                - start: Clean images [1 or count, C, H, W] to start from, as ``x`` in ``denoise``;
                  noised to ``start_time``, or to the first of ``times``.
                - start_time: Time at which the steps begin with ``start``, 0 < start_time <= 1.
                - first_image: The images are ``first_image`` … ``first_image + count - 1`` of the
                  seed; by default 0.
                - size: Height and width of the images, for models with ``Model.sizes``.
                - tileable, symmetric: For pyramid: whether opposite edges meet, or the right half
                  mirrors the left; by default False.
                - mask: For pyramid: [1 or count, 1, H, W], 1 where pixels are drawn, 0 where those
                  of ``start`` are kept.
                - label: One for all images or one each; -1 means none.
                - eta: Noise of each step of ddpm, 0 to 1; by default 1.
                - churn: Total noise of heun and euler, S_churn of EDM; by default 0.
                - churn_min_sigma, churn_max_sigma: Lowest and highest churned σ, S_min and S_max of
                  EDM; by default all are.
                - churn_noise: Scale of churn's noise, S_noise of EDM, 0 to 2; by default 1.
                - want: Arrays of each step, by default "x" and "denoised", which the last step
                  always has. Only the first step has "noise", the initial state, and only the last
                  has "decoded", the images of a latent model.
                - window: Odd side of the patch in pixels, one for all images or one each.
                - window_scale: Scale of the windows of ``Model.window``, 0.1 to 10, at every level;
                  not with ``window``.
                - conditioning, unconditional, guidance: As in ``denoise``, [1 or count, T, W].
                - priority: 1 (highest) to ``Limits.priority_levels``; by default 2.
                - version: Version of the model; by default the newest.
                - explain_steps: Steps, from 1, that have ``explanation``; for models with
                  ``Model.has_sources``. Each takes as long as ``explain`` of all images.
                - explain_top, explain_images: ``top`` and ``images`` of these explanations.
                - originality: Whether the last step has ``originality``, reports against the bank
                  of the model, or the name of a model whose bank is used instead.
                - survive_breaks: Whether to resume after a broken connection as well; each step
                  then also has the state.

        Raises:
            InvalidArgumentError: A field is invalid; ``violations`` names it.
            NotFoundError: No model has that name.
            ElsError: Any other failure.

        Example:
            >>> for step in client.sample(model="fashion-els", count=2, label=[7, 9]):
            ...     print(step.index, step.total, step.denoised.shape)
        """
        timeout_s = timeout_of(timeout_s, self._sample_timeout_s)
        return self._steps(encode_sample(**options), timeout_s)

    def _steps(self, request: pb.SampleRequest, timeout_s: float) -> Generator[Step, None, None]:
        attempts = RetryState(timeout_s, wait_when_full=self._wait_when_full)
        trajectory = Trajectory(request, attempts)
        while True:
            call = self._stub.Sample(request, timeout=attempts.left_s(), metadata=self._metadata)
            try:
                with own_errors(self._route, timeout_s):
                    for message in call:
                        if step := trajectory.accept(message):
                            yield step
                trajectory.check_complete()
                return
            except (ResourceExhaustedError, UnavailableError) as error:
                pause_s = trajectory.pause_s(error)
            finally:
                call.cancel()
            time.sleep(pause_s)
