"""Cross-entropy over a large vocabulary, with the logits computed in chunks.

With logits z = x w^T + b, p = softmax(z), t the target and a weight c for each position,

    L = sum over m of c (log sum exp z - z_t),   dL/dz = c (p - onehot(t)),
    dL/dx = c (p - onehot(t)) w,                 dL/dw = sum over m of (p - onehot(t)) (c x)^T,
    dL/db = sum over m of c (p - onehot(t)),

so that the gradients of a chunk can be computed with its logits, and no tensor of size [m, v] is kept for
the backward pass (the idea of Hsu et al. 2024, Liger kernel, and Wijmans et al. 2024, Cut Cross-Entropy).

Letters: m packed positions, d dim, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.head import Head, aligned

CHUNK = {"cpu": 2**22, "cuda": 2**28}  # logits at once: 16 MiB and 1 GiB in fp32

Look = Callable[[slice, Tensor], None]
"""Called with the positions and logits of each chunk. It must not change the logits."""


def chunk_rows(v: int, device: torch.device) -> int:
    """The number of positions whose logits, for a vocabulary of `v` ids, are computed together."""
    return max(1, CHUNK[device.type] // v)


def chunks(m: int, v: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of the `m` positions. The logits of each slice are computed together."""
    size = chunk_rows(v, device)
    return (slice(start, min(start + size, m)) for start in range(0, m, size))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which softmax is computed: fp64 for fp64, otherwise fp32."""
    return torch.promote_types(dtype, torch.float32)


def forbid_special(logits_mv: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return logits in at least fp32, with -inf for the mask and pad ids. May change its argument."""
    return _forbid(logits_mv, _indices(tuple(vocabulary.special), logits_mv.device))


@lru_cache(maxsize=64)
def _indices(of: tuple[int, ...], device: torch.device) -> Tensor:
    """The indices as a tensor. It is kept, because making it again would wait until the device is idle."""
    return torch.tensor(of, device=device)


def _forbid(logits_mv: Tensor, index: Tensor) -> Tensor:
    return logits_mv.to(wide(logits_mv.dtype)).index_fill_(-1, index, float("-inf"))


def weighted_sum(
    head: Head, target_m: Tensor, weight_m: Tensor, vocabulary: Vocabulary, look: Look | None
) -> Tensor:
    """The weighted sum of cross-entropies, in nats: an fp64 scalar with gradients for the head's tensors.

    `look` is called with the positions and logits of each chunk.
    """
    x_md, w_vd, bias_v = head
    if w_vd is None:
        return _of_logits(x_md, target_m, weight_m, vocabulary, look)
    given = (x_md, w_vd) if bias_v is None else (x_md, w_vd, bias_v)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    total: Tensor = _WeightedSum.apply(  # type: ignore[no-untyped-call]
        x_md, w_vd, bias_v, target_m, weight_m, vocabulary, look, learns
    )
    return total


def _of_logits(
    logits_mv: Tensor, target_m: Tensor, weight_m: Tensor, vocabulary: Vocabulary, look: Look | None
) -> Tensor:
    """Compute `weighted_sum` from logits that the model computed itself, all in memory at once."""
    logits_mv = forbid_special(logits_mv.clone(), vocabulary)
    if look is not None:
        m, v = logits_mv.shape
        for rows in chunks(m, v, logits_mv.device):
            look(rows, logits_mv[rows].detach())
    log_p = logits_mv.log_softmax(-1).gather(1, target_m[:, None])[:, 0]
    return -(log_p.double() * weight_m).sum()


class _WeightedSum(torch.autograd.Function):
    """Computes the weighted sum together with its gradients, which the backward pass returns once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_md: Tensor,
        w_vd: Tensor,
        bias_v: Tensor | None,
        target_m: Tensor,
        weight_m: Tensor,
        vocabulary: Vocabulary,
        look: Look | None,
        learns: bool,
    ) -> Tensor:
        device, dtype = x_md.device, x_md.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        grad_x = torch.empty_like(x_md) if learns else None
        grad_b = torch.zeros_like(bias_v) if learns and bias_v is not None else None
        total = torch.zeros((), dtype=torch.float64, device=device)
        (m, _), v = x_md.shape, w_vd.shape[0]
        with torch.autocast(device.type, enabled=False):
            w = aligned(w_vd.to(dtype))
            b = None if bias_v is None else aligned(bias_v.to(dtype))
            columns = w.shape[0]
            forbidden = _indices((*vocabulary.special, *range(v, columns)), device)
            # grad_w is None if w is frozen.
            grad_w = w_vd.new_zeros(columns, w_vd.shape[1]) if learns and w_vd.requires_grad else None
            # All chunks share two buffers: allocating new memory would take as long as the softmax.
            products, log_ps = (
                torch.empty(min(m, chunk_rows(v, device)), columns, dtype=kind, device=device)
                for kind in (dtype, wide(dtype))
            )
            for rows in chunks(m, v, device):
                x, target, weight = x_md[rows], target_m[rows, None], weight_m[rows, None]
                product, log_p = products[: len(x)], log_ps[: len(x)]
                if b is None:
                    torch.mm(x.to(dtype), w.t(), out=product)
                else:
                    torch.addmm(b, x.to(dtype), w.t(), out=product)
                logits = _forbid(product, forbidden)
                if look is not None:
                    look(rows, logits[:, :v])
                torch.log_softmax(logits, -1, out=log_p)
                total -= (log_p.gather(1, target).double() * weight).sum()
                if grad_x is None:
                    continue
                # p - onehot(t), computed in the memory of the log-probabilities.
                off = log_p.exp_().scatter_add_(1, target, log_p.new_full((), -1.0).expand_as(target))
                off = off.to(dtype)
                share = weight.to(x.dtype)
                grad_x[rows] = share * (off @ w)
                if grad_w is not None:
                    scaled = (share * x).to(dtype)
                    if grad_w.dtype == dtype:
                        grad_w.addmm_(off.t(), scaled)
                    else:
                        grad_w += off.t() @ scaled
                if grad_b is not None:
                    grad_b += (share * off).sum(0)[:v]
        ctx.gradients = grad_x, None if grad_w is None else grad_w[:v], grad_b
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward() can run only once for a cross-entropy; compute the loss again")
        gradients = ctx.gradients
        ctx.gradients = None  # the only reference, so that autograd takes the gradients without a copy
        return *(None if each is None else each.mul_(upstream) for each in gradients), *[None] * 5
