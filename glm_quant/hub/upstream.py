"""What upstream has today: the commit of a branch, and models that may be of interest."""

import re

import httpx2
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from glm_quant.errors import SourceError
from glm_quant.hub.huggingface import HubSource, hub_client, limit_time
from glm_quant.hub.retry import Patience

# Whoever looks every hour need not insist.
_PATIENCE = Patience(tries=3, first_seconds=2.0)
_MOST_MODELS = 200


def pinned(repo: str, revision: str = "main", patience: Patience = _PATIENCE) -> str:
    """Return `hf://org/name@commit`: what a branch or tag points to now.

    Raises:
        SourceError: no such repository or revision (any more), no access, or no answer.
    """
    return HubSource(repo, revision, patience=patience).uri


def family(author: str, pattern: str) -> list[str]:
    """Return the author's models whose name matches a regular expression, newest first.

    Raises:
        SourceError: the pattern is none, or the Hub does not answer.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise SourceError(f"{pattern}: this is no regular expression ({error}).") from None
    limit_time()
    try:
        found = hub_client().list_models(author=author, sort="created_at", limit=_MOST_MODELS)
        names = [str(model.id) for model in found]
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled) as error:
        raise SourceError(
            f"{author}: the Hub gave no list of models ({type(error).__name__}). It is asked again "
            "next time."
        ) from None
    return [name for name in names if wanted.fullmatch(name.rpartition("/")[2])]
