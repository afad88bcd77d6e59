"""Training steps of one model, by maskwire or as its library's users train it.

python -m bench.foreign_steps WHO LIBRARY STEPS ROWS COLUMNS TOKENS

WHO is `maskwire` or `library`, LIBRARY is `x-transformers` (its NonAutoregressiveWrapper in a plain loop) or
`huggingface` (a Trainer whose loss is the cross-entropy at masked positions divided by the masking
probability, as in dLLM). Both train a model with random weights. Prints what `bench.inprocess` prints.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bench import peer_inprocess
from bench.harness import WARM, report
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.hugging_face_folder import filled_from_folder
from maskwire_server.training.trainer import TorchTrainer

DIM, DEPTH, HEADS = 256, 4, 4
ENCODER: dict[str, Any] = {
    "dim": DIM, "depth": DEPTH, "heads": HEADS, "rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True,
    "attn_qk_norm": True, "attn_kv_heads": 2, "attn_flash": True,
}  # fmt: skip
Seconds = list[float]


def main() -> None:
    """Train on one batch, over and over."""
    who, library = sys.argv[1:3]
    steps, rows, columns, tokens = map(int, sys.argv[3:7])
    ids = np.random.default_rng(0).integers(0, tokens - 1, (rows, columns))
    torch.manual_seed(0)
    if who == "maskwire":
        seconds = maskwire(library, ids, steps + WARM, tokens)
    elif library == "huggingface":
        seconds = hugging_face(ids, steps + WARM, tokens)
    else:
        seconds = x_transformers(ids, steps + WARM, tokens)
    report(seconds[WARM:], 0.0)


def modern_bert(columns: int, tokens: int) -> Any:
    """The configuration of a ModernBERT."""
    import transformers

    return transformers.ModernBertConfig(
        vocab_size=tokens, hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=2 * DIM, max_position_embeddings=columns, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, cls_token_id=None, sep_token_id=None,
    )  # fmt: skip


def maskwire(library: str, ids: Any, steps: int, tokens: int) -> Seconds:
    """The server's trainer by itself."""
    columns = ids.shape[1]
    sizes: dict[str, Any] = {"source": library, "num_tokens": tokens, "mask_id": tokens - 1}
    sizes["max_seq_len"] = columns
    with tempfile.TemporaryDirectory() as folder:
        if library == "huggingface":
            modern_bert(columns, tokens).save_pretrained(folder)
            sizes["huggingface"] = {"path": str(Path(folder) / "config.json")}
        else:
            sizes["x_transformers"] = ENCODER
        model = filled_from_folder(config.ModelConfig(**sizes))
    whole = config.Config()
    trainer = TorchTrainer(model, whole.objective, whole.optimizer, whole.serve, 0)
    trainer.begin()
    seconds = []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        trainer.train_step(1, step, Batch(ids, *ids.shape), Modes())
        seconds.append(time.perf_counter() - began)
    return seconds


def x_transformers(ids: Any, steps: int, tokens: int) -> Seconds:
    """The library's wrapper, without augmentation, with fused AdamW."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import x_transformers as library
        from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper
    net = library.TransformerWrapper(
        num_tokens=tokens, max_seq_len=ids.shape[1], attn_layers=library.Encoder(**ENCODER)
    )
    wrapper: Any = NonAutoregressiveWrapper(
        net, mask_id=tokens - 1, no_replace_prob=0.0, random_token_prob=0.0, use_simple_mdlm_loss_weight=False
    )
    return peer_inprocess.train(wrapper, torch.from_numpy(ids), steps)


def hugging_face(ids: Any, steps: int, tokens: int) -> Seconds:
    """The library's Trainer, with fused AdamW."""
    import transformers

    mask_id, began, seconds = tokens - 1, [0.0], []

    class Masked(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            clean = inputs["input_ids"]
            chance = torch.rand(len(clean), 1).clamp(min=1e-3)
            masked = torch.rand(clean.shape) < chance
            logits = model(input_ids=torch.where(masked, mask_id, clean)).logits
            each = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
            return (each * masked / chance).sum() / clean.numel()

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - began[0])

    model = transformers.AutoModelForMaskedLM.from_config(modern_bert(ids.shape[1], tokens))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(ids), max_steps=steps, save_strategy="no",
            logging_strategy="no", report_to=[], optim="adamw_torch_fused", learning_rate=1e-3,
            max_grad_norm=1.0, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": torch.from_numpy(row)} for row in ids]
        with contextlib.redirect_stdout(sys.stderr):  # it prints a summary
            Masked(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return seconds


if __name__ == "__main__":
    main()
