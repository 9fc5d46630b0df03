"""Computes when the requests of an open loop are due.

The times are a pure function of (config, level, index), so that all client processes agree on them
without a word.

Knows: gamma-distributed gaps, the ramp, and the timestamps of a trace. Knows nothing of clocks.
"""

from math import inf, sqrt

import numpy as np

from loadgen import traces
from loadgen.records import RunConfig

_BLOCK = 1024
_STREAM = 2  # the warm-up and the measurement draw prompts from the streams 1 and 0


class Arrivals:
    """The times at which the requests of one level are due."""

    def __init__(self, config: RunConfig, level: int) -> None:
        self._config = config
        rate = config.loads[level].request_rate
        self._rate = rate or 0.0
        self._rng = np.random.default_rng([config.seed, level, _STREAM])
        self._sums = np.zeros(0)
        """Sum of the gaps up to each request, in a process of one request per second."""

    def at(self, index: int) -> float:
        """Return the seconds from the start of the level at which request `index` is due.

        The gaps between requests are gamma-distributed with the mean 1 / rate, and `burstiness` is
        the shape: 1 gives a Poisson process, less is burstier, and infinity gives equal gaps. While
        the rate ramps up, the same gaps are longer.
        """
        if (trace := self._config.trace) is not None:
            arrivals = traces.read(trace.path)
            waited_ms = arrivals[index].timestamp - arrivals[0].timestamp
            return waited_ms / 1e3 / trace.speedup
        while index >= len(self._sums):
            so_far = self._sums[-1] if len(self._sums) else 0.0
            self._sums = np.append(self._sums, so_far + np.cumsum(self._gaps()))
        return self._stretched(float(self._sums[index]))

    def _gaps(self) -> np.ndarray:
        shape = self._config.burstiness
        return np.ones(_BLOCK) if shape == inf else self._rng.gamma(shape, 1 / shape, _BLOCK)

    def _stretched(self, requests: float) -> float:
        """Return the seconds until which `requests` requests are expected: the inverse of the
        integral of the rate, which grows from 0 to the full rate during the ramp."""
        ramp_s = self._config.ramp_up_s
        of_ramp = self._rate * ramp_s / 2
        if requests < of_ramp:
            return sqrt(2 * ramp_s * requests / self._rate)
        return ramp_s + (requests - of_ramp) / self._rate
