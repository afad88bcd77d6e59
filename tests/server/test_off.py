"""The value "off" turns off limits and intervals, in a file, the environment and flags alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from maskwire_server.cli import options
from maskwire_server.config import Config, can_be_off, load, template

LIMITS_AND_INTERVALS = {
    "optimizer.total_steps", "optimizer.clip_grad_norm",
    "checkpoints.every_steps", "checkpoints.every_seconds", "checkpoints.keep_every",
    "distributed.shard",
}  # fmt: skip
NUMBERS = [
    (name, key)
    for name, field in Config.model_fields.items()
    for key, setting in type(field.default).model_fields.items()
    if {int, float} & {setting.annotation, *get_args(setting.annotation)} or key == "betas"
]
NEVER = [each for each in NUMBERS if ".".join(each) not in LIMITS_AND_INTERVALS]
SOURCES = ("file", "environment", "flag")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MASKWIRE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a configuration with one setting from one of the sources, as the commands do."""

    def configure(source: str, section: str, key: str, value: str) -> Config:
        file = None
        flags: list[str] = []
        if source == "file":
            file = tmp_path / "c.toml"
            file.write_text(f"[{section}]\n{key} = {value}\n")
        elif source == "environment":
            monkeypatch.setenv(f"MASKWIRE_{section}__{key}".upper(), value.strip('"'))
        else:
            flags = [f"{section}.{key}={value.strip(chr(34))}"]
        return options.loaded(file, None, None, flags)

    return configure


def test_the_settings_that_can_be_off_are_listed() -> None:
    assert set(can_be_off()) == LIMITS_AND_INTERVALS
    assert len(NEVER) > 30


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", sorted(LIMITS_AND_INTERVALS))
def test_limits_and_intervals_can_be_off(configured: Any, source: str, name: str) -> None:
    section, _, key = name.partition(".")
    config = configured(source, section, key, '"off"')
    assert getattr(getattr(config, section), key) is None
    assert config.canonical() == Config().canonical()
    recorded = config.model_dump(mode="json")
    assert recorded[section].pop(key) is None, "recorded like a setting that was never set"
    expected = Config().model_dump(mode="json")
    expected[section].pop(key)
    assert recorded == expected


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("section", "key"), NEVER)
def test_other_numbers_cannot_be_off(
    configured: Any, source: str, section: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped:
        configured(source, section, key, '"off"')
    assert stopped.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maskwire-server: {section}.{key}: cannot be off: ")
    assert "checkpoints.every_seconds" in line, "the line names what can be off"


@pytest.mark.parametrize("source", SOURCES)
def test_0_means_0(configured: Any, source: str) -> None:
    assert configured(source, "model", "pad_id", "0").model.pad_id == 0
    assert configured(source, "objective", "augment_prob", "0").objective.augment_prob == 0
    assert configured(source, "objective", "critic_loss_weight", "0").objective.critic_loss_weight == 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("value", ['"none"', "0", '""', '"Off"'])
def test_no_other_value_turns_a_limit_off(configured: Any, source: str, value: str) -> None:
    with pytest.raises(typer.Exit):
        configured(source, "optimizer", "clip_grad_norm", value)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("value", ['"none"', "0", '"OFF"'])
@pytest.mark.parametrize("name", sorted(LIMITS_AND_INTERVALS))
def test_values_that_mean_off_elsewhere_get_a_hint(
    configured: Any, source: str, value: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section, _, key = name.partition(".")
    with pytest.raises(typer.Exit):
        configured(source, section, key, value)
    line = capsys.readouterr().err
    assert line.startswith(f"maskwire-server: {name}: must be")
    assert '; "off" turns it off, got ' in line


def test_the_hint_is_left_out_where_it_does_not_help(
    configured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("optimizer.clip_grad_norm", "-1"), ("model.dim", "0")):
        section, _, key = name.partition(".")
        with pytest.raises(typer.Exit):
            configured("flag", section, key, value)
        assert "turns it off" not in capsys.readouterr().err


def test_off_without_quotes_gets_a_hint(configured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        configured("file", "optimizer", "clip_grad_norm", "off")
    assert 'write clip_grad_norm = "off", with quotes' in capsys.readouterr().err


def test_off_in_a_flag_wins_over_the_environment_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[checkpoints]\nevery_steps = 5\nkeep_every = 4\n")
    monkeypatch.setenv("MASKWIRE_CHECKPOINTS__KEEP_EVERY", "off")
    monkeypatch.setenv("MASKWIRE_OPTIMIZER__CLIP_GRAD_NORM", "0.5")
    config = options.loaded(file, None, None, ["checkpoints.every_steps=off", "optimizer.clip_grad_norm=off"])
    assert config.checkpoints.every_steps is None
    assert config.checkpoints.keep_every is None
    assert config.optimizer.clip_grad_norm is None


def test_a_cosine_schedule_needs_total_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        options.loaded(None, None, None, ["optimizer.schedule=cosine", "optimizer.total_steps=off"])
    assert "total_steps must be set with schedule = 'cosine'" in capsys.readouterr().err


def test_a_written_file_keeps_what_is_off(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {}
    for name in LIMITS_AND_INTERVALS:
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = "off"
    config = load(None, **sections)
    (tmp_path / "c.toml").write_text(template.written(config))
    assert load(tmp_path / "c.toml").model_dump() == config.model_dump()
