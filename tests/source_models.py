"""Small models of every source, for tests: their [model] sections and the library's own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maskwire_server.batch import Batch
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.hugging_face_folder import filled_from_folder
from maskwire_server.training.trainer import TorchTrainer

VOCABULARY, PAD, MASK = 41, 39, 40
LONGEST = 20
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": LONGEST, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
"""What the configurations of BERT, ModernBERT, RoBERTa and ESM have in common."""
DROPOUTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "BertConfig": {**SIZES, **DROPOUTS},
    "ModernBertConfig": {**SIZES, "local_attention": 8},
    "RobertaConfig": {**SIZES, **DROPOUTS, "max_position_embeddings": LONGEST + 2, "pad_token_id": 1,
                      "bos_token_id": 0},
    "DistilBertConfig": {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48,
                         "max_position_embeddings": LONGEST, "pad_token_id": PAD, "dropout": 0.0,
                         "attention_dropout": 0.0},
    "EsmConfig": {**SIZES, **DROPOUTS, "mask_token_id": MASK, "pad_token_id": 1, "token_dropout": True,
                  "max_position_embeddings": LONGEST + 2},
    "MobileBertConfig": {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 16, "trigram_input": False,
                         "hidden_dropout_prob": 0.0},
}  # fmt: skip
"""Arguments of transformers' configuration classes. Without dropout, so that gradients can be compared."""
PLAIN_ENCODER = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16}
MODERN_ENCODER = {
    **PLAIN_ENCODER, "rotary_pos_emb": True, "use_rmsnorm": True,
    "ff_glu": True, "attn_qk_norm": True, "attn_kv_heads": 1,
}  # fmt: skip
TIED_ENCODER = {
    **PLAIN_ENCODER, "alibi_pos_bias": True, "num_memory_tokens": 2,
    "tie_embedding": True,
}  # fmt: skip


def write_folder(folder: Path, architecture: str = "BertConfig", *, seed: int = 1, **changed: Any) -> Path:
    """A folder of a model with random weights, as transformers writes it."""
    import transformers

    config = getattr(transformers, architecture)(**{**ARCHITECTURES[architecture], **changed})
    torch.manual_seed(seed)
    module = transformers.AutoModelForMaskedLM.from_config(config)
    shake(module)
    module.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, tokens: dict[str, int], **special: str) -> Path:
    """The files of a tokenizer that name its special tokens."""
    added = [{"id": number, "content": token} for token, number in tokens.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@torch.no_grad()
def shake(module: nn.Module, scale: float = 0.1) -> None:
    """Add noise to all weights, so that none is 0 or 1 as libraries initialise biases, gains and adapters."""
    for weight in module.parameters():
        weight += scale * torch.randn_like(weight)


def of_folder(
    folder: Path, *, mask_id: int | None = MASK, pretrained: bool = True, **more: Any
) -> ModelConfig:
    """The section [model] of a folder, completed as the server does."""
    if mask_id is not None:
        more["mask_id"] = mask_id
    table = {"path": str(folder), "pretrained": pretrained}
    return filled_from_folder(ModelConfig(source="huggingface", huggingface=table, **more))


def of_x_transformers(**options: Any) -> ModelConfig:
    """The section [model] of an x-transformers encoder."""
    sizes = {"num_tokens": VOCABULARY, "mask_id": MASK, "max_seq_len": LONGEST}
    return ModelConfig(source="x-transformers", x_transformers=options, **sizes)


def make_trainer(
    model: ModelConfig, *, seed: int = 3, micro_batch: int | None = None, **objective: Any
) -> TorchTrainer:
    """A trainer on the CPU, before `begin`."""
    serve = ServeConfig(device="cpu", threads=1, micro_batch_tokens=micro_batch)
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=0, clip_grad_norm=None, ema_decay=0.9)
    return TorchTrainer(model, ObjectiveConfig(**objective), optimizer, serve, seed)


def ragged_batch(seed: int = 0) -> Batch:
    """Rows of different lengths with prompts, as a client sends them."""
    random = np.random.default_rng(seed)
    lengths = np.array([LONGEST, 13, LONGEST, 5, 2, 17], dtype=np.int32)
    shape = (len(lengths), LONGEST)
    valid = np.arange(LONGEST) < lengths[:, None]
    ids = random.integers(3, 38, shape)[valid]
    prompt = np.packbits(random.random(shape) < 0.3, bitorder="little").tobytes()
    return Batch(ids, *shape, lengths, prompt)
