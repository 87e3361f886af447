"""Settings under which a flow runs in this process. Must be applied before prefect is imported.

Whatever the user has set wins. Without PREFECT_API_URL Prefect starts its embedded API.
"""

import logging
import os

_DEFAULTS = {
    # The first start on a fresh PREFECT_HOME migrates its database: more than the default 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Prefect's client reports its first import, from a terminal, to a service of its makers.
    "DO_NOT_TRACK": "1",
    "PREFECT_CLIENT_MAX_RETRIES": "10",
    # With the setting alone INFO lines of our loggers are lost: `prepare` sets their level too.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "glm_quant",
    # A source is opened, and may have to be asked twice, before there is a flow to log to.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# What the server and the worker have besides, and with them every run that the worker starts.
_SERVICE = {
    # A silent run is noticed after five of these. The least that Prefect takes is 30.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_WORKER_QUERY_SECONDS": "5",
    # How long a run must have been quiet after its crash before it starts again by itself.
    "GLM_QUANT_RESTART_SECONDS": "60",
}
# The folder that relative paths of deployments are relative to; prefect.yaml names it.
HOME_VARIABLE = "GLM_QUANT_HOME"


def _spare_this_machine_the_proxy() -> None:
    """Let no proxy come between Prefect and a server on this machine.

    Prefect's websockets take HTTPS_PROXY even for these, and no run starts without them.
    """
    names = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [*filter(None, names.split(",")), "127.0.0.1", "localhost"]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys(hosts))


def prepare(verbose: bool = False) -> None:
    """Set the defaults. Unless `verbose`, the terminal belongs to the summary, not to log lines."""
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    _spare_this_machine_the_proxy()
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    logging.getLogger("glm_quant").setLevel(logging.INFO)


def prepare_service() -> None:
    """Set the defaults of a process that serves; its log lines are what it has to say."""
    for key, value in _SERVICE.items():
        os.environ.setdefault(key, value)
    prepare(verbose=True)
