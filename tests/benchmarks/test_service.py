"""What the service benchmark stands on: its statistics, its bare handlers, its input file."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from benchmarks.service import load, perf_analyzer
from benchmarks.service.messages import (
    DENOISE,
    DENOISE_NEW,
    DENOISE_STREAM,
    ECHO,
    INFER_NEW,
    MODEL_INFER,
    SCORE_NEW,
    STREAM_NEW,
    X,
    check,
)
from benchmarks.service.servers import baselines, els_server
from benchmarks.service.statistics import ratio_of_pairs

from els_proto.denoise.v1.denoise_pb2 import DenoiseRequest
from els_proto.inference.grpc_service_pb2 import ModelInferRequest


def test_the_ratio_is_the_median_of_pairs_within_its_interval() -> None:
    assert ratio_of_pairs([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 3.0)


def test_rounds_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="in pairs, got 1 and 2"):
        ratio_of_pairs([1.0], [1.0, 2.0])


@pytest.mark.slow
def test_bare_handlers_return_the_image_and_bear_the_load() -> None:
    with baselines() as server:

        async def answers() -> None:
            for method in (ECHO, DENOISE, MODEL_INFER):
                check(method, await load.first_answer(server.port, method, 30), bare=True)
            streamed = await load.first_streamed(server.port, DENOISE_STREAM, 30)
            check(DENOISE_STREAM, streamed, bare=True)
            assert await load.unary(server.port, DENOISE, 0.1) > 0
            assert await load.stream(server.port, DENOISE_STREAM, 0.1) > 0

        asyncio.run(answers())
        assert server.cpu_seconds() > 0


@pytest.mark.slow
def test_our_server_answers_what_is_timed() -> None:
    with els_server() as server:

        async def answers() -> None:
            for method in (DENOISE, DENOISE_NEW, SCORE_NEW, MODEL_INFER, INFER_NEW):
                check(method, await load.first_answer(server.port, method, 30), bare=False)
            for method in (DENOISE_STREAM, STREAM_NEW):
                check(method, await load.first_streamed(server.port, method, 30), bare=False)
            assert await load.unary(server.port, INFER_NEW, 0.1) > 0

        asyncio.run(answers())


def test_a_new_level_is_never_repeated_and_an_old_one_always() -> None:
    requests = [DenoiseRequest.FromString(DENOISE_NEW.message()) for _ in range(100)]
    assert len({request.level.sigma[0] for request in requests}) == 100
    inferences = [ModelInferRequest.FromString(INFER_NEW.message()) for _ in range(100)]
    assert len({one.raw_input_contents[1] for one in inferences}) == 100
    assert len({one.id for one in inferences}) == 100
    assert {DENOISE.message() for _ in range(100)} == {DENOISE.body}


def test_a_wrong_answer_is_not_timed() -> None:
    with pytest.raises(ValueError, match="a wrong answer"):
        check(ECHO, DENOISE.body, bare=False)


def test_perf_analyzer_sends_the_same_image() -> None:
    (step,) = json.loads(perf_analyzer.INPUT.read_text())["data"]
    x = np.array(step["x"]["content"]).reshape(step["x"]["shape"])
    np.testing.assert_allclose(x, X, rtol=1e-3)
