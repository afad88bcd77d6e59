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
    assert TextFormatter().format(failed).endswith("\nRuntimeError: the reason")


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
