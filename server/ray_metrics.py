"""Metrics of all replicas in one answer."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message


class Merged:
    """Families of several servers, their samples told apart by the label `replica`."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def add(self, replica: str, text: str) -> None:
        """Take in what one server tells."""
        for family in text_string_to_metric_families(text):
            kind = Metric(family.name, family.documentation, family.type)
            kept = self._families.setdefault(family.name, kind)
            kept.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in family.samples
            ]

    def collect(self) -> Iterator[Metric]:
        """All families, as a registry wants them."""
        yield from self._families.values()


def merge_metrics(replies: Sequence[list[Message]]) -> list[Message]:
    """One reply of those of all replicas; one that is no success stands for all.

    Replicas are told apart by the header x-replica, which `server.ray_replica` adds.
    """
    merged = Merged()
    for reply in replies:
        if reply[0]["status"] != 200:
            return reply
        headers = dict(reply[0]["headers"])
        text = b"".join(message.get("body", b"") for message in reply[1:]).decode()
        merged.add(headers[b"x-replica"].decode(), text)
    registry = CollectorRegistry()
    registry.register(merged)
    head, body = replies[0][0], generate_latest(registry)
    dropped = (b"content-length", b"x-replica")
    kept = [(name, value) for name, value in head["headers"] if name not in dropped]
    return [
        {**head, "headers": [*kept, (b"content-length", str(len(body)).encode())]},
        {"type": "http.response.body", "body": body},
    ]
