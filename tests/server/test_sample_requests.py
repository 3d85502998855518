"""Requests of ``Sample`` as options of a sampler."""

from __future__ import annotations

import math

import torch

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo
from els_service.denoisers.samplers import ALL_SAMPLERS
from els_service.server.requests.sample import (
    SAMPLER_NAMES,
    check_sample,
    held_bytes_of,
    options_of,
)

LIMITS = Limits(max_images=8, max_steps=100, max_message_bytes=1 << 20, max_pixels=1 << 20)
INFO = DenoiserInfo("onnx", (1, 2, 3), trained_sigma=(0.1, 20.0))


def test_every_sampler_of_the_contract_is_one_of_the_library() -> None:
    assert set(SAMPLER_NAMES) == {number for _, number in pb.Sampler.items()}
    assert set(SAMPLER_NAMES.values()) == set(ALL_SAMPLERS)


def test_fields_that_are_unset_leave_today_s_options() -> None:
    request = pb.SampleRequest(model="m", steps=7, sampler=pb.SAMPLER_DDPM)
    check_sample(request, INFO, LIMITS)
    options = options_of(request, INFO, LIMITS)
    assert (options.steps, options.eta, options.churn) == (7, 1.0, 0.0)
    assert (options.times, options.start, options.start_time) == ((), None, 1.0)
    assert (options.churn_min_sigma, options.churn_max_sigma) == (0.0, math.inf)
    assert (options.churn_noise, options.scheduler, options.trained) == (1.0, None, (0.1, 20.0))


def test_a_start_and_an_older_answer_count_as_memory_of_the_trajectory() -> None:
    start = pb.Tensor(dtype=pb.DTYPE_U8, shape=[1, 1, 2, 3], data=bytes([0, 255] * 3))
    request = pb.SampleRequest(steps=7, count=4, start=start, start_time=0.5)
    options = options_of(request, INFO, LIMITS)
    assert options.start is not None
    assert torch.equal(options.start.flatten(), torch.tensor([-1.0, 1.0] * 3).double())
    assert held_bytes_of("ddim", options, (4, 1, 2, 3)) == 6 * 8
    assert held_bytes_of("dpmpp_2m", options, (8, 1, 2, 3)) == 6 * 8 + 48 * 8
