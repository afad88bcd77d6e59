"""x-transformers' wrapper by itself, at its fastest.

python -m bench.peer_inprocess STEPS ROWS COLUMNS DIM DEPTH HEADS TOKENS

Flash attention, fused AdamW, the masked-mean loss, no augmentation; prints what `bench.inprocess` does.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch

from bench.harness import WARM, report


def main() -> None:
    """Train on one batch, over and over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import x_transformers
        from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper
    steps, rows, columns, dim, depth, heads, tokens = map(int, sys.argv[1:8])
    torch.manual_seed(0)
    layers = x_transformers.Encoder(dim=dim, depth=depth, heads=heads, attn_flash=True)
    net = x_transformers.TransformerWrapper(num_tokens=tokens, max_seq_len=columns, attn_layers=layers)
    wrapper: Any = NonAutoregressiveWrapper(
        net, mask_id=tokens - 1, no_replace_prob=0.0, random_token_prob=0.0, use_simple_mdlm_loss_weight=False
    )
    report(train(wrapper, torch.randint(0, tokens - 1, (rows, columns)), steps + WARM)[WARM:], 0.0)


def train(wrapper: Any, ids: torch.Tensor, steps: int) -> list[float]:
    """Train a NonAutoregressiveWrapper on one batch. Returns the seconds of each step."""
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-3, fused=True)
    seconds: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        loss = wrapper(ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
