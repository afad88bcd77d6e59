"""The formats of the log: text for people, JSON for programs. Line ends within a message are escaped."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from maskwire_server import call_context
from maskwire_server.run_status import RunStatus

_LINE_ENDS = {ord(end): repr(end)[1:-1] for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
_OTHER_LINE_ENDS = {end: escaped for end, escaped in _LINE_ENDS.items() if end != ord("\n")}


class TextFormatter(logging.Formatter):
    """Formats a log record as one line of text, followed by the lines of its traceback if it has one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Format a traceback, indented so that text in an exception cannot look like a line of the log."""
        text = super().formatException(ei).translate(_OTHER_LINE_ENDS)
        return textwrap.indent(text, "  ", predicate=lambda _: True)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Format a message, with its line ends escaped."""
        return super().formatMessage(record).translate(_LINE_ENDS)


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON, with the run id, lineage, step and request id if known."""

    def __init__(self) -> None:
        super().__init__()
        self.status: Callable[[], RunStatus] | None = None
        """The run's status, once there is a run."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one JSON object. Fields whose value is not known are absent."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self.status is not None:
            status = self.status()
            if status.run_id:
                line |= {"run_id": status.run_id, "lineage": status.lineage, "step": status.step}
        call = call_context.current.get()
        if call is not None and call.request_id:
            line["request_id"] = call.request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str)


def writes_json() -> bool:
    """Whether the process writes its log as JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def show_run(status: Callable[[], RunStatus]) -> None:
    """Add run id, lineage and step to the process's JSON log from now on. Does nothing for a text log."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonFormatter):
            handler.formatter.status = status
