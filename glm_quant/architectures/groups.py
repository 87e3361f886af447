"""Component groups: what a parameter is for, told from its module's class and place.

A recipe speaks of groups, so that one recipe serves models whose modules have other names. The
tables below are in order: the first line that matches decides.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

from glm_quant.recipe import ComponentGroup


class Place(NamedTuple):
    """Where a parameter stands in a model.

    Attributes:
        path: of its module, below its layer where it has one, such as `self_attn.q_proj`.
        classes: names of the classes of its module and of those that hold it, inmost first, up to
            its layer.
        in_layer: whether a layer holds it.
        shape: the parameter's shape.
        parameter: the parameter's own name, such as `weight`.
        experts: the numbers of experts that the model's expert modules have.
    """

    path: str
    classes: tuple[str, ...]
    in_layer: bool
    shape: tuple[int, ...]
    parameter: str
    experts: Collection[int]


# Inside a layer, by the path below it and the classes on the way. Linear attention and state-space
# parts have no line: their sensitivity is not that of attention, so they are `other`.
_IN_LAYER: tuple[tuple[ComponentGroup, re.Pattern[str]], ...] = (
    ("router", re.compile(r"shared_experts?_gate$")),
    ("shared_experts", re.compile(r"(^|[._])shared?_experts?(\.|$)|(^|\.)shared(_\w+)?(\.|$)")),
    ("attention", re.compile(r"(^|\.)(self_)?(attn|attention)(\.|$)", re.IGNORECASE)),
    ("dense_mlp", re.compile(r"(^|\.)(mlps?|ffn|feed_forward|ff)(\.|$)", re.IGNORECASE)),
    ("dense_mlp", re.compile(r"(^|\.)(gate_proj|up_proj|down_proj|fc[12]|w[123]|c_fc)$")),
    ("attention", re.compile(r"(^|\.)((q|k|v|o|qkv)_proj|c_attn|query_key_value)$")),
)
_BY_CLASS: tuple[tuple[ComponentGroup, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"Attention")),
    ("dense_mlp", re.compile(r"MLP|FeedForward")),
)
_INDEXER = re.compile(r"(^|\.)(indexer|compressor)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|head|output_projection)(\.|$)")
_NORM_PATH = re.compile(r"(norm|ln(_\w+)?)$", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"(Router|Gate)$|MoEGate")
_ROUTER_PATH = re.compile(r"(^|\.)(gate|router|classifier)(\.|$)")
_ROUTER_PARAMETER = re.compile(r"(correction|expert)_bias$")
# Modules that carry a state from token to token instead of looking back at all of them.
_RECURRENT_CLASS = re.compile(
    r"Mamba|SSM|Delta|Recurrent|RWKV|Linear_?Attention|LinearAttn|Lightning|RGLRU|Griffin|ShortConv|"
    r"TimeMix|GLA"
)
_RECURRENT_PATH = re.compile(r"(^|\.)(linear_attn|mamba|ssm|conv\w*|time_mix|temporal_block)")


def component_group(place: Place) -> ComponentGroup:
    """Return the component group of a parameter; `other` where nothing is known of it."""
    module_class = place.classes[0] if place.classes else ""
    if place.in_layer and _INDEXER.search(place.path):
        return "indexer"
    if ("Switch" in module_class and "attn" not in place.path) or _is_stacked_expert(place):
        return "routed_experts"
    if "Embedding" in module_class:
        return "embeddings"
    if "Norm" in module_class or (len(place.shape) < 2 and _NORM_PATH.search(place.path)):
        return "norms"
    if not place.in_layer:
        name = f"{place.path}.{place.parameter}".removesuffix(".weight").removeprefix(".")
        return "lm_head" if _HEAD.search(name) else "other"
    if _is_router(place, module_class):
        return "router"
    recurrent = any(_RECURRENT_CLASS.search(name) for name in place.classes)
    if recurrent or _RECURRENT_PATH.search(place.path):
        return "other"
    for group, pattern in _IN_LAYER:
        if pattern.search(place.path):
            return group
    for group, pattern in _BY_CLASS:
        if any(pattern.search(name) for name in place.classes):
            return group
    return "other"


def _is_stacked_expert(place: Place) -> bool:
    """Whether a parameter holds all experts in one matrix (DBRX)."""
    return any("Expert" in name for name in place.classes) and "experts" in place.path


def _is_router(place: Place, module_class: str) -> bool:
    if _ROUTER_PARAMETER.search(place.parameter):
        return True
    if not place.experts or "shared" in place.path:
        return False
    if any("Router" in name for name in place.classes):
        return True
    scores = place.shape[0] in place.experts if place.shape else False
    named = _ROUTER_PATH.search(place.path) or _ROUTER_CLASS.search(module_class)
    return bool(scores and named)
