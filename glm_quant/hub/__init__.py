"""Where checkpoints come from and where finished builds go: the Hub, S3, folders."""

from pathlib import Path

from glm_quant.checkpoint.source import FolderSource, Source
from glm_quant.errors import PublishError, SourceError
from glm_quant.hub.retry import Patience
from glm_quant.hub.target import Target
from glm_quant.hub.window import DEFAULT_WINDOW
from glm_quant.recipe import PublishSettings
from glm_quant.workspace import Workspace

__all__ = ["DEFAULT_WINDOW", "open_source", "open_target"]


def open_source(
    uri: str, workspace: Workspace | None = None, window: int = DEFAULT_WINDOW
) -> Source:
    """Return the source that a URI or a path names.

    Args:
        uri: a folder, file://folder, hf://org/name[@revision] or s3://bucket[/prefix].
        workspace: of the build; fetched shards stand there for a while, and a build of a branch
            that was begun goes on with its commit. Without it a remote source can be read by range
            only. A local folder needs none.
        window: how many fetched shards may be on disk at a time.

    Raises:
        SourceError: the scheme is not known, or there is no checkpoint.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return FolderSource(Path(uri).expanduser())
    if scheme == "file":
        return FolderSource(Path(uri.removeprefix("file://")))
    if scheme == "hf":
        from glm_quant.hub.pin import open_hub

        return open_hub(uri, workspace, window)
    if scheme == "s3":
        from glm_quant.hub.s3 import S3Source, parse_s3_uri

        return S3Source(*parse_s3_uri(uri), workspace and workspace.source, window)
    raise SourceError(
        f"{uri}: there are no sources of kind {scheme}://. Give a folder, hf://org/name@revision "
        "or s3://bucket/prefix."
    )


def open_target(
    uri: str,
    build_id: str,
    settings: PublishSettings | None = None,
    patience: Patience | None = None,
) -> Target:
    """Return the target that a URI or a path names. Nothing is asked yet.

    Args:
        uri: a folder, file://folder, hf://org/name[@branch] or s3://bucket[/prefix].
        build_id: names the build where it is uploaded out of sight.
        settings: the recipe's; default: the defaults.
        patience: how often to try; default: minutes.

    Raises:
        PublishError: the scheme is not known, or the URI is malformed.
    """
    settings = settings or PublishSettings()
    scheme, separator, rest = uri.partition("://")
    try:
        if scheme == "hf" and separator:
            from glm_quant.hub.huggingface import parse_hub_uri
            from glm_quant.hub.repository import HubTarget

            return HubTarget(
                *parse_hub_uri(uri),
                build_id=build_id,
                private=settings.private,
                patience=patience,
            )
        if scheme == "s3" and separator:
            from glm_quant.hub.bucket import S3Target
            from glm_quant.hub.s3 import parse_s3_uri

            return S3Target(
                *parse_s3_uri(uri),
                build_id=build_id,
                keep_previous=settings.keep_previous,
                patience=patience,
            )
    except SourceError as error:
        raise PublishError(str(error)) from None
    if separator and scheme != "file":
        raise PublishError(
            f"{uri}: there are no targets of kind {scheme}://. Give a folder, hf://org/name or "
            "s3://bucket/prefix."
        )
    from glm_quant.hub.folder import FolderTarget

    return FolderTarget(Path(rest if separator else uri), build_id)
