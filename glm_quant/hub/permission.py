"""Who we are on the Hub, and where that allows to create a repository.

The answers of `/api/whoami-v2` are those of hub's own client library: a user with organizations,
each with `roleInOrg`, and the token with a `role` (read, write, or fineGrained with its scopes).
"""

from collections.abc import Mapping
from typing import Any

from glm_quant.errors import PublishError

_WRITING_ROLES = {"admin", "write", "contributor"}
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."


def require_writing_token(uri: str, identity: Mapping[str, Any]) -> None:
    """Refuse a token that can only read.

    Raises:
        PublishError: names the token and its owner.
    """
    token = _token(identity)
    if token.get("role") == "read":
        raise PublishError(
            f"{uri}: the token {token.get('displayName', '')!r} of {identity.get('name')} may only "
            "read. Make one that may write at https://huggingface.co/settings/tokens. " + _LOG_IN
        )


def require_namespace(uri: str, repo: str, identity: Mapping[str, Any]) -> None:
    """Refuse a repository that is to be created where we may not.

    Raises:
        PublishError: the namespace is of somebody else, or our role or token allows no writing.
    """
    owner, name = repo.split("/")[0], str(identity.get("name"))
    roles = {str(org.get("name")): org.get("roleInOrg") for org in identity.get("orgs", ())}
    role = "admin" if owner == name else roles.get(owner, "none")
    # An answer without roles, as of an older Hub, forbids nothing.
    if role is not None and role not in _WRITING_ROLES:
        places = ", ".join([name, *(org for org, r in roles.items() if r in _WRITING_ROLES)])
        raise PublishError(
            f"{uri}: there is no repository {repo}, and {name} may not create one: its role in "
            f"{owner} is {role}. Publish to one of: {places}; or log in as somebody else."
        )
    scopes = _token(identity).get("fineGrained")
    if isinstance(scopes, Mapping) and not _may_create(scopes, repo):
        raise PublishError(
            f"{uri}: there is no repository {repo}, and the fine-grained token "
            f"{_token(identity).get('displayName', '')!r} of {name} may not write for {owner}. "
            "Allow it at https://huggingface.co/settings/tokens, or use another token."
        )


def _may_create(scopes: Mapping[str, Any], repo: str) -> bool:
    """Whether a fine-grained token may write for the owner of a repository, or to all of them."""
    permissions = list(scopes.get("global", ()))
    for scope in scopes.get("scoped", ()):
        if scope.get("entity", {}).get("name") in (repo, repo.split("/")[0]):
            permissions += scope.get("permissions", ())
    return "repo.write" in permissions


def _token(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    return identity.get("auth", {}).get("accessToken") or {}
