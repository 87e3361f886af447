"""Looking upstream: what was last built from is in a Prefect variable, what is new on the Hub.

A build is asked for with an idempotency key that counts the moves, so a look that is repeated or
dies half-way never builds the same thing twice, and upstream may also go back to where it was.
"""

import logging
import re
from typing import Any, Literal, cast

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.variables import Variable
from pydantic import BaseModel, ConfigDict, Field

from glm_quant.errors import ServiceError, SourceError
from glm_quant.hub.upstream import family as models_of
from glm_quant.hub.upstream import pinned
from tasks.limits import LOOK_SECONDS
from tasks.naming import short_source
from tasks.secrets import load_secrets

_log = logging.getLogger("glm_quant.upstream")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Watched(_Part):
    """A repository, and what is built from it."""

    repo: str = Field(description="org/name on the Hub", pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(default="main", description="branch or tag to follow")
    deployments: tuple[str, ...] = Field(description="deployments to run when it has moved")


class Family(_Part):
    """Models that are proposed, not built."""

    author: str = Field(description="organization on the Hub")
    pattern: str = Field(description="regular expression on the model's name")


class WatchSpec(_Part):
    """What to watch. Small and plain, so that it can be a Prefect parameter."""

    watched: tuple[Watched, ...] = Field(description="repositories to build from")
    families: tuple[Family, ...] = Field(default=(), description="new models to tell about")
    first: Literal["note", "build"] = Field(
        default="note", description="what to do at the first look at a repository"
    )

    def pairs(self) -> list[tuple["Look", str]]:
        """Return each repository with each of its deployments."""
        return [
            (Look(repo=place.repo, revision=place.revision, first=self.first), deployment)
            for place in self.watched
            for deployment in place.deployments
        ]

    def repos(self) -> list[str]:
        """Return the watched repositories."""
        return [place.repo for place in self.watched]


class Look(_Part):
    """One repository to look at."""

    repo: str
    revision: str
    first: Literal["note", "build"]


class LookResult(_Part):
    """What a look came to, in words for a person."""

    repo: str
    deployment: str
    commit: str
    did: str


@task(
    name="look",
    task_run_name="{where.repo} for {deployment}",
    persist_result=False,
    cache_policy=NO_CACHE,
    timeout_seconds=LOOK_SECONDS,
)
def look(where: Look, deployment: str) -> LookResult:
    """Compare with the last look, and run the deployment if upstream has moved."""
    logging.getLogger("glm_quant").setLevel(logging.INFO)
    load_secrets()
    try:
        now = pinned(where.repo, where.revision)
    except SourceError as error:
        _log.warning("%s; it is looked at again next time", error)
        return LookResult(
            repo=where.repo, deployment=deployment, commit="", did=f"not seen: {error}"
        )
    name = variable_name(where, deployment)
    last = cast("dict[str, Any] | None", Variable.get(name))
    if last and last["uri"] == now:
        did = "nothing new"
    elif last is None and where.first == "note":
        Variable.set(name, {"uri": now, "moves": 0}, overwrite=True)
        did = "noted: the first look"
    else:
        moves = last["moves"] + 1 if last else 1
        run = build_from(now, deployment, f"{name}:{moves}:{now}")
        Variable.set(name, {"uri": now, "moves": moves}, overwrite=True)
        did = f"moved: build {run} was asked for"
    _log.info("%s for %s: %s", short_source(now), deployment, did)
    return LookResult(repo=where.repo, deployment=deployment, commit=now.partition("@")[2], did=did)


@task(
    name="propose",
    task_run_name="models of {family.author}",
    persist_result=False,
    cache_policy=NO_CACHE,
    timeout_seconds=LOOK_SECONDS,
)
def propose(family: Family, known: list[str]) -> list[str]:
    """Return models of a family that nobody watches."""
    try:
        models = models_of(family.author, family.pattern)
    except SourceError as error:
        _log.warning("%s", error)
        return []
    proposals = [name for name in models if name not in known]
    if proposals:
        _log.info("not watched, to be built by hand: %s", ", ".join(proposals))
    return proposals


def show_upstream(results: list[LookResult], proposals: list[list[str]]) -> None:
    """Show what the looks of a run came to, and the proposals, as a table in the UI."""
    rows = [result.model_dump() for result in results]
    rows += [
        {"repo": name, "deployment": "", "commit": "", "did": "not watched: a proposal"}
        for names in proposals
        for name in names
    ]
    create_table_artifact(rows, key="upstream", description="What upstream has")


def build_from(uri: str, deployment: str, key: str) -> str:
    """Run a deployment with another source, once for a key; returns the run's name.

    Raises:
        ServiceError: there is no such deployment, or it builds nothing.
    """
    with get_client(sync_client=True) as client:
        try:
            parameters = client.read_deployment_by_name(deployment).parameters
        except (ObjectNotFound, ValueError):
            raise ServiceError(
                f"{deployment}: there is no such deployment. Write FLOW/NAME as `prefect "
                "deployment ls` shows it, and correct `deployments` of the watch."
            ) from None
    spec = cast("dict[str, Any]", parameters.get("spec"))
    run = run_deployment(
        deployment,
        parameters={"spec": {**spec, "source": uri}},
        idempotency_key=key,
        timeout=0,
        as_subflow=False,
        tags=["upstream"],
    )
    return cast("Any", run).name


def variable_name(where: Look, deployment: str) -> str:
    """Return the variable that holds what a deployment was last built from."""
    words = f"upstream {deployment} {where.repo} {where.revision}"
    return "glm_quant_" + re.sub(r"[^a-z0-9]+", "_", words.lower())
