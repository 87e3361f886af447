"""Which Prefect server a command talks to, so that one process need not be told what another knows.

The address in PREFECT_API_URL comes first: from the environment (empty means: no server), else from
the Prefect profile, where `glm-quant server --save-address` writes it. Without one it is the
address at which `glm-quant server` listens unless it is told otherwise, if a server answers there.
"""

import os
from urllib.parse import urlsplit

from glm_quant.errors import ServiceError

VARIABLE = "PREFECT_API_URL"
DEFAULT_API = "http://127.0.0.1:4200/api"
_SECONDS_TO_ANSWER = 5.0


def connect() -> str:
    """Make Prefect in this process, and in those that it starts, talk to the server that is there.

    Raises:
        ServiceError: none answers.
    """
    api = configured_address() or DEFAULT_API
    if not answers(api):
        raise _no_server(api)
    use_address(api)
    return api


def connect_if_there() -> str | None:
    """As `connect`; where no server answers, Prefect starts a temporary one.

    Returns:
        What a person should know about the server that was not there, if anything.

    Raises:
        ServiceError: the address in the environment, which was given for this command, is silent.
    """
    api = configured_address()
    if api is None and VARIABLE not in os.environ and answers(DEFAULT_API):
        use_address(DEFAULT_API)
    elif api and not answers(api):
        if os.environ.get(VARIABLE):
            raise _no_server(api)
        use_address("")
        return (
            f"{api}, the server of your Prefect profile, does not answer: a temporary one is used."
        )
    return None


def configured_address() -> str | None:
    """Return the address that the environment or the Prefect profile has, or None."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or None


def use_address(api: str) -> None:
    """Set the address for this process, its threads and its children; "" for no server."""
    from prefect.context import refresh_global_settings_context

    os.environ[VARIABLE] = api
    refresh_global_settings_context()


def save_address(api: str) -> None:
    """Write an address into the Prefect profile in use, as `prefect config set` does."""
    from prefect.settings import PREFECT_API_URL
    from prefect.settings.profiles import update_current_profile

    update_current_profile({PREFECT_API_URL: api})


def answers(api: str, seconds: float = _SECONDS_TO_ANSWER) -> bool:
    """Whether a Prefect server answers at an address."""
    import httpx

    # A proxy knows nothing of a server on this machine.
    local = urlsplit(api).hostname in ("127.0.0.1", "localhost", "::1")
    try:
        answer = httpx.get(f"{api}/health", timeout=seconds, trust_env=not local)
    except httpx.HTTPError:
        return False
    return answer.is_success and answer.text == "true"


def _no_server(api: str) -> ServiceError:
    return ServiceError(
        f"{api}: no Prefect server answers there. Start one with `glm-quant server`, or give the "
        f"address of the one to use in {VARIABLE}."
    )
