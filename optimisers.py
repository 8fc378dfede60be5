"""Muon for many matrices at a time.

torch.optim.Muon orthogonalises one matrix after the other: thousands of small kernels in every step, which a GPU spends
waiting for. Here matrices of equal shape are one batched product. Knows nothing of models.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

NUMBERS = 2 ** 25                       # in one stack at most: it needs about ten bytes for each while it is worked on
CACHED = 2 ** 20                        # the same on a CPU


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """x (n, rows, columns), rows <= columns, overwritten -> nearly orthogonal, by Newton-Schulz iterations in the dtype of x."""
    a, b, c = coefficients
    x = x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Nesterov momentum, default learning rates) in its mathematics, settings and state; shares of a sharded model are left to it."""

    dtype = torch.bfloat16              # of the iterations

    @torch.no_grad()
    def step(self, closure=None):
        if any(hasattr(p, "to_local") for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, kept = [], [], []
            self._init_group(group, params, grads, kept)
            if params:
                self._step(group, params, grads, kept)
        return loss

    def _step(self, group: dict, params: list[Tensor], grads: list[Tensor], kept: list[Tensor]) -> None:
        torch._foreach_lerp_(kept, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, kept, group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple, list[int]] = {}
        for i, p in enumerate(params):
            alike.setdefault((tuple(p.shape), p.dtype, p.device), []).append(i)
        for ((rows, columns), _, device), members in alike.items():
            room = max(1, (CACHED if device.type == "cpu" else NUMBERS) // (rows * columns))
            for few in (members[i:i + room] for i in range(0, len(members), room)):
                self._add(group, [params[i] for i in few], [ahead[i] for i in few])

    def _add(self, group: dict, params: list[Tensor], ahead: list[Tensor]) -> None:
        """params, all of one shape, minus the orthogonalised directions."""
        rows, columns = params[0].shape
        upright = rows > columns
        stack = torch.stack(ahead).to(self.dtype)
        update = orthogonalise((stack.mT if upright else stack).contiguous(), group["ns_coefficients"], group["ns_steps"], group["eps"])
        update = (update.mT if upright else update).to(params[0].dtype, memory_format=torch.contiguous_format)
        torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))
