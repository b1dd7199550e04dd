"""Metrics of the disk that adapters are kept on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class DiskCollector(Collector):
    """Room on the disk of a folder; nothing while that cannot be told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """The room as it is now."""
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:  # it was taken away: what the store cannot read it tells itself
            return
        gauges = {
            "infmoe_adapter_disk_free_bytes": ("Free bytes on the disk of adapters", usage.free),
            "infmoe_adapter_disk_size_bytes": ("Bytes of the disk of adapters", usage.total),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
