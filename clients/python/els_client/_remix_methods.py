"""Methods of the blocking client that draw new pictures from a photograph."""

from __future__ import annotations

from collections.abc import Generator
from typing import Unpack

from els_client._channel import timeout_of
from els_client._model_codec import decode_model
from els_client._remix import RemixOptions, encode_remix
from els_client._remix_inputs import Picture
from els_client._sample_methods import SampleMethods
from els_client._step import Step
from els_client._types import Images
from els_proto.denoise.v1 import denoise_pb2 as pb


class RemixMethods(SampleMethods):
    """New pictures from a model of kind picture."""

    def remix(
        self,
        picture: Picture | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RemixOptions],
    ) -> Images:
        """Return new pictures of the world of a photograph, float32 [count, C, H, W] in [-1, 1].

        The model, of kind "picture", holds the photograph: ``els-server picture add`` makes one.
        Inputs are checked before the call is sent.

        Args:
            picture: The photograph, for the modes that start from it, resampled to the size: a
                grey or RGB picture of Pillow, uint8 [H, W] or [H, W, 3], or floats [C, H, W] in
                [-1, 1], such as an earlier result.
            timeout_s: Deadline of the whole call; by default the client's.
            **options: Options of the pictures.

                - model: Name of the model; required.
                - mode: What is drawn, by default "new".

                  - "new": the world of the photograph in another arrangement.
                  - "wider", "taller": ``picture`` in these proportions.
                  - "tileable": opposite edges meet.
                  - "symmetric": the right half mirrors the left.
                  - "variation": similar to ``picture``.
                  - "inpaint": ``picture``, in which the model draws the pixels of ``mask``.
                  - "edit": ``start``, a rough paste or sketch of the size of ``picture``, made
                    similar to the photograph; with ``mask`` only its pixels change.
                - size: Height and width; by default those of the model, and for wider and taller
                  1.5 times the one side.
                - count: Number of pictures, 1 to ``Limits.max_images``; by default 1.
                - seed: 0 to 2**64 - 1, by default 0; picture i depends only on (seed, i).
                - first_image: The pictures are ``first_image`` … of the seed; by default 0.
                - steps: Steps of each scale, at least 2; by default ``Model.scale_steps``.
                - strength: For wider, taller, variation, inpaint and edit: noise σ of the coarsest
                  scale at its first step, 0 < strength <= 1; larger values keep less of the start.
                  By default 0.2, of variation 0.6, of edit 0.3, and of inpaint 1.
                - mask: For inpaint and edit, of the size of ``picture`` or ``start``: numbers or
                  booleans [H, W], where others than 0 are drawn, or a picture of Pillow, where
                  white is drawn. Other pixels are those of the start.
                - start: For edit: a picture, as ``picture``.
                - priority: 1 (highest) to ``Limits.priority_levels``; by default 2.
                - version: Version of the model; by default the newest.

        Raises:
            InvalidArgumentError: An input is wrong, or does not go with the mode or the model;
                ``violations`` names it.
            NotFoundError: No model has that name.
            ElsError: Any other failure.

        Example:
            >>> wide = client.remix(Image.open("street.jpg"), model="street", mode="wider")
            >>> tile = client.remix(model="street", mode="tileable", size=(128, 128), seed=1)
        """
        *_, last = self._remix(picture, timeout_s, options, previews=False)
        return last.x

    def remix_steps(
        self,
        picture: Picture | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RemixOptions],
    ) -> Generator[Step, None, None]:
        """Draw as ``remix`` and yield each step; ``denoised`` is its preview, of its scale's size.

        ``x`` of the last step is the result. Leaving the loop early cancels the call. Arguments and
        errors are those of ``remix``, raised at this call.

        Example:
            >>> for step in client.remix_steps(model="street", size=(128, 192)):
            ...     print(step.scale, step.scales, step.denoised.shape)
        """
        return self._remix(picture, timeout_s, options, previews=True)

    def _remix(
        self,
        picture: Picture | None,
        timeout_s: float | None,
        options: RemixOptions,
        *,
        previews: bool,
    ) -> Generator[Step, None, None]:
        wanted = pb.GetModelRequest(name=options["model"], version=options.get("version") or "")
        described = decode_model(self._unary(self._stub.GetModel, wanted).model)
        request = encode_remix(described, picture, previews=previews, **options)
        return self._steps(request, timeout_of(timeout_s, self._sample_timeout_s))
