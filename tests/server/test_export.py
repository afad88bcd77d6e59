"""Exported weights open in the library that the model comes from, and give the same logits."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import maskwire_server
from maskwire_server import export_format, tokenizer_files, weight_import_export
from maskwire_server.batch import Batch, Modes
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.hugging_face_folder import filled_from_folder
from maskwire_server.manifest import Manifest
from maskwire_server.results import CheckpointInfo
from maskwire_server.training.trainer import TorchTrainer

MASK_ID, NUM_TOKENS, LENGTH = 4, 24, 12
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(5, NUM_TOKENS))]


def model_folder(folder: Path, kind: str = "bert") -> Path:
    """A model and a tokenizer, as the transformers library saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    sizes = {"vocab_size": NUM_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": LENGTH, "pad_token_id": 0}  # fmt: skip
    if kind == "modernbert":
        sizes |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def trained(
    run_dir: Path, model: ModelConfig, objective: ObjectiveConfig | None = None, **optimizer: Any
) -> Path:
    """A run directory with the checkpoint `three`, after three steps."""
    objective = objective or ObjectiveConfig()
    settings = OptimizerConfig(learning_rate=0.02, warmup_steps=0, **optimizer)
    trainer = TorchTrainer(model, objective, settings, ServeConfig(device="cpu", threads=1), 3)
    trainer.begin()
    ids = np.random.default_rng(0).integers(5, NUM_TOKENS, (4, LENGTH))
    for step in range(1, 4):
        trainer.train_step(1, step, Batch(ids, 4, LENGTH), Modes())
    sections = Config(model=model, objective=objective).as_json()
    kept = {name: sections[name] for name in ("model", "objective")}
    info = CheckpointInfo("three", 1, 3, b"", (), time.time())
    Checkpoints(run_dir).write(trainer.snapshot(), Manifest(info, "run", False, None, kept, {}))
    return run_dir


def ids() -> torch.Tensor:
    """Rows with masks, and one with padding."""
    found = torch.from_numpy(np.random.default_rng(1).integers(5, NUM_TOKENS, (3, LENGTH)))
    found[:, ::2] = MASK_ID
    found[1, 7:] = 0
    return found


def same_logits(run_dir: Path, theirs: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> None:
    """Compare with `maskwire_server.load`, whose logits of mask and pad id are -inf."""
    ours = maskwire_server.load(run_dir / "checkpoints" / "three", **options)
    valid = ids() != 0
    with torch.no_grad():
        expected, found = ours(ids())[valid], theirs(ids())[valid]
    assert torch.allclose(found[:, 5:NUM_TOKENS], expected[:, 5:NUM_TOKENS], rtol=1e-5, atol=1e-5)


def export(run_dir: Path, out: Path, to: Any, **options: Any) -> int:
    return weight_import_export.export(run_dir, None, out, to=to, **{"weights": "auto", **options})


def hugging_face(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import transformers

    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    return lambda rows: model(input_ids=rows, attention_mask=(rows != 0).long()).logits


def from_folder(folder: Path, **settings: Any) -> ModelConfig:
    return filled_from_folder(
        ModelConfig(source="huggingface", huggingface={"path": str(folder)}, **settings)
    )


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_model_of_transformers_comes_back_as_its_folder(tmp_path: Path, kind: str) -> None:
    base = model_folder(tmp_path / "base", kind)
    model = from_folder(base)
    run_dir = trained(tmp_path / "run", model, ema_decay=0.9)
    config = Config(model=model, run={"dir": run_dir})
    tokenizer_files.keep(config)
    base.rename(tmp_path / "gone")
    tokenizer_files.keep(config)  # as at every start
    assert export(run_dir, tmp_path / "out", "huggingface") == 0
    same_logits(run_dir, hugging_face(tmp_path / "out"))
    assert export(run_dir, tmp_path / "raw", "huggingface", weights="raw") == 0
    same_logits(run_dir, hugging_face(tmp_path / "raw"), weights="raw")

    import transformers

    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "out"), device="cpu")
    [first, *_] = fill("w5 w6 [MASK] w8", top_k=NUM_TOKENS)
    ours = maskwire_server.load(run_dir / "checkpoints" / "three")
    with torch.no_grad():
        likely = ours(torch.tensor([[5, 6, MASK_ID, 8]]))[0, 2]
    assert first["token"] == int(likely.argmax())
    assert first["token_str"] == WORDS[first["token"]]


def test_rows_added_to_the_vocabulary_are_exported(tmp_path: Path) -> None:
    model = from_folder(model_folder(tmp_path / "base"), mask_id=NUM_TOKENS)
    assert model.num_tokens == NUM_TOKENS + 1
    run_dir = trained(tmp_path / "run", model)
    assert export(run_dir, tmp_path / "out", "huggingface") == 0
    same_logits(run_dir, hugging_face(tmp_path / "out"))


def test_without_files_of_a_tokenizer_nothing_is_kept(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", "no-such/model"):
        model = ModelConfig(source="huggingface", huggingface={"path": str(path)})
        tokenizer_files.keep(Config(model=model, run={"dir": tmp_path}))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base` and the run `run`, which trains its adapters."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapted")
    model = from_folder(model_folder(folder / "base"), lora={"rank": 2, "alpha": 8})
    tokenizer_files.keep(Config(model=model, run={"dir": trained(folder / "run", model, ema_decay=0.5)}))
    return folder


def test_adapters_come_back_as_a_folder_of_peft(adapted: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    assert export(adapted / "run", tmp_path / "out", "peft") == 0
    base = transformers.AutoModelForMaskedLM.from_pretrained(adapted / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    same_logits(adapted / "run", lambda rows: model(input_ids=rows, attention_mask=(rows != 0).long()).logits)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name for name in names)


def test_merged_adapters_come_back_as_a_whole_model(adapted: Path, tmp_path: Path) -> None:
    import transformers

    assert export(adapted / "run", tmp_path / "out", "huggingface", merged=True) == 0
    theirs = hugging_face(tmp_path / "out")
    same_logits(adapted / "run", theirs)
    before = hugging_face(adapted / "base")
    with torch.no_grad():
        assert (theirs(ids()) - before(ids())).abs().max() > 1e-3, "the adapters were trained"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == MASK_ID


def test_the_frozen_weights_are_part_of_an_export_for_maskwire(adapted: Path, tmp_path: Path) -> None:
    assert export(adapted / "run", tmp_path / "out", "maskwire") == 0
    with torch.no_grad():
        expected = maskwire_server.load(adapted / "run" / "checkpoints" / "three")(ids())
        assert torch.equal(maskwire_server.load(tmp_path / "out")(ids()), expected)


def test_a_downloaded_folder_is_exported_without_a_run_directory(adapted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "downloaded"
    shutil.copytree(adapted / "run" / "checkpoints" / "three", folder)
    out = tmp_path / "out"
    options: Any = {"to": "huggingface", "weights": "auto"}
    assert weight_import_export.export_folder(folder, out, **options) == 2
    assert not out.exists()
    assert weight_import_export.export_folder(folder, out, **options, merged=True) == 0
    same_logits(adapted / "run", hugging_face(out))
    assert weight_import_export.export_folder(tmp_path, tmp_path / "other", **options) == 2


def test_the_folder_of_an_export_appears_only_if_it_is_whole(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(adapted / "run", run_dir)
    damaged = run_dir / "checkpoints" / "three" / "frozen.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    for to in ("maskwire", "peft"):
        assert export(run_dir, tmp_path / "out", to) == 2
        assert "frozen.safetensors does not match the manifest's SHA-256" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


OPTIONS = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16, "rotary_pos_emb": True,
           "use_rmsnorm": True, "ff_glu": True, "attn_qk_norm": True, "attn_kv_heads": 1}  # fmt: skip


@pytest.mark.parametrize("critic", ["none", "self", "token"])
def test_a_model_of_x_transformers_comes_back_as_its_state_dict(
    tmp_path: Path, critic: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    x_transformers = pytest.importorskip("x_transformers")
    model = ModelConfig(
        source="x-transformers", num_tokens=NUM_TOKENS, mask_id=MASK_ID, pad_id=0, max_seq_len=LENGTH,
        x_transformers=OPTIONS,
    )  # fmt: skip
    objective = ObjectiveConfig(self_cond=critic != "none", critic=critic)
    run_dir = trained(tmp_path / "run", model, objective)
    assert export(run_dir, tmp_path / "out.safetensors", "x-transformers") == 0
    expression = capsys.readouterr().out.partition("net = ")[2]
    classes = {"TransformerWrapper": x_transformers.TransformerWrapper, "Encoder": x_transformers.Encoder}
    separate = eval(expression, dict(classes)) if critic == "token" else None
    if separate is not None:
        separate.to_logits = torch.nn.Linear(32, 1, bias=False)
    wrapper = x_transformers.NonAutoregressiveWrapper(
        eval(expression, dict(classes)), mask_id=MASK_ID, self_cond=objective.self_cond,
        token_critic=separate, self_token_critic=critic == "self",
    ).eval()  # fmt: skip
    found = wrapper.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=critic != "self")
    assert not found.unexpected_keys
    assert all(name.startswith("token_critic.net.") for name in found.missing_keys)

    def theirs(rows: torch.Tensor) -> torch.Tensor:
        if not objective.self_cond:
            return wrapper.net(rows, mask=rows != 0)
        cond = wrapper.null_embed
        first = wrapper.net(
            rows, mask=rows != 0, sum_embeds=wrapper.to_self_cond(cond), return_embeddings=True
        )
        return wrapper.net(rows, mask=rows != 0, sum_embeds=wrapper.to_self_cond(first))

    same_logits(run_dir, theirs)


REFUSED = [
    ("encoder", "huggingface", False, "use --to x-transformers or --to maskwire"),
    ("x-transformers", "peft", False, "use --to x-transformers or --to maskwire"),
    ("python", "huggingface", False, "use --to maskwire: in the module that maskwire_server.load"),
    ("huggingface", "x-transformers", False, "use --to huggingface or --to maskwire"),
    ("huggingface", "peft", False, "use --to huggingface or --to maskwire"),
    ("lora", "huggingface", False, "use --to peft (the adapters), --to huggingface --merged"),
    ("huggingface", "huggingface", True, "but the run trains no adapters"),
    ("lora", "peft", True, "but --to is 'peft'"),
]


@pytest.mark.parametrize(("source", "to", "merged", "cure"), REFUSED)
def test_a_format_that_does_not_fit_is_refused_with_those_that_do(
    source: str, to: Any, merged: bool, cure: str
) -> None:
    tables: dict[str, dict[str, Any]] = {
        "encoder": {},
        "x-transformers": {"x_transformers": OPTIONS},
        "python": {"python": {"factory": "mine:build"}},
        "huggingface": {"huggingface": {"path": "base"}},
        "lora": {"huggingface": {"path": "base"}, "lora": {"rank": 2}},
    }
    model = ModelConfig(source="huggingface" if source == "lora" else source, **tables[source])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"--(to|merged).*{re.escape(cure)}"):
        export_format.check(model, to, merged=merged)
