"""Muon for the small checkpoint's hidden matrices (Keller Jordan, 2024), AdamW for all else.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, found with five Newton-Schulz
steps, so every direction learns at the same speed; at this size it needs about half of AdamW's
tokens.
"""

from collections import defaultdict

import torch
from torch import Tensor

from dev.tiny_model import Params, TinyShape

MUON_RATE = 0.01
ADAM_RATE = 3e-3
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values towards 1, from the same source."""


def uses_muon(name: str, value: Tensor) -> bool:
    """Tell whether a parameter is a hidden matrix; embeddings, head, router and indexer are not."""
    if value.dim() != 2 or "indexer" in name:
        return False
    return not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))


def orthogonalise(stack: Tensor) -> Tensor:
    """Bring the singular values of each matrix [count, rows, columns] near 1."""
    a, b, c = _COEFFICIENTS
    x = stack.bfloat16()
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if wide else x).float()


class Optimizer:
    """Both rules over one set of parameters, with a common factor on their rates."""

    def __init__(self, shape: TinyShape, params: Params) -> None:
        self._shape = shape
        trained = {name: value for name, value in params.items() if value.requires_grad}
        self._muon = {name: value for name, value in trained.items() if uses_muon(name, value)}
        self._momentum = {name: torch.zeros_like(value) for name, value in self._muon.items()}
        rest = [value for name, value in trained.items() if name not in self._muon]
        self._adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update every parameter that has a gradient, then clear the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = ADAM_RATE * factor
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
        updates: dict[str, Tensor] = {}
        for name, value in self._muon.items():
            if value.grad is None:
                continue
            momentum = self._momentum[name].lerp_(value.grad, 1 - _MOMENTUM)
            updates[name] = self._split(name, value.grad.lerp(momentum, _MOMENTUM))
            alike[tuple(updates[name].shape[-2:])].append(name)
            value.grad = None
        for (rows, columns), names in alike.items():
            stacked = torch.cat([updates[name] for name in names])
            turned = orthogonalise(stacked) * max(1.0, rows / columns) ** 0.5
            sizes = [len(updates[name]) for name in names]
            for name, part in zip(names, turned.split(sizes), strict=True):
                value = self._muon[name]
                # A little decay keeps weights small, which also keeps them easy to quantize.
                value.mul_(1 - 0.02 * MUON_RATE * factor)
                value.sub_(self._join(name, part), alpha=MUON_RATE * factor)

    def _split(self, name: str, value: Tensor) -> Tensor:
        """See joined experts as a stack of matrices; other parameters as a stack of one."""
        if ".experts." not in name:
            return value.unsqueeze(0)
        experts = self._shape.n_routed_experts
        if "down_proj" in name:
            return value.unflatten(1, (experts, -1)).transpose(0, 1)
        return value.unflatten(0, (experts, -1))

    def _join(self, name: str, stack: Tensor) -> Tensor:
        if ".experts." not in name:
            return stack.squeeze(0)
        if "down_proj" in name:
            return stack.transpose(0, 1).flatten(1)
        return stack.flatten(0, 1)
