"""What /metrics says, in the text form of Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from graftkit.serve.engine import Engine

_ROUTES = (
    *("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/health", "/ready", "/metrics"),
)


class ServerMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "graftkit_requests", "Requests.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "graftkit_request_seconds",
            "Time until a request was answered in full.",
            ["route"],
            registry=self._registry,
        )
        self._routed = Counter(
            "graftkit_routed", "Decisions of the router.", ["pack"], registry=self._registry
        )
        self._registry.register(self)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        route = path if path in _ROUTES else "other"
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_routed(self, pack: str) -> None:
        """Count one decision of the router."""
        self._routed.labels(pack).inc()

    def collect(self) -> Iterable[Metric]:
        """The state of the engine now; the registry calls this."""
        counts, (running, waiting) = self._engine.counts, self._engine.load_counts
        tokens = CounterMetricFamily("graftkit_tokens", "Tokens.", labels=["kind"])
        tokens.add_metric(["prompt"], counts.prompt_tokens)
        tokens.add_metric(["answer"], counts.answer_tokens)
        finished = CounterMetricFamily("graftkit_finished", "Ended answers.", labels=["reason"])
        for reason, count in dict(counts.finished).items():
            finished.add_metric([reason], count)
        nbytes = GaugeMetricFamily("graftkit_pack_bytes", "Packs in memory.", labels=["pack"])
        for name, pack in self._engine.packs.items():
            nbytes.add_metric([name], pack.nbytes)
        cache = self._engine.decoder.cache.nbytes
        return [
            tokens,
            finished,
            nbytes,
            GaugeMetricFamily("graftkit_running", "Answers that are generated.", value=running),
            GaugeMetricFamily("graftkit_waiting", "Answers that wait for a slot.", value=waiting),
            GaugeMetricFamily("graftkit_cache_bytes", "Keys and values in memory.", value=cache),
        ]

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)
