"""Publishing to every target."""

from glm_quant.build import Build
from glm_quant.errors import PublishError
from glm_quant.stages.base import StageResult
from tasks.stages import publish


def publish_everywhere(build: Build) -> list[StageResult]:
    """Publish to every target; one that fails does not keep the others from their build.

    Raises:
        PublishError: some failed; the others are done, and stay so when it is run again.
    """
    results: list[StageResult] = []
    failures: dict[str, Exception] = {}
    for target in build.targets:
        try:
            results.append(publish(build, target))
        except Exception as error:
            failures[target] = error
    if failures:
        reasons = "; ".join(f"{target}: {error}" for target, error in failures.items())
        raise PublishError(
            f"{len(failures)} of {len(build.targets)} targets failed, the others are done. Run "
            f"again: only these are left. {reasons}"
        )
    return results
