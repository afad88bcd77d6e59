"""What a new run accepts as a model: folders, keywords, and factories whose steps can be computed again."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from source_models import (
    LONGEST,
    MASK,
    MODERN_ENCODER,
    PAD,
    PLAIN_ENCODER,
    VOCABULARY,
    make_trainer,
    of_folder,
    of_x_transformers,
    write_folder,
    write_tokenizer,
)
from torch import Tensor

from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.hugging_face_folder import filled_from_folder
from maskwire_server.recovery import fingerprint
from maskwire_server.results import FROZEN_FILE
from maskwire_server.training.footprint import footprint
from maskwire_server.training.models import transformer_wrapper
from maskwire_server.training.trainer import TorchTrainer

pytestmark = pytest.mark.filterwarnings(  # of the libraries themselves
    "ignore::DeprecationWarning",
    "ignore:.is_gradient_checkpointing.:FutureWarning",
    "ignore:Initializing zero-element:UserWarning",
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT, as transformers writes it."""
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    return write_folder(tmp_path_factory.mktemp("bert"))


def logits(trainer: TorchTrainer, ids: Tensor) -> Tensor:
    networks = trainer.networks.eval()
    with torch.no_grad():
        return networks.project(networks.embed(ids, None, None))


def test_a_run_begins_from_the_weights_of_the_folder(bert: Path) -> None:
    from transformers import AutoModelForMaskedLM

    trainer = make_trainer(of_folder(bert), critic="token")
    sha256 = trainer.begin()
    ids = torch.randint(3, 38, (2, 9))
    library = AutoModelForMaskedLM.from_pretrained(bert).eval()
    with torch.no_grad():
        assert torch.equal(logits(trainer, ids), library(ids).logits)
    generator, critic = (dict(each.named_parameters()) for each in trainer.networks.backbones)
    trunk = [name for name in generator if name.startswith("model.bert.")]
    assert len(trunk) > 20
    assert all(torch.equal(generator[name], critic[name]) for name in trunk)
    assert trainer.begin() == sha256, "the source gives the same weights again"
    other = make_trainer(of_folder(bert), seed=4, critic="token")
    assert other.begin() != sha256, "the critic's head comes from the seed"


def test_random_weights_follow_from_the_seed(bert: Path) -> None:
    model = of_folder(bert / "config.json", pretrained=False)
    hashes = []
    for seed in (3, 3, 4):
        torch.rand(seed)
        hashes.append(make_trainer(model, seed=seed).begin())
    assert hashes[0] == hashes[1] != hashes[2]


def test_rows_of_added_ids_follow_from_the_seed_too(bert: Path) -> None:
    """The mask id is beyond the folder's vocabulary, so the embeddings get rows that no file has."""
    model = of_folder(bert, mask_id=VOCABULARY + 2)
    assert model.num_tokens == VOCABULARY + 3
    first = make_trainer(model)
    sha256 = first.begin()
    torch.rand(7)  # as any other code in the process may draw
    assert first.begin() == sha256
    again = make_trainer(model)
    assert again.begin() == sha256
    assert make_trainer(model, seed=4).begin() != sha256
    weight = first.networks.generator.model.get_input_embeddings().weight
    assert weight.shape[0] == VOCABULARY + 3
    assert 0 < float(weight[VOCABULARY:].detach().std()) < 1
    before = weight.detach().clone()
    first.train_step(1, 1, Batch(np.full((2, 6), 5), 2, 6), Modes())
    assert not torch.equal(before[MASK + 3], weight[MASK + 3]), "the row of the mask id is trained"


def test_adapters_begin_from_the_weights_of_the_folder(bert: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra huggingface")
    from transformers import AutoModelForMaskedLM

    trainer = make_trainer(of_folder(bert, lora={"rank": 2}))
    sha256 = trainer.begin()
    library = AutoModelForMaskedLM.from_pretrained(bert).eval()
    ids = torch.randint(3, 38, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(logits(trainer, ids), library(ids).logits)
    assert trainer.begin() == sha256
    with pytest.raises(
        ConfigError, match=r"model.num_tokens: must be at most the vocabulary .*, 41, .* got 42"
    ):
        make_trainer(of_folder(bert, mask_id=VOCABULARY, lora={"rank": 2}))


def test_weights_that_the_folder_lacks_follow_from_the_seed(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder of a model without the masked language model's head, as encoders are often published."""
    from transformers import BertModel

    BertModel.from_pretrained(bert).save_pretrained(tmp_path)
    trainer = make_trainer(of_folder(tmp_path))
    sha256 = trainer.begin()
    assert "cls.predictions.transform.dense.weight" in caplog.text
    assert "they start from random values" in caplog.text
    torch.rand(7)
    assert trainer.begin() == sha256
    assert make_trainer(of_folder(tmp_path)).begin() == sha256
    assert make_trainer(of_folder(tmp_path), seed=4).begin() != sha256


def test_ids_under_padding_change_no_bit(bert: Path) -> None:
    trainer = make_trainer(of_folder(bert))
    trainer.begin()
    valid = torch.arange(LONGEST) < torch.tensor([[LONGEST], [7]])
    ids = torch.randint(3, 38, (2, LONGEST))
    others = torch.where(valid, ids, torch.randint(3, 38, (2, LONGEST)))
    trainer.networks.eval()
    with torch.no_grad():
        one, other = (trainer.networks.embed(each, valid, None) for each in (ids, others))
    assert torch.equal(one[valid], other[valid])


# What the folder says.


def test_the_tokenizers_files_give_the_special_ids(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    write_tokenizer(tmp_path, {"[PAD]": 7, "[MASK]": 8}, mask_token="[MASK]", pad_token="[PAD]")
    model = of_folder(tmp_path, mask_id=None)
    assert (model.num_tokens, model.mask_id, model.pad_id, model.max_seq_len) == (VOCABULARY, 8, 7, LONGEST)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[MASK]", "a"]))
    model = of_folder(tmp_path, mask_id=None)
    assert (model.mask_id, model.pad_id) == (1, 0), "from vocab.txt, as the first BERTs have it"
    assert of_folder(tmp_path, mask_id=5, max_seq_len=9).max_seq_len == 9, "settings win"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"8": {"content": "<mask>"}}}),
        ("vocab.json", {"a": 0, "<mask>": 8}),
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "<mask>": 8}}}),
    ],
)
def test_the_mask_token_may_stand_in_any_file_of_a_tokenizer(
    bert: Path, tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<mask>"}))
    (tmp_path / file).write_text(json.dumps(content))
    assert of_folder(tmp_path, mask_id=None).mask_id == 8


def test_a_folder_without_a_tokenizer_needs_a_mask_id(bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.mask_id: must be set, because there is no tokenizer"):
        of_folder(bert, mask_id=None)


def test_a_pad_id_that_also_ends_texts_is_no_padding(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": PAD}))
    assert of_folder(tmp_path).pad_id is None
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, PAD]}))
    assert of_folder(tmp_path).pad_id is None
    (tmp_path / "config.json").write_text(json.dumps({**config, "bos_token_id": PAD}))
    assert of_folder(tmp_path).pad_id is None, "it begins texts"
    assert of_folder(bert).pad_id == PAD


def test_pickled_weights_are_refused(bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path)
    weights = make_trainer(of_folder(bert)).networks.generator.model.state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"the weights of .* cannot be loaded: .* must be safetensors"):
        make_trainer(of_folder(tmp_path)).begin()


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no such type": ({"model_type": "nonsense"}, "transformers cannot build the model: ValueError: "),
    "causal": ({"model_type": "gpt2"}, "transformers cannot build the model: ValueError: "),
    "odd heads": ({"num_attention_heads": 5}, "transformers cannot build the model: ValueError: "),
    "pad outside": ({"pad_token_id": 50}, "transformers cannot build the model: AssertionError: "),
    "other sizes": ({"hidden_size": 16}, r"\.path: the weights of .* cannot be loaded: RuntimeError: "),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_fits_no_model_or_no_weights_is_refused_in_one_line(
    name: str, bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    changed, said = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ConfigError, match=rf"^model.huggingface.*{said}") as caught:
        make_trainer(of_folder(tmp_path, pad_id=PAD)).begin()
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_weights_are_refused_in_one_line(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"the weights of .* cannot be loaded: SafetensorError: ") as caught:
        make_trainer(of_folder(tmp_path)).begin()
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"huggingface.path: must be a folder or the name .* '/nowhere"):
        of_folder(Path("/nowhere/bert"))


def test_a_config_json_alone_gives_random_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    file = write_folder(tmp_path) / "config.json"
    (tmp_path / "model.safetensors").unlink()
    model = filled_from_folder(
        ModelConfig(source="huggingface", mask_id=MASK, huggingface={"path": str(file)})
    )
    trainer = make_trainer(model)
    before = {name: weight.clone() for name, weight in trainer.networks.named_parameters()}
    trainer.begin()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.networks.named_parameters())


def test_the_longest_row_of_a_roberta_leaves_out_the_positions_before_the_first(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    model = of_folder(write_folder(tmp_path, "RobertaConfig"))
    assert model.max_seq_len == LONGEST
    trainer = make_trainer(model)
    trainer.begin()  # tries the longest row
    with pytest.raises(ConfigError, match=r"model.max_seq_len = 21 tokens failed: RuntimeError: index 22"):
        make_trainer(model.model_copy(update={"max_seq_len": LONGEST + 1})).begin()


# Models that do not fit.


def test_a_model_that_divides_by_the_share_of_known_ids_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    trainer = make_trainer(of_folder(write_folder(tmp_path, "EsmConfig")))
    with pytest.raises(ConfigError, match=r"the logits of EsmForMaskedLM must be finite, also in rows"):
        trainer.begin()


def test_logits_that_are_not_linear_are_computed_everywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ESM adds its bias outside the output layer."""
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    from transformers import AutoModelForMaskedLM

    write_folder(tmp_path, "EsmConfig", token_dropout=False)
    trainer = make_trainer(of_folder(tmp_path), critic="token")
    trainer.begin()
    assert "the logits of EsmForMaskedLM are not the product of its output layer" in caplog.text
    assert "41 x 4 bytes" in caplog.text
    ids = torch.randint(3, 38, (2, 9))
    library = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(trainer, ids), library(ids).logits)
    trainer.networks.train()
    result = trainer.train_step(1, 1, Batch(np.full((2, 6), 5), 2, 6), Modes())
    assert np.isfinite(result.losses.loss)
    for setting, said in (
        ({"critic": "self"}, r'objective.critic: "self" needs a model whose logits are a linear map'),
        ({"self_cond": True}, r"objective.self_cond: .*: the logits of EsmForMaskedLM are not a linear map"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_trainer(of_folder(tmp_path), **setting).begin()


def test_an_untrained_bias_outside_the_output_layer_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new ESM: its bias is 0, so its logits are the product of its output layer only until it trains."""
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    model = of_folder(write_folder(tmp_path, "EsmConfig", token_dropout=False), pretrained=False)
    trainer = make_trainer(model)
    bias = trainer.networks.generator.base.lm_head.bias
    trainer.begin()
    assert "the logits of EsmForMaskedLM are not the product of its output layer" in caplog.text
    assert not bias.any()
    trainer.train_step(1, 1, Batch(np.full((2, 6), 5), 2, 6), Modes())
    assert bias.any()


@pytest.mark.parametrize(("architecture", "dense"), [("EsmConfig", True), ("BertConfig", False)])
def test_check_says_where_logits_are_computed(tmp_path: Path, architecture: str, dense: bool) -> None:
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    changed = {"token_dropout": False} if dense else {}
    model = of_folder(write_folder(tmp_path, architecture, **changed))
    serve = ServeConfig(device="cpu", micro_batch_tokens=1000)
    state = torch.get_rng_state()
    lines = footprint(model, ObjectiveConfig(), OptimizerConfig(), serve).lines
    (line,) = (line for line in lines if line.startswith("logits"))
    at_all = "no linear map of an embedding: computed at all 1,000 positions of a micro-batch x 41 ids x 3"
    assert (at_all in line) == dense
    assert line.endswith("= 0.5 MiB") == dense
    assert torch.equal(torch.get_rng_state(), state)


def test_an_output_layer_that_is_never_called_leaves_the_models_own_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MobileBERT reads its decoder's weight directly."""
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    trainer = make_trainer(of_folder(write_folder(tmp_path, "MobileBertConfig")))
    trainer.begin()
    assert "the logits of MobileBertForMaskedLM are not the product of its output layer" in caplog.text


def test_a_keyword_may_be_given_as_it_is_by_default() -> None:
    pytest.importorskip("x_transformers")
    make_trainer(of_x_transformers(**MODERN_ENCODER, causal=False, layer_dropout=0.0, use_cls_token=False))


def test_a_gated_unit_of_torch_is_no_fused_map() -> None:
    """x-transformers' attn_on_attn has one, of the same name as its own GLU."""
    pytest.importorskip("x_transformers")
    make_trainer(of_x_transformers(**PLAIN_ENCODER, attn_on_attn=True)).begin()


def test_gains_and_memories_of_x_transformers_do_not_decay() -> None:
    pytest.importorskip("x_transformers")
    options = {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True, "num_memory_tokens": 2,
               "attn_num_mem_kv": 2, "attn_head_scale": True}  # fmt: skip
    group = make_trainer(of_x_transformers(**PLAIN_ENCODER, **options)).generator
    spared = ("qk_norm_q_scale", "qk_norm_k_scale", "memory_tokens", "mem_k", "mem_v", "head_scale_params")
    decaying = {name for name, since in group._decays_since.items() if since == 1}
    assert decaying
    assert not any(name.endswith((*spared, "emb.weight", ".g", "bias")) for name in decaying)
    assert {name.rsplit(".", 1)[1] for name in group.names} > set(spared)


def test_a_folder_without_code_of_its_own_is_not_needed_again(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "model")
    model = of_folder(tmp_path / "model", pretrained=True)
    trusting = model.huggingface.model_copy(update={"trust_remote_code": True})
    shutil.rmtree(tmp_path / "model")
    make_trainer(model.model_copy(update={"huggingface": trusting}))


@pytest.mark.parametrize("keyword", transformer_wrapper.REFUSED)
def test_each_refused_keyword_of_x_transformers_has_its_reason(keyword: str) -> None:
    pytest.importorskip("x_transformers")
    with pytest.raises(ConfigError) as caught:
        make_trainer(of_x_transformers(**MODERN_ENCODER, **{keyword: 7}))
    assert str(caught.value) == (
        f"model.x_transformers.{keyword}: not supported: it {transformer_wrapper.REFUSED[keyword]}"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_scalenorm": True, "use_rmsnorm": True}, "cannot build this model: AssertionError"),
        ({"custom_layers": 3}, "cannot build this model: TypeError: object of type 'int' has no len"),
        ({"attn_latent_rope_subheads": 2}, "ZeroDivisionError"),
        ({"qkv_receive_diff_residuals": True}, "AssertionError"),
        ({"shift_tokens": 1}, "a row must not depend on the other rows or their length"),
        ({"attn_kv_heads": 3}, "AssertionError"),
    ],
)
def test_keywords_that_do_not_go_together_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    pytest.importorskip("x_transformers")
    with pytest.raises(ConfigError, match=rf"^model.*{said}") as caught:
        make_trainer(of_x_transformers(**{**PLAIN_ENCODER, **options})).begin()
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_and_missing_keywords_of_x_transformers_are_named() -> None:
    pytest.importorskip("x_transformers")
    with pytest.raises(ConfigError) as caught:
        make_trainer(of_x_transformers(dim=32, rotary_pos_embs=3))
    assert str(caught.value).splitlines() == [
        "model.x_transformers.rotary_pos_embs: neither TransformerWrapper nor Encoder has this keyword; did "
        "you mean rotary_pos_emb?",
        "model.x_transformers.depth: must be set, got none",
    ]


@pytest.mark.parametrize(
    ("missing", "table", "extra"),
    [
        ("x_transformers", {}, "x-transformers"),
        ("transformers", {}, "huggingface"),
        ("peft", {"lora": {"rank": 2}}, "huggingface"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    missing: str, table: dict[str, Any], extra: str, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_hf = extra == "huggingface"
    model = of_folder(bert, **table) if is_hf else of_x_transformers(**MODERN_ENCODER)
    monkeypatch.setitem(sys.modules, missing, None)
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert any(missing.replace("_", "-") in each for each in project["optional-dependencies"][extra])
    with pytest.raises(ConfigError, match=rf'pip install "maskwire\[{extra}\]"'):
        make_trainer(model)


def test_a_model_of_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"'some/bert' is not a folder here; .*\"maskwire\[huggingface\]\""):
        filled_from_folder(ModelConfig(source="huggingface", mask_id=4, huggingface={"path": "some/bert"}))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["decoder"], "must not name the output layer or a layer that shares its weight, got 'decoder'"),
        (
            ["cls.predictions.decoder"],
            "must not name the output layer or a layer that shares its weight, got 'cls.predictions.decoder'",
        ),
        (["query", "word_embeddings"], "must not name the output layer .*, got 'word_embeddings'"),
        (["nothing"], ".*Target modules .* not found"),
    ],
)
def test_adapters_are_refused_where_they_do_not_fit(bert: Path, targets: list[str], said: str) -> None:
    pytest.importorskip("peft", reason="needs the extra huggingface")
    with pytest.raises(ConfigError, match=rf"model.lora.target_modules: {said}"):
        make_trainer(of_folder(bert, lora={"rank": 2, "target_modules": targets}))


def test_adapters_are_all_that_is_trained_and_averaged(bert: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra huggingface")
    trainer = make_trainer(of_folder(bert, lora={"rank": 2, "dropout": 0.2}), critic="self")
    trainer.begin()
    files = trainer.snapshot().files
    learned = {name for name in files["model.safetensors"] if not name.startswith("critic.")}
    assert learned
    assert all(".lora_" in name for name in learned)
    assert not any(".lora_" in name for name in files[FROZEN_FILE])
    assert files["ema.safetensors"].keys() == files["model.safetensors"].keys()
    moments = {name.rsplit(".", 1)[0] for name in files["optimizer.safetensors"]}
    assert not any(name in files[FROZEN_FILE] for name in moments)
    frozen = {name: tensor.clone() for name, tensor in files[FROZEN_FILE].items()}
    trainer.train_step(1, 1, Batch(np.full((2, 6), 5), 2, 6), Modes())
    after = trainer.snapshot().files[FROZEN_FILE]
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)


def test_the_fingerprint_has_the_versions_of_what_builds_the_model(bert: Path) -> None:
    import peft
    import transformers

    models = {"lora": of_folder(bert, lora={"rank": 2}), "bert": of_folder(bert)}
    versions = {name: make_trainer(model).versions for name, model in models.items()}
    found = {name: fingerprint.fingerprint(every) for name, every in versions.items()}
    assert found["lora"]["fingerprint.transformers"] == transformers.__version__
    assert found["lora"]["fingerprint.peft"] == peft.__version__
    assert "fingerprint.peft" not in found["bert"]
