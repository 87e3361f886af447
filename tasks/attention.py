"""What a person should see while a run goes on: in the terminal, in the log, on the run's page."""

import logging

from prefect.artifacts import create_markdown_artifact

_log = logging.getLogger("glm_quant.attention")


def tell_problem(key: str, text: str) -> None:
    """Tell of something that will fail the run in the end if nobody corrects it.

    Args:
        key: of the artifact on the run's page: lowercase letters, digits and dashes.
        text: what is wrong, whether the run goes on, and the way out.
    """
    _log.warning("%s", text)
    try:
        create_markdown_artifact(f"## To be corrected\n\n{text}", key=key, description=text)
    except Exception as error:  # the page is a convenience: the run does not need it
        _log.warning("the run's page lacks this: %s", error)
