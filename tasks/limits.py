"""How long a task may take, where nothing else ends it.

Most of what can hang has a bound of its own, which says more than a clock: fetching and HTTP
requests notice silence (`glm_quant.hub`: 30 s for a source, 180 s for a target) and give up after
minutes of tries; Prefect's client waits a minute for its server. So `quantize`, `parity` and
`divergence` have no limit here: they may take days, and whatever of them waits is bounded there.

These are for the rest: a native upload (Xet), a child process, a watch that must not outlast the
next one. Prefect ends a task of the flow's own thread when its native code returns; a task of
another thread it cannot end, so whoever waits for uploads beside the conversion stops waiting.
"""

from glm_quant.build import Build

_HOUR_SECONDS = 3600
# Slower than any line over which somebody would send hundreds of gigabytes.
_SLOWEST_BYTES_PER_SECOND = 500_000
# A watch is scheduled hourly, and may be asked to wait twice for a quarter of an hour.
LOOK_SECONDS = 50 * 60
# Evaluation measures with some ten thousand tokens; a quarter of a token a second would do.
EVALUATE_SECONDS = 24 * _HOUR_SECONDS


def send_seconds(size_bytes: int) -> float:
    """Return how long so many bytes may be on their way, all tries included."""
    return 2 * _HOUR_SECONDS + size_bytes / _SLOWEST_BYTES_PER_SECOND


def shard_seconds(build: Build, shard: int) -> float:
    """Return how long one output shard may be on its way."""
    return send_seconds(build.plan.shards[shard].size_bytes)


def build_seconds(build: Build) -> float:
    """Return how long a whole build may be on its way."""
    return send_seconds(sum(shard.size_bytes for shard in build.plan.shards))
