"""What a run shows in the UI besides its progress: tables, the card, links.

Everything is read from records, so it can be shown again at any time; that it cannot be shown now
(the server is away) never stops a build.
"""

import logging
import re
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from glm_quant.build import Build
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.card import CardStage
from glm_quant.stages.divergence import AssessDivergenceStage, DivergenceStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import AssessParityStage, ParityStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.publish import PublishStage
from tasks import evidence

_log = logging.getLogger("glm_quant.report")


Show = Callable[[Build], None]


@task(name="report", task_run_name="report the plan", persist_result=False, cache_policy=NO_CACHE)
def report_plan(build: Build) -> None:
    """Show what will be made of what."""
    _show(build, _source, _plan)


@task(name="report", task_run_name="report the build", persist_result=False, cache_policy=NO_CACHE)
def report_build(build: Build) -> None:
    """Show what was made, and what was found about it."""
    _show(build, _shards, _parity, _divergence, _evaluation, _card)


@task(
    name="report",
    task_run_name="report what was found",
    persist_result=False,
    cache_policy=NO_CACHE,
)
def report_assessment(build: Build) -> None:
    """Show what was found about a finished build."""
    _show(build, _source, _assessed_parity, _assessed_divergence, _evaluation)


@task(name="report", task_run_name="report the links", persist_result=False, cache_policy=NO_CACHE)
def report_links(build: Build) -> None:
    """Show where a build was published."""
    _show(build, _published)


def _show(build: Build, *parts: Show) -> None:
    for show in parts:
        try:
            show(build)
        except Exception as error:
            _log.warning("the run's page lacks something: %s", error)


def _source(build: Build) -> None:
    page = evidence.web_page(build.checkpoint.source.uri)
    if page:
        said = f"Made from {build.checkpoint.source.uri}"
        create_link_artifact(page, link_text=page, key="source", description=said)


def _plan(build: Build) -> None:
    stage = PlanStage(build)
    record = stage.current()
    if record:
        _table("components", evidence.group_rows(record.plan), stage.summarize(record))


def _shards(build: Build) -> None:
    stage = AssembleStage(build)
    record = stage.current()
    if record:
        _table("shards", evidence.shard_rows(build), stage.summarize(record))


def _parity(build: Build) -> None:
    _comparison(ParityStage(build))


def _assessed_parity(build: Build) -> None:
    _comparison(AssessParityStage(build))


def _comparison(stage: ParityStage) -> None:
    record = stage.current()
    if record:
        _table("parity", evidence.comparison_rows(record.found), stage.summarize(record))


def _divergence(build: Build) -> None:
    _distance(DivergenceStage(build))


def _assessed_divergence(build: Build) -> None:
    _distance(AssessDivergenceStage(build))


def _distance(stage: DivergenceStage) -> None:
    record = stage.current()
    if record:
        _table("divergence", evidence.divergence_table(record), stage.summarize(record))


def _evaluation(build: Build) -> None:
    stage = EvaluationStage(build)
    record = stage.current()
    if record:
        _table("evaluation", evidence.evaluation_rows(record), stage.summarize(record))


def _card(build: Build) -> None:
    if CardStage(build).current():
        text = evidence.card_markdown(build.workspace.checkpoint)
        create_markdown_artifact(text, key="card", description="The model card with its charts")


def _published(build: Build) -> None:
    for target in build.targets:
        record = PublishStage(build, target).current()
        if record and record.url.startswith(("https://", "http://")):
            key = "published-" + re.sub(r"[^a-z0-9]+", "-", target.lower()).strip("-")
            said = f"{target}: {record.change}"
            create_link_artifact(record.url, link_text=record.url, key=key, description=said)


def _table(key: str, rows: evidence.Rows, description: str) -> None:
    create_table_artifact(list[dict[str, Any]](rows), key=key, description=description)
