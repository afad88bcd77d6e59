"""A file, the environment and flags turn limits and intervals off alike, and never an id or a probability."""

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
}  # fmt: skip
NUMBERS = [
    (name, key)
    for name, field in Config.model_fields.items()
    for key, setting in type(field.default).model_fields.items()
    if {int, float} & {setting.annotation, *get_args(setting.annotation)} or key == "betas"
]
NEVER = [each for each in NUMBERS if ".".join(each) not in LIMITS_AND_INTERVALS]
WAYS = ("file", "environment", "flag")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MASKWIRE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a configuration with one setting said in one of the ways, as the commands do."""

    def say(way: str, section: str, key: str, value: str) -> Config:
        file = None
        flags: list[str] = []
        if way == "file":
            file = tmp_path / "c.toml"
            file.write_text(f"[{section}]\n{key} = {value}\n")
        elif way == "environment":
            monkeypatch.setenv(f"MASKWIRE_{section}__{key}".upper(), value.strip('"'))
        else:
            flags = [f"{section}.{key}={value.strip(chr(34))}"]
        return options.loaded(file, None, None, flags)

    return say


def test_what_can_be_off_is_listed_by_name() -> None:
    assert set(can_be_off()) == LIMITS_AND_INTERVALS
    assert len(NEVER) > 30


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(LIMITS_AND_INTERVALS))
def test_a_limit_or_an_interval_is_turned_off(said: Any, way: str, name: str) -> None:
    section, _, key = name.partition(".")
    config = said(way, section, key, '"off"')
    assert getattr(getattr(config, section), key) is None
    assert config.canonical() == Config().canonical()
    recorded = config.model_dump(mode="json")
    assert recorded[section].pop(key) is None, "recorded as what was never set was before"
    expected = Config().model_dump(mode="json")
    expected[section].pop(key)
    assert recorded == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("section", "key"), NEVER)
def test_another_number_is_never_off(
    said: Any, way: str, section: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped:
        said(way, section, key, '"off"')
    assert stopped.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maskwire-server: {section}.{key}: cannot be off: ")
    assert "checkpoints.every_seconds" in line, "what can be"


@pytest.mark.parametrize("way", WAYS)
def test_0_keeps_its_meaning(said: Any, way: str) -> None:
    assert said(way, "model", "pad_id", "0").model.pad_id == 0
    assert said(way, "objective", "augment_prob", "0").objective.augment_prob == 0
    assert said(way, "objective", "critic_loss_weight", "0").objective.critic_loss_weight == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", ['"none"', "0", '""', '"Off"'])
def test_nothing_else_turns_a_limit_off(said: Any, way: str, value: str) -> None:
    with pytest.raises(typer.Exit):
        said(way, "optimizer", "clip_grad_norm", value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", ['"none"', "0", '"OFF"'])
@pytest.mark.parametrize("name", sorted(LIMITS_AND_INTERVALS))
def test_what_others_take_for_off_is_answered_with_the_word_for_it(
    said: Any, way: str, value: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section, _, key = name.partition(".")
    with pytest.raises(typer.Exit):
        said(way, section, key, value)
    line = capsys.readouterr().err
    assert line.startswith(f"maskwire-server: {name}: must be")
    assert '; "off" turns it off, got ' in line


def test_the_word_is_not_offered_where_it_does_not_help(
    said: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("optimizer.clip_grad_norm", "-1"), ("model.dim", "0")):
        section, _, key = name.partition(".")
        with pytest.raises(typer.Exit):
            said("flag", section, key, value)
        assert "turns it off" not in capsys.readouterr().err


def test_a_bare_off_in_a_file_is_told_its_quotes(said: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        said("file", "optimizer", "clip_grad_norm", "off")
    assert 'write clip_grad_norm = "off", with quotes' in capsys.readouterr().err


def test_a_flag_turns_off_what_the_environment_or_the_file_turned_on(
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


def test_a_cosine_needs_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        options.loaded(None, None, None, ["optimizer.schedule=cosine", "optimizer.total_steps=off"])
    assert "total_steps must be set with schedule = 'cosine'" in capsys.readouterr().err


def test_what_is_off_is_off_in_a_file_that_was_written(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {}
    for name in LIMITS_AND_INTERVALS:
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = "off"
    config = load(None, **sections)
    (tmp_path / "c.toml").write_text(template.written(config))
    assert load(tmp_path / "c.toml").model_dump() == config.model_dump()
