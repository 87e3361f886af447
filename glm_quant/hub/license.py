"""The licence that a build is published under must be the one that its source has.

A source says it in the front matter of its README (`license`, or `license_name` where that is
"other"), or by a LICENSE file. Two licences let anybody publish derived weights, so saying their
name is enough; for any other a person has to say in the recipe that they read it.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import yaml

from glm_quant.checkpoint.source import Source
from glm_quant.errors import PublishError, SourceError
from glm_quant.recipe import PublishSettings

# What a text must contain to be one of the licences that need no acknowledgement.
_OPEN = {
    "mit": ("Permission is hereby granted, free of charge", 'THE SOFTWARE IS PROVIDED "AS IS"'),
    "apache-2.0": ("Apache License", "Version 2.0, January 2004", "Grant of Copyright License"),
}
# A licence of this length with one of the texts above in it says more than that text.
_LONGEST = {"mit": 2_000, "apache-2.0": 13_000}


@dataclass(frozen=True)
class SourceLicense:
    """What a source says of its licence.

    Attributes:
        name: by its README, or by the text of its LICENSE; None where neither tells.
        sha256: of its LICENSE file; None where there is none.
    """

    name: str | None
    sha256: str | None


def read_license(source: Source) -> SourceLicense:
    """Return what a source says of its licence.

    Raises:
        SourceError: the source cannot be read.
    """
    files = source.files()
    text = source.read("LICENSE") if "LICENSE" in files else None
    name = None
    if "README.md" in files:
        name = _front_matter_license(source.read("README.md").decode(errors="replace"))
    if name is None and text is not None:
        name = _known_text(text.decode(errors="replace"))
    return SourceLicense(name, None if text is None else hashlib.sha256(text).hexdigest())


def require_license(source: Source, settings: PublishSettings, recipe_file: str) -> None:
    """Refuse to publish under a licence that is not the source's, or that nobody acknowledged.

    Raises:
        PublishError: with what the recipe should say.
    """
    try:
        stated = read_license(source)
    except SourceError as error:
        raise PublishError(f"the source's licence could not be read: {error}") from None
    judge_license(stated, source.uri, settings, recipe_file)


def judge_license(
    stated: SourceLicense, uri: str, settings: PublishSettings, recipe_file: str
) -> None:
    """Refuse as `require_license` does, by what a source was seen to say.

    Raises:
        PublishError: with what the recipe should say.
    """
    where = f"{recipe_file}: publish"
    if stated.name is not None and stated.name != settings.license.lower():
        raise PublishError(
            f"{where}.license is {settings.license!r}, but {uri} is under {stated.name!r}. "
            f"Write `license: {stated.name}`, or do not publish this build."
        )
    if stated.name in _OPEN:
        return
    said = (settings.acknowledge_license or "").lower()
    if said and said in (stated.name, stated.sha256):
        return
    if stated.name is None and stated.sha256 is None:
        if said == settings.license.lower():
            return
        raise PublishError(
            f"{where}: {uri} states no licence, neither in README.md nor in LICENSE. Find "
            f"out what its owner allows, then write `acknowledge_license: {settings.license}`."
        )
    raise PublishError(
        f"{where}: {uri} is under {stated.name or 'a licence of its own'!r}, which is not "
        "one that lets anybody publish derived weights. Read it, then write "
        f"`acknowledge_license: {stated.sha256 or stated.name}`."
    )


def _front_matter_license(text: str) -> str | None:
    """Return `license`, or `license_name` where that is "other", from a README's front matter."""
    begin, _, rest = text.partition("---\n")
    front, closed, _ = rest.partition("\n---")
    if begin.strip() or not closed:
        return None
    try:
        fields: Any = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    stated = fields.get("license")
    if stated == "other":
        stated = fields.get("license_name") or stated
    return stated.lower() if isinstance(stated, str) else None


def _known_text(text: str) -> str | None:
    for name, phrases in _OPEN.items():
        flat = " ".join(text.split())
        if len(text) <= _LONGEST[name] and all(phrase in flat for phrase in phrases):
            return name
    return None
