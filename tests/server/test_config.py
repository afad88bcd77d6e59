"""The configuration: its sources, its defaults, and its error messages of one line each."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import fork_server
import pytest

import maskwire
from maskwire_server import config
from maskwire_server.cli import options
from maskwire_server.cli.init import RECIPE
from maskwire_server.config import Config, ObjectiveConfig, load
from maskwire_server.config.record import ALWAYS_RECORDED
from maskwire_server.config.sections import SECTIONS
from maskwire_server.config.template import template, written
from maskwire_server.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("MASKWIRE_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("model", {"depth": 0}, "model.depth: must be greater than or equal to 1, got 0"),
        ("model", {"mask_id": 300}, "model: mask_id must be below num_tokens = 257, got 300"),
        ("model", {"pad_id": 256}, "model: pad_id must differ from mask_id, got 256 for both"),
        ("model", {"positions": "alibi"}, "model.positions: must be 'learned' or 'rotary'"),
        ("model", {"dim_head": 7, "positions": "rotary"}, "model: dim_head must be even"),
        ("model", {"heads": 4, "kv_heads": 3}, "model: kv_heads must divide heads = 4, got 3"),
        ("model", {"kv_heads": 0}, "model.kv_heads: must be greater than or equal to 1, got 0"),
        ("model", {"positions": "rotary", "rotary_dim": 66},
         "model: rotary_dim must be even and at most dim_head = 64, got 66"),
        ("model", {"positions": "rotary", "rotary_dim": 7}, "model: rotary_dim must be even"),
        ("model", {"rotary_pairs": "interleaved"},
         'model: rotary_pairs needs positions = "rotary", got interleaved without it; set both or neither'),
        ("model", {"qk_norm_scale": 10}, "model: qk_norm_scale needs qk_norm = true, got 10.0 without it"),
        ("model", {"attn_dropout": 1}, "model.attn_dropout: must be less than 1, got 1"),
        ("model", {"rms_norm_eps": 0}, "model.rms_norm_eps: must be greater than 0, got 0"),
        ("objective", {"schedule": "cubic"}, "objective.schedule: must be 'linear', 'cosine' or"),
        ("objective", {"schedule": "my.module:1st"},
         "objective.schedule: must be 'linear', 'cosine' or 'quadratic', or a function of your own"),
        ("objective", {"schedule_sha256": "0" * 64},
         "objective: schedule_sha256 applies only to a schedule function of your own: leave it"),
        ("objective", {"no_replace_prob": 0.9, "random_token_prob": 0.2},
         "objective: no_replace_prob + random_token_prob must be at most 1, got 1.1"),
        ("optimizer", {"learning_rate": -1}, "optimizer.learning_rate: must be greater than"),
        ("optimizer", {"learning_rate": float("inf")}, "optimizer.learning_rate: must be finite, got inf"),
        ("optimizer", {"schedule": "cosine"}, "optimizer: total_steps must be set"),
        ("optimizer", {"schedule": "cosine", "total_steps": 50},
         "optimizer: total_steps must be above warmup_steps = 100, got 50"),
        ("optimizer", {"groups": [{"match": "*"}, {"lr_scale": 2}]}, "optimizer.groups.1.match: must be set"),
        ("optimizer", {"groups": [{"match": ""}]}, "optimizer.groups.0.match: string should have at least 1"),
        ("optimizer", {"groups": [{"match": "*", "lr_scale": -1}]},
         "optimizer.groups.0.lr_scale: must be greater than or equal to 0, got -1"),
        ("optimizer", {"groups": [{"match": "*", "lrscale": 1}]}, "optimizer.groups.0.lrscale: unknown key"),
        ("optimizer", {"groups": [{"match": "*", "weight_decay": "off"}]},
         "optimizer.groups.0.weight_decay: cannot be off: leave it out for"),
        ("optimizer", {"groups": [{"match": "*", "lr_scale": "off"}]},
         "optimizer.groups.0.lr_scale: cannot be off: give it a value"),
        ("optimizer", {"groups": ["blocks.*"]}, "optimizer.groups.0: must be a valid dictionary"),
        ("optimizer", {"groups": "off"}, "optimizer.groups: cannot be off"),
        ("optimizer", {"groups": "blocks.*"}, "optimizer.groups: must be a valid tuple, got 'blocks.*'"),
        ("serve", {"address": "localhost"}, "serve: address must be HOST:PORT with a port of 0"),
        ("serve", {"device": "tpu"}, "serve.device: string should match pattern"),
        ("serve", {"windw": 3}, "serve.windw: unknown key"),
        ("checkpoints", {"keep_last": 1}, "checkpoints.keep_last: must be greater than or equal to 2, got 1"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_reported_in_one_line(section: str, values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(None, **{section: values})
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "192.168.1.2:1", "example.org:80", "[::]:1"])
def test_plaintext_beyond_loopback_is_rejected_unless_it_is_allowed(address: str) -> None:
    with pytest.raises(ConfigError, match=r"must be on loopback .*ssh -L"):
        load(None, serve={"address": address})
    assert load(None, serve={"address": address, "allow_insecure": True}).serve.address == address


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:50051", "[::1]:9", "127.9.9.9:1"])
def test_loopback_addresses_are_recognised(address: str) -> None:
    assert load(None, serve={"address": address}).serve.address == address


def test_flags_win_over_the_environment_and_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[model]\ndim = 64\ndepth = 3\nheads = 1\n")
    monkeypatch.setenv("MASKWIRE_MODEL__DEPTH", "7")
    monkeypatch.setenv("MASKWIRE_MODEL__HEADS", "5")
    model = load(file, model={"heads": 2}).model
    assert (model.dim, model.depth, model.heads, model.dim_head) == (64, 7, 2, 64)


GROUPS = [
    {"match": "blocks.*", "lr_scale": 0.5},
    {"match": 'a"b\\c\u00fc', "train": False, "weight_decay": 0.0},
]
IN_TOML = (
    """[{match = "blocks.*", lr_scale = 0.5}, {match = 'a"b\\c\u00fc', train = false, weight_decay = 0.0}]"""
)


@pytest.mark.parametrize("source", ["tables", "file", "environment", "json", "flag", "written"])
def test_parameter_groups_are_read_from_every_source(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, flags = tmp_path / "c.toml", []
    file.write_text("")
    if source == "tables":
        file.write_text(
            '[optimizer]\nlearning_rate = 0.5\n[[optimizer.groups]]\nmatch = "blocks.*"\nlr_scale = 0.5\n'
            "[[optimizer.groups]]\nmatch = 'a\"b\\c\u00fc'\ntrain = false\nweight_decay = 0.0\n"
        )
    elif source == "file":
        file.write_text(f"[optimizer]\ngroups = {IN_TOML}\n")
    elif source == "written":
        file.write_text(written(load(None, optimizer={"groups": GROUPS})))
    elif source == "flag":
        flags = [f"optimizer.groups={IN_TOML}"]
    else:
        value = IN_TOML if source == "environment" else json.dumps(GROUPS)
        monkeypatch.setenv("MASKWIRE_OPTIMIZER__GROUPS", value)
    groups = options.loaded(file, None, None, flags).optimizer.groups
    assert groups == tuple(config.ParameterGroup(**group) for group in GROUPS)  # type: ignore[arg-type]
    recorded = json.loads(
        json.dumps(load(None, optimizer={"groups": GROUPS}).optimizer.model_dump(mode="json"))
    )
    assert config.OptimizerConfig(**recorded).groups == groups


@pytest.mark.parametrize("value", ["[{match =", "[{match = 3}]", "[3]"])
def test_groups_that_cannot_be_read_are_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKWIRE_OPTIMIZER__GROUPS", value)
    with pytest.raises(ConfigError, match=r"^optimizer\.groups(\.0(\.match)?)?: "):
        load(None)


def test_a_missing_or_malformed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: no such file; `maskwire-server init` writes one"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match=r"bad.toml: "):
        load(tmp_path / "bad.toml")


def test_a_preset_sets_the_keys_that_are_not_set() -> None:
    assert ObjectiveConfig().loss_is_bound
    maskgit = load(None, objective={"preset": "maskgit"}).objective
    assert (maskgit.schedule, maskgit.weighting, maskgit.loss_is_bound) == ("cosine", "masked_mean", False)
    reference = load(None, objective={"preset": "x-transformers", "augment_prob": 1.0}).objective
    assert (reference.no_replace_prob, reference.random_token_prob, reference.augment_prob) == (
        0.15,
        0.1,
        1.0,
    )
    cmlm = load(None, objective={"preset": "cmlm", "random_token_prob": 0.0}).objective
    assert (cmlm.no_replace_prob, cmlm.random_token_prob, cmlm.weighting) == (0.1, 0.0, "masked_mean")


def test_only_the_fixed_settings_are_in_the_canonical_bytes() -> None:
    start = Config().canonical()
    assert load(None, optimizer={"learning_rate": 0.5}, serve={"window": 2}).canonical() == start
    assert load(None, model={"dim": 64}).canonical() != start
    assert load(None, objective={"critic": "self"}).canonical() != start


def test_the_template_loads_as_the_defaults_with_and_without_its_comment_marks(tmp_path: Path) -> None:
    text = template()
    file = tmp_path / "t.toml"
    file.write_text(text)
    assert load(file).model_dump() == Config().model_dump()
    settings = re.sub(r"^# (\w+ = (?!  \(not set\)))", r"\1", text, flags=re.MULTILINE)
    assert len(tomllib.loads(settings)["model"]) >= 14
    file.write_text(settings)
    assert load(file).model_dump() == Config().model_dump()
    for section in Config.model_fields:
        for key in type(getattr(Config(), section)).model_fields:
            assert re.search(rf"^# {key} = ", text, re.MULTILINE), f"{section}.{key}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return fork_server.run([Path(sys.executable).with_name("maskwire-server"), *arguments], text=True)


def test_the_server_reports_each_mistake_in_a_line_and_does_not_start(tmp_path: Path) -> None:
    done = run(
        "serve",
        "--set",
        "model.depth=0",
        "--set",
        "optimizer.learning_rate=-1",
        "--run-dir",
        str(tmp_path / "r"),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "maskwire-server: model.depth: must be greater than or equal to 1, got '0'",
        "maskwire-server: optimizer.learning_rate: must be greater than or equal to 0, got '-1'",
    ]
    assert not (tmp_path / "r").exists()
    assert (
        run("serve", "--set", "depth=1").stderr.strip().endswith("must be SECTION.KEY=VALUE, got 'depth=1'")
    )


def test_init_writes_the_recipe_and_leaves_the_rest_at_its_default(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    assert run("init", str(file)).returncode == 0
    assert load(file).model_dump() == load(None, **RECIPE).model_dump()
    assert load(file).optimizer.name == "muon"


def test_init_does_not_overwrite_and_check_reports_memory(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    assert run("init", str(file)).returncode == 0
    again = run("init", str(file))
    assert again.returncode == 2
    assert "--force" in again.stderr
    narrow = ("--set", "model.dim=32", "--set", "model.depth=1", "--set", "optimizer.name=adamw")
    small = run("check", "--config", str(file), *narrow)
    assert small.returncode == 0
    assert "parameters" in small.stdout
    assert "fits" in small.stdout
    parameters = int(re.findall(r"parameters +([\d,]+)", small.stdout)[0].replace(",", ""))
    assert (
        f"weights {parameters:,} + gradients {parameters:,} + AdamW's two moments {2 * parameters:,})"
        in small.stdout
    )
    assert f"checkpoint copy {3 * parameters:,} numbers x 4 bytes" in small.stdout, "all but the gradients"
    huge = run("check", "--config", str(file), "--set", "model.dim=65536", "--set", "model.depth=99")
    assert huge.returncode == 1
    assert "does not fit" in huge.stdout


def test_check_reports_the_layouts_of_ranks() -> None:
    small = ("check", "--set", "model.dim=32", "--set", "model.depth=1", "--ranks", "2", "--nodes", "2")
    fits = run(*small, "--memory", "80GiB")
    assert fits.returncode == 0, fits.stderr
    assert "ranks           2 on each of 2 hosts = 4; on cuda, 80.00 GiB for each" in fits.stdout
    assert re.findall(r"layout +(replicate \d x shard \d)", fits.stdout) == [
        f"replicate {4 // shard} x shard {shard}" for shard in (1, 2, 4)
    ]
    assert "recommended     --set distributed.replicate=4 --set distributed.shard=1" in fits.stdout
    assert "configured      replicate 1 x shard 4: fits" in fits.stdout
    other = run(*small, "--set", "distributed.replicate=3")
    assert other.returncode == 2
    assert "replicate x shard must be the number of ranks, 4, got 3 x off" in other.stderr
    too_small = run(*small, "--memory", "1 MB")
    assert too_small.returncode == 1
    assert "1.0 MiB for each" in too_small.stdout
    assert too_small.stdout.endswith("or model.num_tokens\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "80GiB"], "--memory needs --ranks"),
        (["--nodes", "2"], "--nodes needs --ranks"),
        (["--ranks", "2", "--memory", "80"], "for example 80GiB or 80GB, got '80'"),
        (["--ranks", "2", "--memory", "0GiB"], "got '0GiB'"),
        (["--ranks", "0"], "--ranks"),
    ],
    ids=str,
)
def test_ranks_that_check_cannot_plan_for_are_refused(arguments: list[str], words: str) -> None:
    done = run("check", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_the_server_command_prints_its_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"{maskwire.__version__}\n")
    assert "import-x-transformers" in run().stdout


def test_the_log_says_which_run_is_served_and_whether_a_file_was_read(tmp_path: Path) -> None:
    file, run_dir = tmp_path / "c.toml", tmp_path / "run"
    file.write_text("[model]\ndepth = 1\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that the command fails and ends
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for config_file, words in ((["--config", str(file)], False), ([], True)):
            done = run("serve", *config_file, "--run-dir", str(run_dir), "--address", address)
            assert done.returncode == 2
            assert f"run directory: {run_dir}\n" in done.stderr
            assert ("no configuration file (--config): using the defaults" in done.stderr) is words


def test_each_preset_is_a_choice_of_the_setting() -> None:
    assert config.PRESETS.keys() == {"mdlm", "maskgit", "cmlm", "x-transformers"}


def test_every_section_has_a_module_of_its_name() -> None:
    assert {name: type(field.default) for name, field in Config.model_fields.items()} == SECTIONS
    for name, section in SECTIONS.items():
        assert section.__module__ == f"maskwire_server.config.{name}"


def test_a_path_that_the_locale_cannot_decode_names_the_locale() -> None:
    with pytest.raises(ConfigError) as found:
        load(None, run={"dir": "/tmp/\udcc3\udcbcn"})  # how Python decodes it in an ASCII locale
    assert "the path is UTF-8, but this process runs in an ASCII locale" in str(found.value)
    assert "got '/tmp/\xfcn': set LC_ALL=C.UTF-8 or PYTHONUTF8=1" in str(found.value)
    with pytest.raises(ConfigError, match=r"the path must be UTF-8, got b'/tmp/\\xfcn'"):
        load(None, run={"dir": "/tmp/\udcfcn"})


def test_a_later_option_is_recorded_only_if_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the option `norm` were newer than the first format of the record.
    before = Config().canonical()
    monkeypatch.setitem(ALWAYS_RECORDED, "model", ALWAYS_RECORDED["model"] - {"norm"})
    record = json.loads(Config().canonical())
    assert record["model"] == {k: v for k, v in json.loads(before)["model"].items() if k != "norm"}
    changed = load(None, model={"norm": "rmsnorm"})
    assert json.loads(changed.canonical())["model"]["norm"] == "rmsnorm"
    assert Config().of_run(0, Config().canonical()).model.norm == "layernorm"


LATER: dict[str, Any] = {
    "kv_heads": 2, "emb_dropout": 0.1, "attn_dropout": 0.0, "ff_dropout": 0.2, "rotary_dim": 32,
    "rotary_pairs": "interleaved", "rotary_base": 500.0, "rms_norm_eps": 1e-5, "ff_bias": False,
    "ff_down_bias": True, "qk_norm_gain": "per_head", "qk_norm_scale": 10.0,
}  # fmt: skip
"""Options of the encoder that are newer than the first record, each with a value that is not the default."""


def test_options_of_the_encoder_after_the_first_record_are_recorded_only_if_they_are_set() -> None:
    base = {"positions": "rotary", "qk_norm": True}
    plain = load(None, model=base)
    recorded = json.loads(plain.canonical())["model"]
    assert not recorded.keys() & LATER.keys()
    for key, value in LATER.items():
        assert getattr(plain.model, key) != value
        one = load(None, model={**base, key: value})
        assert json.loads(one.canonical())["model"] == {**recorded, key: value}
        assert Config().of_run(0, one.canonical()).model == one.model
    default = {key: getattr(plain.model, key) for key in LATER if getattr(plain.model, key) is not None}
    assert load(None, model={**base, **default}).canonical() == plain.canonical()


def test_the_first_record_stays_the_same_bytes() -> None:
    sha = hashlib.sha256(Config().canonical()).hexdigest()
    assert sha == "e03aac0fa7439ba71e50b214b45c76e52addae1220109f637872d52a05422ba0"


def test_tables_of_any_type_take_numbers_from_flags_and_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from maskwire_server.cli.options import loaded

    monkeypatch.setenv("MASKWIRE_MODEL__X_TRANSFORMERS__DEPTH", "3")
    monkeypatch.setenv("MASKWIRE_MODEL__X_TRANSFORMERS__POST_EMB_NORM", "true")
    flags = ["model.source=x-transformers", "model.x_transformers.dim=32", "model.x_transformers.ff_glu=true"]
    wanted = {"depth": 3, "post_emb_norm": True, "dim": 32, "ff_glu": True}
    assert loaded(None, None, None, flags).model.x_transformers == wanted
    monkeypatch.delenv("MASKWIRE_MODEL__X_TRANSFORMERS__DEPTH")
    monkeypatch.delenv("MASKWIRE_MODEL__X_TRANSFORMERS__POST_EMB_NORM")
    monkeypatch.setenv("MASKWIRE_MODEL__PYTHON__OPTIONS__DIM", "24")
    flags = ["model.source=python", "model.python.factory=a:b", "model.python.options.name=small"]
    python = loaded(None, None, None, flags).model.python
    assert python is not None
    assert python.options == {"dim": 24, "name": "small"}
