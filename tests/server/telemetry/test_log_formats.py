"""The formats of the log."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from rig import WAIT, Rig, bare

from maskwire_server import call_context
from maskwire_server.call_context import CallContext
from maskwire_server.error_output import say
from maskwire_server.errors import ConfigError
from maskwire_server.telemetry.log_formats import JsonFormatter, TextFormatter

INJECTED = "name 'a\n12:00:00 ERROR   forged\r\u2028\x85\x1eend'"


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    return logging.LogRecord(
        "maskwire_server.x", logging.WARNING, "", 0, message, arguments, sys.exc_info() if error else None
    )


def test_what_a_message_quotes_cannot_begin_a_line_in_either_format() -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record("refused %s", INJECTED))
        assert len(line.splitlines()) == 1
        assert "forged" in line
    assert json.loads(line)["message"] == f"refused {INJECTED}"


def test_a_traceback_is_a_field_of_one_json_object_and_lines_of_text() -> None:
    try:
        raise RuntimeError("the reason")
    except RuntimeError:
        failed = record("step %d failed", 3, error=True)
    line: dict[str, Any] = json.loads(JsonFormatter().format(failed))
    assert line["message"] == "step 3 failed"
    assert line["exception"].endswith("RuntimeError: the reason")
    assert (line["level"], line["logger"]) == ("warning", "maskwire_server.x")
    failed.exc_text = None
    assert TextFormatter().format(failed).endswith("\n  RuntimeError: the reason")


def test_what_an_exception_quotes_cannot_look_like_a_line_of_the_log() -> None:
    try:
        try:
            raise KeyError("the cause")
        except KeyError as cause:  # the traceback has blank lines between the two
            raise ValueError(INJECTED) from cause
    except ValueError:
        failed = record("step %d failed", 3, error=True)
    first, *traceback = TextFormatter().format(failed).splitlines()
    assert first.endswith("step 3 failed")
    assert "12:00:00 ERROR   forged" in traceback[-1]
    assert all(line.startswith("  ") for line in traceback)


def test_the_error_that_ends_the_server_is_an_object_of_a_json_log(
    json_log: logging.FileHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    say(ConfigError("serve.window must be at least 1, got 0\nmodel.dim must be set"))
    lines = [json.loads(line) for line in Path(json_log.baseFilename).read_text().splitlines()]
    assert [line["message"] for line in lines] == [
        "serve.window must be at least 1, got 0", "model.dim must be set",
    ]  # fmt: skip
    assert {line["level"] for line in lines} == {"critical"}
    assert capsys.readouterr().err == ""


def test_the_error_that_ends_the_server_is_a_plain_line_beside_a_text_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(ConfigError("serve.window must be at least 1, got 0"))
    assert capsys.readouterr().err == "maskwire-server: serve.window must be at least 1, got 0\n"


@pytest.fixture
def json_log(tmp_path: Path) -> Any:
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(JsonFormatter())
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_a_line_names_the_run_its_step_and_the_request_that_the_thread_works_for(
    rig: Rig, json_log: logging.FileHandler
) -> None:
    engine = rig.start()
    assert isinstance(json_log.formatter, JsonFormatter)
    json_log.formatter.status = engine.status
    engine.train_step(bare(1)).result(WAIT)
    token = call_context.current.set(CallContext(7, "request-of-step-2"))
    failing = engine.train_step(bare(2, first=8))
    call_context.current.reset(token)
    assert failing.exception(WAIT) is not None
    lines = [json.loads(line) for line in Path(json_log.baseFilename).read_text().splitlines()]
    (line,) = [line for line in lines if "step 2 failed" in line["message"]]
    status = engine.status()
    assert (line["run_id"], line["lineage"], line["step"]) == (status.run_id, 1, 1)
    assert line["request_id"] == "request-of-step-2"
    assert all("request_id" not in line for line in lines if "state" in line["message"])
