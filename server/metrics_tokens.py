"""Metrics of each single token: plain numbers, since there are thousands of them in a second.

Counters and histograms of the client library take 10 us of every token, most of it for locks.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class TokenCounts(Collector):
    """How many tokens were made, and the times between them. The event loop alone may write."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = bounds_s
        self._gaps = [0] * (len(bounds_s) + 1)
        self._gaps_s = 0.0
        self.num_tokens = 0

    def note_gap(self, gap_s: float, num_tokens: int) -> None:
        """Tokens that came so long after the last one of their choice; they share the time."""
        self._gaps[bisect_left(self._bounds_s, gap_s / num_tokens)] += num_tokens
        self._gaps_s += gap_s

    def collect(self) -> Iterator[Metric]:
        """All so far."""
        name, text = "infmoe_generated_tokens", "Generated tokens"
        yield CounterMetricFamily(name, text, value=self.num_tokens)
        bounds = [*(str(float(bound_s)) for bound_s in self._bounds_s), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._gaps), strict=True))
        name, text = "infmoe_inter_token_seconds", "Between tokens of one choice"
        yield HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._gaps_s)
