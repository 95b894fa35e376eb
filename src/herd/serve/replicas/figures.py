"""One page of figures for Prometheus, of the front and all replicas.

How many responses there were and how long they took is the front's to say, who sees them as users do; everything else
is counted where the models are, and has a label `replica`; so has what each process takes, the front as "front". Sums
over that label are Prometheus' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_OF_THE_FRONT = ("herd_responses", "herd_request_seconds")
_OF_PROCESSES = "process_"


def merged(front: bytes, replicas: Mapping[int, bytes]) -> bytes:
    """All of it in Prometheus' text form; `replicas` has the pages of those that could be reached, by number."""
    found = {
        family.name: family for family in _families(front) if family.name.removesuffix("_created") in _OF_THE_FRONT
    }
    labelled = [(str(number), family) for number, page in replicas.items() for family in _families(page)]
    labelled += [("front", family) for family in _families(front) if family.name.startswith(_OF_PROCESSES)]
    for replica, family in labelled:
        if family.name.removesuffix("_created") not in _OF_THE_FRONT:
            whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                whole.samples.append(sample._replace(labels=labels))
    registry = CollectorRegistry()
    registry.register(_Found(found.values()))
    return generate_latest(registry)


def _families(page: bytes) -> Iterable[Metric]:
    return text_string_to_metric_families(page.decode())


class _Found(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
