"""Cost model of batches: estimates of the denoiser, corrected by measured times.

    seconds = fixed + rate · estimate

The line is fitted to the batches seen, each weighing less than the one after it (weighted least
squares): a slower machine, a busy neighbour or a wrong estimate is learned in a few batches.
"""

from __future__ import annotations

_DECAY = 0.9
"""Weight of the past at each batch: the last ten or so count."""
_ENOUGH = 3
"""Batches after which a prediction may be held against a caller."""
_STALE_S = 10.0
"""Without a batch for so long a prediction is not held against anybody: asking is how it learns."""
_FAR = 4.0
"""So many times the time allowed, and a prediction counts even if nothing was measured lately."""
_TELLING_S = 0.01
"""Overheads of a question that takes this long are a small part of it."""
_SPREAD = 0.05
"""Least relative variance of the estimates seen from which a slope can be told."""


class CostModel:
    """Predicts the seconds of batches of one model."""

    def __init__(self) -> None:
        self._fixed, self._rate = 0.0, 1.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._error = 0.0
        self._seen = 0
        self._last = 0.0

    def seconds(self, estimate: float) -> float:
        """Return the predicted seconds of a batch that the denoiser estimates at ``estimate``."""
        return self._fixed + self._rate * estimate

    def marginal(self, estimate: float) -> float:
        """Return the predicted seconds that ``estimate`` adds to a batch."""
        return self._rate * estimate

    @property
    def fixed_s(self) -> float:
        """Predicted seconds of a batch however small: what batching saves."""
        return self._fixed

    def upper_bound(self, estimate: float) -> float:
        """Return seconds that a batch exceeds seldom: the prediction and its usual error twice."""
        return self.seconds(estimate) * (1 + 2 * self._error)

    def is_calibrated(self, now: float) -> bool:
        """Return whether enough was seen, lately enough, to refuse a query by prediction."""
        return self._seen >= _ENOUGH and now - self._last < _STALE_S

    def may_refuse(self, estimate: float, allowed_s: float, now: float) -> bool:
        """Return whether a query may be refused by prediction.

        It may once the prediction is ``trusted``, and before that if estimate and prediction both
        exceed the time allowed several times: neither is wrong by so much, and a wrong one of them
        alone cannot shut callers out for ever.

        Args:
            estimate: seconds of the work itself by the denoiser's estimate, waiting left out.
            allowed_s: until the deadline.
            now: on the clock that ``learn`` is given.
        """
        return self.is_calibrated(now) or min(estimate, self.seconds(estimate)) > _FAR * allowed_s

    def calibrate(self, estimate: float, seconds: float) -> None:
        """Take in how long a first, small question took, before anything was learned.

        A short one shows that a machine is faster than was estimated, but not that it is slower:
        it has overheads which large ones do not repeat.
        """
        if not self._seen and estimate > 0:
            rate = seconds / estimate
            self._rate = rate if seconds > _TELLING_S else min(1.0, rate)

    def learn(self, estimate: float, seconds: float, now: float) -> None:
        """Take in that a batch estimated at ``estimate`` took ``seconds``."""
        estimate = max(estimate, 1e-9)
        if self._seen:
            predicted = self.seconds(estimate)
            # A pause of the machine is no property of the model.
            seconds = min(seconds, 4 * predicted + 0.01)
            error = abs(seconds - predicted) / max(predicted, 1e-6)
            self._error += (1 - _DECAY) * (min(error, 1.0) - self._error)
        self._seen, self._last = self._seen + 1, now
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
