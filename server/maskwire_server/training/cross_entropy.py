"""Cross-entropy over a large vocabulary without its logits: a chunk of them at a time.

With logits z = x w^T, p = softmax(z), t the target and a weight c for each position,

    L = sum over m of c (log sum exp z - z_t),   dL/dz = c (p - onehot(t)),
    dL/dx = c (p - onehot(t)) w,                 dL/dw = sum over m of (p - onehot(t)) (c x)^T,

so a chunk's gradients can be taken when its logits are there, and nothing of size [m, v] is kept for the
backward pass (the idea of Hsu et al. 2024, Liger kernel, and Wijmans et al. 2024, Cut Cross-Entropy).

Letters: m packed positions, d dim, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskwire_server.training.corruption import Vocabulary

CHUNK = {"cpu": 2**22, "cuda": 2**28}  # logits at once: 16 MiB and 1 GiB in fp32

Look = Callable[[slice, Tensor], None]
"""Is shown each chunk's positions and logits, which it must not change."""


def chunk_rows(v: int, device: torch.device) -> int:
    """How many positions' logits are computed together."""
    return max(1, CHUNK[device.type] // v)


def chunks(m: int, v: int, device: torch.device) -> Iterator[slice]:
    """Positions whose logits are computed together."""
    size = chunk_rows(v, device)
    return (slice(start, min(start + size, m)) for start in range(0, m, size))


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what softmax is computed in."""
    return torch.promote_types(dtype, torch.float32)


def forbid_special(logits_mv: Tensor, vocabulary: Vocabulary) -> Tensor:
    """fp32 (or wider) logits in which the mask and the pad id have probability 0; may be in place."""
    logits_mv = logits_mv.to(wide(logits_mv.dtype))
    index = torch.tensor(vocabulary.special, device=logits_mv.device)
    return logits_mv.index_fill_(-1, index, float("-inf"))


def weighted_sum(
    x_md: Tensor, w_vd: Tensor, target_m: Tensor, weight_m: Tensor, vocabulary: Vocabulary, look: Look | None
) -> Tensor:
    """sum of weight_m times the cross-entropy of the logits x w^T, a fp64 scalar with gradients of both."""
    learns = torch.is_grad_enabled() and (x_md.requires_grad or w_vd.requires_grad)
    total: Tensor = _WeightedSum.apply(  # type: ignore[no-untyped-call]
        x_md, w_vd, target_m, weight_m, vocabulary, look, learns
    )
    return total


class _WeightedSum(torch.autograd.Function):
    """The gradients are there when the sum is: the backward pass only hands them out, once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_md: Tensor,
        w_vd: Tensor,
        target_m: Tensor,
        weight_m: Tensor,
        vocabulary: Vocabulary,
        look: Look | None,
        learns: bool,
    ) -> Tensor:
        device, dtype = x_md.device, x_md.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        grad_x, grad_w = (torch.empty_like(x_md), torch.zeros_like(w_vd)) if learns else (None, None)
        total = torch.zeros((), dtype=torch.float64, device=device)
        (m, _), v = x_md.shape, w_vd.shape[0]
        with torch.autocast(device.type, enabled=False):
            w = w_vd.to(dtype)
            # Two buffers for all chunks: fresh pages would cost as much as the softmax.
            products, log_ps = (
                torch.empty(min(m, chunk_rows(v, device)), v, dtype=kind, device=device)
                for kind in (dtype, wide(dtype))
            )
            for rows in chunks(m, v, device):
                x, target, weight = x_md[rows], target_m[rows, None], weight_m[rows, None]
                product, log_p = products[: len(x)], log_ps[: len(x)]
                torch.mm(x.to(dtype), w.t(), out=product)
                logits = forbid_special(product, vocabulary)
                if look is not None:
                    look(rows, logits)
                torch.log_softmax(logits, -1, out=log_p)
                total -= (log_p.gather(1, target).double() * weight).sum()
                if grad_x is None or grad_w is None:
                    continue
                # p - onehot(t), where the log-probabilities were.
                off = log_p.exp_().scatter_add_(1, target, log_p.new_full((), -1.0).expand_as(target))
                off = off.to(dtype)
                share = weight.to(x.dtype)
                grad_x[rows] = share * (off @ w)
                scaled = (share * x).to(dtype)
                if grad_w.dtype == dtype:
                    grad_w.addmm_(off.t(), scaled)
                else:
                    grad_w += off.t() @ scaled
        ctx.gradients = grad_x, grad_w
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the cross-entropy's gradients are handed out once: compute it again")
        grad_x, grad_w = ctx.gradients
        ctx.gradients = None  # so that the weight's gradient is taken over, not copied
        return grad_x.mul_(upstream), grad_w.mul_(upstream), None, None, None, None, None
