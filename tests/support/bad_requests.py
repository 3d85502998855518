"""Requests of ``denoise.v1`` that are wrong in one way, with the answer that each deserves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message
from tests.support.models_folder import SHAPE

from els_proto.denoise.v1 import denoise_pb2 as pb

NAN, INF = float("nan"), float("inf")


class Bad(NamedTuple):
    """A request, and the status, field, expected and got that it must be answered with."""

    request: Message
    field: str
    expected: str
    got: str
    code: str = "INVALID_ARGUMENT"


def tensor(**changes: Any) -> pb.Tensor:
    """Return one good image, but for the changes."""
    fields = {"dtype": pb.DTYPE_F32, "shape": (1, *SHAPE), "data": bytes(120)}
    return pb.Tensor(**{**fields, **changes})


def denoise(**changes: Any) -> pb.DenoiseRequest:
    """Return a good request, but for the changes."""
    fields = {"model": "zeros", "x": tensor(), "level": pb.NoiseLevel(sigma=[1.0])}
    return pb.DenoiseRequest(**{**fields, **changes})


def sample(**changes: Any) -> pb.SampleRequest:
    """Return a good request, but for the changes."""
    return pb.SampleRequest(**{"model": "zeros", "count": 1, "steps": 1, **changes})


def _shape(*shape: int, **changes: Any) -> pb.DenoiseRequest:
    return denoise(x=tensor(shape=shape, **changes))


def _pixel(value: float) -> pb.DenoiseRequest:
    pixels = np.zeros(30, "<f4")
    pixels[17] = value
    return denoise(x=tensor(data=pixels.tobytes()))


def _level(**level: Any) -> pb.DenoiseRequest:
    return denoise(level=pb.NoiseLevel(**level))


_ONE_LEVEL = "exactly one of sigma, alpha_bar, time"
_RANGE = "s/a from 0.0001 to 1e+06"
_FINITE = "finite pixels, |x| <= 1e+09"
_DTYPES = "one of DTYPE_F32, DTYPE_F16, DTYPE_BF16"
_TOO_MANY = "RESOURCE_EXHAUSTED"
_VAST = 2**62

QUERIES: dict[str, Bad] = {
    "bytes too few": Bad(
        denoise(x=tensor(data=bytes(119))), "x.data", "120 bytes for [1, 1, 6, 5]", "119 bytes"
    ),
    "bytes too many": Bad(
        denoise(x=tensor(data=bytes(121))), "x.data", "120 bytes for [1, 1, 6, 5]", "121 bytes"
    ),
    "no tensor": Bad(denoise(x=None), "x.dtype", f"{_DTYPES}, DTYPE_U8", "0"),
    "dtype unset": Bad(denoise(x=tensor(dtype=0)), "x.dtype", f"{_DTYPES}, DTYPE_U8", "0"),
    "dtype unknown": Bad(denoise(x=tensor(dtype=99)), "x.dtype", f"{_DTYPES}, DTYPE_U8", "99"),
    "rank 0": Bad(_shape(), "x.shape", "[B, C, H, W]", "[]"),
    "rank 3": Bad(_shape(1, 6, 5), "x.shape", "[B, C, H, W]", "[1, 6, 5]"),
    "rank 5": Bad(_shape(1, 1, 1, 6, 5), "x.shape", "[B, C, H, W]", "[1, 1, 1, 6, 5]"),
    "rank 20000": Bad(_shape(*[1] * 20_000), "x.shape", "[B, C, H, W]", "[1, 1, 1"),
    "dimension negative": Bad(
        _shape(1, -1, 6, -5), "x.shape", "positive dimensions", "[1, -1, 6, -5]"
    ),
    "dimension overflowing": Bad(
        _shape(1, 4, _VAST, _VAST), "x.data", f"{16 * _VAST * _VAST} bytes", "120 bytes"
    ),
    "shape of another model": Bad(_shape(1, 1, 5, 6), "x", "shape [B, 1, 6, 5]", "[1, 1, 5, 6]"),
    "batch empty": Bad(
        _shape(0, *SHAPE, data=b""), "x.shape", "positive dimensions", "[0, 1, 6, 5]"
    ),
    "batch too large": Bad(_shape(257, *SHAPE), "x.shape", "at most 256 images", "257", _TOO_MANY),
    "pixel NaN": Bad(_pixel(NAN), "x", _FINITE, "nan"),
    "pixel infinite": Bad(_pixel(INF), "x", _FINITE, "inf"),
    "pixel -infinite": Bad(_pixel(-INF), "x", _FINITE, "-inf"),
    "pixel vast": Bad(_pixel(2e9), "x", _FINITE, "2"),
    "pixel NaN in f16": Bad(
        denoise(x=tensor(dtype=pb.DTYPE_F16, data=b"\x00\x7e" * 30)), "x", _FINITE, "nan"
    ),
    "pixel infinite in bf16": Bad(
        denoise(x=tensor(dtype=pb.DTYPE_BF16, data=b"\x80\x7f" * 30)), "x", _FINITE, "inf"
    ),
    "level missing": Bad(denoise(level=None), "level", _ONE_LEVEL, "none"),
    "level empty": Bad(_level(), "level", _ONE_LEVEL, "none"),
    "two levels": Bad(_level(sigma=[1], time=[0.5]), "level", _ONE_LEVEL, "sigma and time"),
    "sigma 0": Bad(_level(sigma=[0]), "level.sigma", _RANGE, "0.0"),
    "sigma negative": Bad(_level(sigma=[-1]), "level.sigma", _RANGE, "-1.0"),
    "sigma too large": Bad(_level(sigma=[2e6]), "level.sigma", _RANGE, "2000000.0"),
    "sigma NaN": Bad(_level(sigma=[NAN]), "level.sigma", _RANGE, "nan"),
    "sigma infinite": Bad(_level(sigma=[INF]), "level.sigma", _RANGE, "inf"),
    "alpha_bar 0": Bad(_level(alpha_bar=[0]), "level.alpha_bar", "0 < alpha_bar < 1", "0.0"),
    "alpha_bar 1": Bad(_level(alpha_bar=[1]), "level.alpha_bar", "0 < alpha_bar < 1", "1.0"),
    "alpha_bar NaN": Bad(_level(alpha_bar=[NAN]), "level.alpha_bar", "0 < alpha_bar < 1", "nan"),
    "alpha_bar too small": Bad(_level(alpha_bar=[1e-300]), "level.alpha_bar", _RANGE, "1e-300"),
    "time 0": Bad(_level(time=[0]), "level.time", "0 < time <= 1", "0.0"),
    "time over 1": Bad(_level(time=[1.5]), "level.time", "0 < time <= 1", "1.5"),
    "time NaN": Bad(_level(time=[NAN]), "level.time", "0 < time <= 1", "nan"),
    "time too small": Bad(_level(time=[1e-9]), "level.time", _RANGE, "1e-09"),
    "levels wrong in number": Bad(_level(sigma=[1, 2]), "level", "1 value or 1", "2 values"),
    "level wrong for one image": Bad(
        denoise(x=tensor(shape=(2, *SHAPE), data=bytes(240)), level=pb.NoiseLevel(sigma=[1, -1])),
        "level.sigma",
        _RANGE,
        "-1.0",
    ),
    "labels wrong in number": Bad(
        denoise(labels=[0, 1]), "labels", "none, 1 or 1 values", "2 values"
    ),
    "label too large": Bad(denoise(labels=[3]), "labels", "-1 to 2", "3"),
    "label too small": Bad(denoise(labels=[-2]), "labels", "-1 to 2", "-2"),
    "label vast": Bad(denoise(labels=[_VAST]), "labels", "-1 to 2", str(_VAST)),
    "label to an unlabelled model": Bad(
        pb.DenoiseRequest(
            model="gaussian",
            x=pb.Tensor(dtype=pb.DTYPE_U8, shape=[256, 3, 32, 32], data=bytes(256 * 3072)),
            level=pb.NoiseLevel(sigma=[1]),
            labels=[_VAST] * 256,
        ),
        "labels",
        "none for an unlabelled model",
        str(_VAST),
    ),
    "windows wrong in number": Bad(
        denoise(windows=[3, 3]), "windows", "none, 1 or 1 values", "2 values"
    ),
    "window even": Bad(denoise(windows=[4]), "windows", "odd from 1 to 11", "4"),
    "window 0": Bad(denoise(windows=[0]), "windows", "odd and positive", "0"),
    "window negative": Bad(denoise(windows=[-3]), "windows", "odd from 1 to 11", "-3"),
    "window too large": Bad(denoise(windows=[13]), "windows", "odd from 1 to 11", "13"),
    "window vast": Bad(denoise(windows=[2**31 - 1]), "windows", "odd from 1 to 11", str(2**31 - 1)),
    "window on the torus too large": Bad(
        denoise(model="circular", windows=[7]), "windows", "odd from 1 to 5", "7"
    ),
    "window to a model without": Bad(
        denoise(model="ideal", windows=[3]), "windows", "none for a model without a window", "3"
    ),
    "output dtype for requests only": Bad(
        denoise(output_dtype=pb.DTYPE_U8), "output_dtype", _DTYPES, "4"
    ),
    "output dtype unknown": Bad(denoise(output_dtype=99), "output_dtype", _DTYPES, "99"),
    "evidence of a model without": Bad(
        denoise(model="wiener", return_log_evidence=True),
        "return_log_evidence",
        "false for this model",
        "true",
    ),
}
"""For Denoise; the fields of ScoreRequest have the same numbers."""

_START, _TWO_STARTS = (
    pb.Tensor(dtype=pb.DTYPE_U8, shape=[count, 1, 6, 5], data=bytes(30 * count)) for count in (1, 2)
)

SAMPLES: dict[str, Bad] = {
    "count negative": Bad(sample(count=-1), "count", "at least 1", "-1"),
    "count too large": Bad(sample(count=257), "count", "at most 256", "257", _TOO_MANY),
    "count vast": Bad(sample(count=_VAST), "count", "at most 256", str(_VAST), _TOO_MANY),
    "steps 0": Bad(sample(steps=0), "steps", "at least 1", "0"),
    "steps negative": Bad(sample(steps=-5), "steps", "at least 1", "-5"),
    "steps too many": Bad(sample(steps=1001), "steps", "at most 1000", "1001", _TOO_MANY),
    "steps too few for released": Bad(
        sample(sampler=pb.SAMPLER_DDIM_RELEASED), "steps", "at least 2 for ddim_released", "1"
    ),
    "sampler unknown": Bad(sample(sampler=99), "sampler", "a known sampler", "99"),
    "eta over 1": Bad(sample(sampler=pb.SAMPLER_DDPM, eta=1.5), "eta", "0 <= eta <= 1", "1.5"),
    "eta negative": Bad(sample(sampler=pb.SAMPLER_DDPM, eta=-0.5), "eta", "0 <= eta <= 1", "-0.5"),
    "eta NaN": Bad(sample(sampler=pb.SAMPLER_DDPM, eta=NAN), "eta", "0 <= eta <= 1", "nan"),
    "eta for another sampler": Bad(
        sample(eta=0.5), "eta", "0 or unset but for SAMPLER_DDPM", "0.5"
    ),
    "churn negative": Bad(
        sample(sampler=pb.SAMPLER_HEUN, churn=-1), "churn", "0 <= churn, finite", "-1.0"
    ),
    "churn infinite": Bad(
        sample(sampler=pb.SAMPLER_EULER, churn=INF), "churn", "0 <= churn, finite", "inf"
    ),
    "churn NaN": Bad(
        sample(sampler=pb.SAMPLER_HEUN, churn=NAN), "churn", "0 <= churn, finite", "nan"
    ),
    "churn for another sampler": Bad(
        sample(churn=0.5), "churn", "0 but for SAMPLER_HEUN and SAMPLER_EULER", "0.5"
    ),
    "churn_noise for another sampler": Bad(
        sample(churn_noise=1.0), "churn_noise", "unset but for SAMPLER_HEUN and SAMPLER", "1.0"
    ),
    "churn_noise too large": Bad(
        sample(sampler=pb.SAMPLER_HEUN, churn_noise=3.0),
        *("churn_noise", "0 <= churn_noise <= 2", "3.0"),
    ),
    "churn_min_sigma NaN": Bad(
        sample(sampler=pb.SAMPLER_HEUN, churn_min_sigma=NAN),
        *("churn_min_sigma", "0 <= churn_min_sigma, finite", "nan"),
    ),
    "churn_max_sigma below the least": Bad(
        sample(sampler=pb.SAMPLER_HEUN, churn_min_sigma=2.0, churn_max_sigma=1.0),
        *("churn_max_sigma", "at least churn_min_sigma", "1.0"),
    ),
    "timesteps unknown": Bad(sample(timesteps=9), "timesteps", "known timesteps", "9"),
    "timesteps of no folder": Bad(
        sample(timesteps=pb.TIMESTEPS_FOLDER),
        *("timesteps", "unset for a model without a diffusers scheduler", "TIMESTEPS_FOLDER"),
    ),
    "times that rise": Bad(
        sample(steps=0, times=[0.2, 0.5]), "times", "falling numbers", "[0.2, 0.5]"
    ),
    "times too many": Bad(
        sample(steps=0, times=[0.5] * 1001), "times", "at most 1000", "1001 values", _TOO_MANY
    ),
    "times and other steps": Bad(
        sample(steps=3, times=[0.5]), "steps", "0 or 1, as there are times", "3"
    ),
    "start without a time": Bad(
        sample(start=_START), "start_time", "0 < start_time <= 1, or times, with start", "0"
    ),
    "start time without a start": Bad(
        sample(start_time=0.5), "start_time", "unset without start", "0.5"
    ),
    "start time and times": Bad(
        sample(start=_START, steps=0, start_time=0.5, times=[0.4]),
        *("start_time", "unset with times", "0.5"),
    ),
    "start time over 1": Bad(
        sample(start=_START, start_time=1.5), "start_time", "0 < start_time <= 1", "1.5"
    ),
    "start of another shape": Bad(
        sample(
            start=pb.Tensor(dtype=pb.DTYPE_U8, shape=[2, 1, 6, 5], data=bytes(60)), start_time=1
        ),
        *("start.shape", "[1 or 1, 1, 6, 5]", "[2, 1, 6, 5]"),
    ),
    "first image negative": Bad(sample(first_image=-1), "first_image", "at least 0", "-1"),
    "height of a model of one size": Bad(sample(height=7), "height", "0, or 6 to 6", "7"),
    "width negative": Bad(sample(width=-1), "width", "0, or 5 to 5", "-1"),
    "guidance of a model without": Bad(
        sample(labels=[0], guidance=2.0),
        *("guidance", "0 or 1 without conditioning", "2.0"),
    ),
    "guidance too large": Bad(
        sample(labels=[0], guidance=1e3), "guidance", "-100 to 100", "1000.0"
    ),
    "output dtype for requests only": Bad(
        sample(output_dtype=pb.DTYPE_U8), "output_dtype", _DTYPES, "4"
    ),
    "labels wrong in number": Bad(
        sample(labels=[0, 1]), "labels", "none, 1 or 1 values", "2 values"
    ),
    "label too large": Bad(sample(labels=[3]), "labels", "-1 to 2", "3"),
    "label to an unlabelled model": Bad(
        sample(model="gaussian", labels=[0]), "labels", "none for an unlabelled model", "0"
    ),
    "window even": Bad(sample(windows=[2]), "windows", "odd from 1 to 11", "2"),
    "window 0": Bad(sample(windows=[0]), "windows", "odd and positive", "0"),
    "windows wrong in number": Bad(
        sample(count=3, windows=[1, 3]), "windows", "none, 1 or 3 values", "2 values"
    ),
}
