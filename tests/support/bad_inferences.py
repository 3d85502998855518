"""Requests of the Open Inference Protocol that are wrong in one way, with their due answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tests.support.bad_requests import INF, NAN, Bad
from tests.support.models_folder import SHAPE

from els_proto.inference import grpc_service_pb2 as pb

Input = tuple[str, str, Sequence[int], bytes]
"""Name, datatype, shape and raw contents."""

ONE = (1, *SHAPE)
X: Input = ("x", "FP32", ONE, bytes(120))


def fp32(name: str, *values: float, shape: Sequence[int] | None = None) -> Input:
    """Return an input of these values."""
    raw = np.array(values, "<f4").tobytes()
    return name, "FP32", (len(values),) if shape is None else shape, raw


def int64(name: str, *values: int) -> Input:
    """Return an input of these values."""
    return name, "INT64", (len(values),), np.array(values, "<i8").tobytes()


SIGMA = fp32("sigma", 1.0)


def infer(
    *inputs: Input,
    model: str = "zeros",
    version: str = "",
    outputs: Sequence[str] = (),
    raw: Sequence[bytes] | None = None,
) -> pb.ModelInferRequest:
    """Return a request of raw contents."""
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    for name, datatype, shape, data in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(data)
    if raw is not None:
        request.ClearField("raw_input_contents")
        request.raw_input_contents.extend(raw)
    for output in outputs:
        request.outputs.add(name=output)
    return request


def typed(
    values: Sequence[float], shape: Sequence[int] = ONE, datatype: str = "FP32"
) -> pb.ModelInferRequest:
    """Return a request of typed contents."""
    request = pb.ModelInferRequest(model_name="zeros")
    x = request.inputs.add(name="x", datatype=datatype, shape=shape)
    x.contents.fp32_contents.extend(values)
    sigma = request.inputs.add(name="sigma", datatype="FP32", shape=[1])
    sigma.contents.fp32_contents.append(1.0)
    return request


def _x(*values: float, shape: Sequence[int] = ONE) -> Input:
    pixels = np.zeros(30, "<f4")
    pixels[: len(values)] = values
    return "x", "FP32", shape, pixels.tobytes()


_VAST = 2**62
_NAMES = "among x, sigma, alpha_bar, time, label, window"
_DIMENSIONS = "at most 4 positive dimensions"
_FINITE = "finite pixels, |x| <= 1e+09"

INFERENCES: dict[str, Bad] = {
    "bytes too few": Bad(
        infer(("x", "FP32", ONE, bytes(119)), SIGMA),
        "x",
        "120 bytes for [1, 1, 6, 5]",
        "119 bytes",
    ),
    "values too few": Bad(typed([0.0] * 29), "x", "30 values for [1, 1, 6, 5]", "29 values"),
    "values too many": Bad(typed([0.0] * 31), "x", "30 values for [1, 1, 6, 5]", "31 values"),
    "no contents": Bad(infer(X, SIGMA, raw=()), "x", "30 values for [1, 1, 6, 5]", "0 values"),
    "buffers too few": Bad(
        infer(X, SIGMA, raw=[bytes(120)]), "raw_input_contents", "none or 2 buffers", "1 buffers"
    ),
    "buffers too many": Bad(
        infer(X, SIGMA, raw=[b""] * 3), "raw_input_contents", "none or 2 buffers", "3 buffers"
    ),
    "datatype of x": Bad(
        infer(("x", "FP64", ONE, bytes(240)), SIGMA), "x.datatype", "FP32", "'FP64'"
    ),
    "datatype unknown": Bad(
        infer(("x", "é" * 9000, ONE, bytes(120)), SIGMA), "x.datatype", "FP32", "'ééé"
    ),
    "datatype of label": Bad(
        infer(X, SIGMA, ("label", "INT32", [1], bytes(4))), "label.datatype", "INT64", "'INT32'"
    ),
    "rank 0": Bad(infer(("x", "FP32", (), bytes(4)), SIGMA), "x.shape", "[B, C, H, W]", "[]"),
    "rank 3": Bad(infer(_x(shape=(1, 6, 5)), SIGMA), "x.shape", "[B, C, H, W]", "[1, 6, 5]"),
    "rank 65": Bad(infer(("x", "FP32", [1] * 65, bytes(4)), SIGMA), "x.shape", _DIMENSIONS, "[1,"),
    "rank 20000": Bad(
        infer(("x", "FP32", [1] * 20_000, bytes(4)), SIGMA), "x.shape", _DIMENSIONS, "[1, 1"
    ),
    "dimension negative": Bad(
        infer(_x(shape=(1, -1, 6, -5)), SIGMA), "x.shape", _DIMENSIONS, "[1, -1, 6, -5]"
    ),
    "dimension overflowing": Bad(
        infer(_x(shape=(1, 4, _VAST, _VAST)), SIGMA),
        "x",
        f"{16 * _VAST * _VAST} bytes",
        "120 bytes",
    ),
    "dimension overflowing but empty": Bad(
        infer(("x", "FP32", (0, _VAST, _VAST, 1), b""), SIGMA), "x.shape", _DIMENSIONS, "[0, "
    ),
    "batch empty": Bad(
        infer(("x", "FP32", (0, *SHAPE), b""), SIGMA), "x.shape", _DIMENSIONS, "[0, 1, 6, 5]"
    ),
    "batch too large": Bad(
        infer(("x", "FP32", (257, *SHAPE), bytes(257 * 120)), SIGMA),
        "x.shape",
        "at most 256 images",
        "257",
        "RESOURCE_EXHAUSTED",
    ),
    "shape of another model": Bad(
        infer(_x(shape=(1, 1, 5, 6)), SIGMA), "x", "shape [B, 1, 6, 5]", "[1, 1, 5, 6]"
    ),
    "pixel NaN": Bad(infer(_x(NAN), SIGMA), "x", _FINITE, "nan"),
    "pixel infinite": Bad(infer(_x(0, -INF), SIGMA), "x", _FINITE, "-inf"),
    "x missing": Bad(infer(SIGMA), "inputs", "x among them", "['sigma']"),
    "nothing at all": Bad(infer(), "inputs", "x among them", "[]"),
    "input unknown": Bad(infer(X, fp32("noise", 1.0)), "inputs[1].name", _NAMES, "'noise'"),
    "input named twice": Bad(infer(X, SIGMA, X), "inputs[2].name", "each name once", "x"),
    "output unknown": Bad(
        infer(X, SIGMA, outputs=["mean"]),
        "outputs",
        "among denoised, score, log_evidence",
        "'mean'",
    ),
    "output named twice": Bad(
        infer(X, SIGMA, outputs=["score"] * 3000), "outputs", "each name once", "['score', "
    ),
    "evidence of a model without": Bad(
        infer(X, SIGMA, model="wiener", outputs=["log_evidence"]),
        "outputs",
        "among denoised, score",
        "'log_evidence'",
    ),
    "level missing": Bad(infer(X), "level", "exactly one of sigma, alpha_bar, time", "none"),
    "two levels": Bad(
        infer(X, SIGMA, fp32("time", 0.5)),
        "level",
        "exactly one of sigma, alpha_bar, time",
        "sigma and time",
    ),
    "level empty": Bad(infer(X, fp32("sigma")), "sigma.shape", _DIMENSIONS, "[0]"),
    "level out of range": Bad(
        infer(X, fp32("sigma", -1.0)), "level.sigma", "s/a from 0.0001 to 1e+06", "-1.0"
    ),
    "level NaN": Bad(infer(X, fp32("time", NAN)), "level.time", "0 < time <= 1", "nan"),
    "level over 1": Bad(
        infer(X, fp32("alpha_bar", 1.0)), "level.alpha_bar", "0 < alpha_bar < 1", "1.0"
    ),
    "levels wrong in number": Bad(
        infer(X, fp32("sigma", 1.0, 2.0)), "level", "1 value or 1", "2 values"
    ),
    "level no vector": Bad(
        infer(X, fp32("sigma", 1, 2, 3, 4, shape=(2, 2))), "sigma.shape", "[1] or [B]", "[2, 2]"
    ),
    "label out of range": Bad(infer(X, SIGMA, int64("label", 3)), "labels", "-1 to 2", "3"),
    "label vast": Bad(infer(X, SIGMA, int64("label", _VAST)), "labels", "-1 to 2", str(_VAST)),
    "labels wrong in number": Bad(
        infer(X, SIGMA, int64("label", 0, 1)), "labels", "none, 1 or 1 values", "2 values"
    ),
    "label to an unlabelled model": Bad(
        infer(X, SIGMA, int64("label", 0), model="gaussian"),
        "inputs[2].name",
        "among x, sigma, alpha_bar, time",
        "'label'",
    ),
    "window even": Bad(infer(X, SIGMA, int64("window", 4)), "windows", "odd from 1 to 11", "4"),
    "window 0": Bad(infer(X, SIGMA, int64("window", 0)), "windows", "odd and positive", "0"),
    "window vast": Bad(
        infer(X, SIGMA, int64("window", _VAST + 1)), "windows", "odd from 1 to 11", str(_VAST + 1)
    ),
    "window to a model without": Bad(
        infer(X, SIGMA, int64("window", 3), model="ideal"),
        "inputs[2].name",
        "among x, sigma, alpha_bar, time, label",
        "'window'",
    ),
}
