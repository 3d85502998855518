"""Cost model of batches: estimates of the denoiser, corrected by measured times.

    seconds = fixed + rate · estimate

The line is fitted to past batches by least squares with decaying weights, so that a few batches
suffice to learn a slower machine, a busy neighbour or a wrong estimate.
"""

from __future__ import annotations

_DECAY = 0.9
"""Factor of past weights at each batch: about the last ten count."""
_ENOUGH = 3
"""Batches after which a query may be rejected by prediction."""
_STALE_S = 10.0
"""Seconds without a batch after which no query is rejected by prediction, so that it can adapt."""
_STALE_BATCHES = 4
"""The same in durations of the last batch, if that is longer."""
_FAR = 2.5
"""Multiple of the time allowed from which a prediction counts even without recent batches.

Estimates are within a factor of two of what is measured.
"""
_INFORMATIVE_S = 0.01
"""Seconds of a query from which overheads are a small part of it."""
_SPREAD = 0.05
"""Minimum relative variance of past estimates for fitting a slope."""


class CostModel:
    """Predicts the seconds of batches of one model."""

    def __init__(self) -> None:
        self._fixed, self._rate = 0.0, 1.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._error = 0.0
        self._seen = 0
        self._last = self._last_s = 0.0

    def seconds(self, estimate: float) -> float:
        """Return the predicted seconds of a batch that the denoiser estimates at ``estimate``."""
        return self._fixed + self._rate * estimate

    def marginal(self, estimate: float) -> float:
        """Return the predicted seconds that ``estimate`` adds to a batch."""
        return self._rate * estimate

    @property
    def fixed_s(self) -> float:
        """Predicted seconds of the smallest batch: what batching saves."""
        return self._fixed

    def upper_bound(self, estimate: float) -> float:
        """Return the prediction plus twice its typical relative error."""
        return self.seconds(estimate) * (1 + 2 * self._error)

    def is_calibrated(self, now: float) -> bool:
        """Return whether enough recent batches are known to reject a query by prediction."""
        stale_s = max(_STALE_S, _STALE_BATCHES * self._last_s)
        return self._seen >= _ENOUGH and now - self._last < stale_s

    def may_reject(self, estimate: float, allowed_s: float, now: float) -> bool:
        """Return whether a query may be rejected by prediction.

        It may if the model ``is_calibrated``, and before that if both estimate and prediction
        exceed the time allowed several times: neither is wrong by that much, and a single wrong
        one cannot reject callers for ever.

        Args:
            estimate: the denoiser's estimate in seconds, without waiting.
            allowed_s: seconds until the deadline.
            now: time on the clock of ``learn``.
        """
        return self.is_calibrated(now) or min(estimate, self.seconds(estimate)) > _FAR * allowed_s

    def calibrate(self, estimate: float, seconds: float) -> None:
        """Learn from the duration of a first, small query; no effect after ``learn``.

        A short query can show that a machine is faster than estimated, but not that it is slower:
        its overheads are not proportional to the work.
        """
        if not self._seen and estimate > 0:
            rate = seconds / estimate
            self._rate = rate if seconds > _INFORMATIVE_S else min(1.0, rate)

    def learn(self, estimate: float, seconds: float, now: float) -> None:
        """Learn that a batch estimated at ``estimate`` took ``seconds``."""
        estimate = max(estimate, 1e-9)
        if self._seen:
            predicted = self.seconds(estimate)
            # Limited, because a pause of the machine is not a property of the model.
            seconds = min(seconds, 4 * predicted + 0.01)
            error = abs(seconds - predicted) / max(predicted, 1e-6)
            self._error += (1 - _DECAY) * (min(error, 1.0) - self._error)
        self._seen, self._last, self._last_s = self._seen + 1, now, seconds
        self._weight = _DECAY * self._weight + 1
        self._x = _DECAY * self._x + estimate
        self._y = _DECAY * self._y + seconds
        self._xx = _DECAY * self._xx + estimate * estimate
        self._xy = _DECAY * self._xy + estimate * seconds
        self._fit()

    def _fit(self) -> None:
        x, y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - x * x
        self._fixed, self._rate = 0.0, y / x
        if variance > _SPREAD * x * x:
            rate = (self._xy / self._weight - x * y) / variance
            fixed = y - rate * x
            if rate > 0 and fixed > 0:
                self._fixed, self._rate = fixed, rate
