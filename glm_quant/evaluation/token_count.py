"""How many tokens a text has, without loading a model's whole tokenizer class (seconds)."""

from typing import Any

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import CheckpointError
from glm_quant.evaluation.token_set import conversations_of


class TokenCount:
    """Counts tokens with a source's `tokenizer.json`."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of the package `tokenizers`."""
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> int:
        """Return a text's tokens; of conversations, those of what is said, without the template."""
        conversations = conversations_of(text)
        if conversations is not None:
            text = "\n".join(turn["content"] for turns in conversations for turn in turns)
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def has_token(self, token: str) -> bool:
        """Whether the vocabulary has a token."""
        return self._tokenizer.token_to_id(token) is not None


def token_count(source: Checkpoint) -> TokenCount | None:
    """Return what counts a source's tokens; None where it has no tokenizer.

    Raises:
        CheckpointError: tokenizer.json cannot be read.
    """
    if "tokenizer.json" not in source.files:
        return None
    from tokenizers import Tokenizer  # which mlx-lm needs by way of transformers

    data = source.source.read("tokenizer.json")
    try:
        tokenizer: Any = Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises nothing more special
        raise CheckpointError(
            f"{source.source.uri}: tokenizer.json cannot be read ({error}). Fetch it again."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TokenCount(tokenizer)
