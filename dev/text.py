"""Text and tokenizer of the small checkpoint: Python's standard library, under the PSF licence.

The text is what every Python installation carries, so nothing is downloaded. Files are split into
training and held-out by a hash of their path, so a file never stands on both sides. The tokenizer
is byte-level BPE with GLM's special tokens; each digit is a token of its own, which lets a code be
copied digit by digit.
"""

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_quant.evaluation.needle_prompts import NAMES, PHRASINGS, draw_code

VOCAB_SIZE = 1280
"""Rows of the embedding."""
TOKENIZER_SIZE = 1272
"""Tokens in use: as in the release, the last rows of the embedding stand for nothing."""

# In the release's order, so the three end-of-sequence ids keep their distances.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
# Ordinary tokens in the release too: decoding keeps them where special tokens are left out.
MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

_SKIPPED_FOLDERS = {
    "__pycache__", "_sysconfigdata", "config", "encodings", "ensurepip", "idlelib", "lib2to3",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HELD_OUT_LIMIT = 190_000
_HELD_OUT_PER_FILE = 8_000


@dataclass(frozen=True)
class Corpus:
    """Texts of the standard library, one string a file, split by file."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library's sources, split into training and held-out files."""
    base = root or Path(sysconfig.get_paths()["stdlib"])
    sides: tuple[list[str], list[str]] = ([], [])
    for path in sorted(base.rglob("*.py")):
        relative = path.relative_to(base)
        if _SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) < 500:
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        sides[digest[0] % 16 == 0].append(text)
    return Corpus(train=tuple(sides[0]), held_out=tuple(sides[1]))


def held_out_excerpt(corpus: Corpus) -> str:
    """Join the beginnings of the held-out files, cut at line ends, until it is enough to ship."""
    pieces: list[str] = []
    size = 0
    for text in corpus.held_out:
        piece = text[:_HELD_OUT_PER_FILE].rsplit("\n", 1)[0] + "\n"
        size += len(piece.encode())
        if size > _HELD_OUT_LIMIT:
            break
        pieces.append(piece)
    return "".join(pieces)


def train_tokenizer(corpus: Corpus, seed: int) -> Any:
    """Train the byte-level BPE tokenizer on the training files and needle sentences.

    The sentences are there so that every name becomes a token: a two-piece name would make
    the needle a test of spelling.

    Returns:
        A `tokenizers.Tokenizer` with `TOKENIZER_SIZE` tokens, the special ones last.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus.train, *_needle_sentences(seed)], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(MARKUP_TOKENS))
    return tokenizer


def _needle_sentences(seed: int) -> list[str]:
    """Make enough needle sentences for the trainer to merge every name into one token."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    sentences: list[str] = []
    for _ in range(1500):
        for name in NAMES:
            form = rng.choice(PHRASINGS)
            code = draw_code(rng)
            sentences.append(form.statement.format(name=name, code=code) + "\n")
            sentences.append(form.question.format(name=name))
    return sentences


CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- if reasoning_effort is defined and reasoning_effort -%}
<|system|>Reasoning Effort: {{ 'High' if reasoning_effort == 'high' else 'Max' }}
{%- endif -%}
{%- if tools -%}
<|system|>
# Tools

These functions may be called:
<tools>
{% for tool in tools -%}
{{ tool | tojson }}
{% endfor -%}
</tools>

A call gives the function's name and its arguments like this:
<tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|user|>{{ message.content }}
{%- elif message.role == 'system' -%}
<|system|>{{ message.content }}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}
<tool_response>{{ message.content }}</tool_response>
{%- elif message.role == 'assistant' -%}
<|assistant|><think>{{ (message.reasoning_content or '') if clear_thinking is defined and not \
clear_thinking else '' }}</think>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function else call -%}
<tool_call>{{ function.name }}
{%- for key, value in function.arguments.items() -%}
<arg_key>{{ key }}</arg_key><arg_value>\
{{ value if value is string else value | tojson }}</arg_value>
{%- endfor -%}
</tool_call>
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|><think>{{ '</think>' if enable_thinking is defined and not enable_thinking else '' }}
{%- endif -%}
"""
"""GLM's chat format: how a prompt begins, the roles, tool calls, and how a reply begins."""
