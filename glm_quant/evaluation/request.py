"""What the flow asks of the worker; apart from the worker, so that asking imports no mlx-lm."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.settings import EvaluationSettings


class Request(BaseModel):
    """What the worker shall do.

    Attributes:
        text_name: what the record calls the text.
        text: the text itself: perplexity is measured on it, prompts and needle filler are cut from
            it.
        texts: further texts for perplexity, by the recipe's names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Path
    settings: EvaluationSettings
    text_name: str
    text: str
    texts: dict[str, str] = {}
