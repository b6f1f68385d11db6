"""The figures of a gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.gateway_nodes import Nodes


class GatewayMetrics(Collector):
    """What is counted, and what is known of the nodes."""

    def __init__(self, nodes: Nodes, clock: Callable[[], float]) -> None:
        self._nodes = nodes
        self._clock = clock
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "livebrush_gateway_requests",
            "Requests by what they are about and the status that was answered",
            ["about", "status"],
            registry=self.registry,
        )
        self.passed_over = Counter(
            "livebrush_gateway_passed_over",
            "Nodes that a request was not answered by, and was tried on another: refused or lost",
            ["why"],
            registry=self.registry,
        )
        self.redirects = Counter(
            "livebrush_gateway_redirects", "WHIP and WHEP requests sent to a node's own URL", registry=self.registry
        )
        self.refused = Counter(
            "livebrush_gateway_connections_refused", "Connections not kept", ["reason"], registry=self.registry
        )
        self.faults = Counter("livebrush_gateway_faults", "Requests that failed here", registry=self.registry)
        self.sockets = 0
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The nodes, by their URLs."""
        names = ["node"]
        up = GaugeMetricFamily("livebrush_gateway_node_up", "Whether the node is used", labels=names)
        drains = GaugeMetricFamily("livebrush_gateway_node_draining", "Whether it is being emptied", labels=names)
        seats = GaugeMetricFamily("livebrush_gateway_node_seats", "Its seats, as last heard", labels=names)
        taken = GaugeMetricFamily("livebrush_gateway_node_open", "Its sessions, as last heard", labels=names)
        age = GaugeMetricFamily("livebrush_gateway_node_age_seconds", "Since its last answer", labels=names)
        failed = CounterMetricFamily("livebrush_gateway_polls_failed", "Polls that it did not answer", labels=names)
        for node in self._nodes.all:
            up.add_metric([node.url], float(node.is_up))
            failed.add_metric([node.url], node.polls_failed)
            if node.report is not None:
                drains.add_metric([node.url], float(node.report.draining))
                seats.add_metric([node.url], node.report.seats)
                taken.add_metric([node.url], node.report.open)
                age.add_metric([node.url], self._clock() - node.answered_at)
        yield from (up, drains, seats, taken, age, failed)
        yield GaugeMetricFamily("livebrush_gateway_sockets", "WebSockets that go through here", value=self.sockets)
