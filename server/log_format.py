"""How log lines look: plain text, or one JSON object per line; one record is always one line."""

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

# What a terminal or a reader of lines takes for a line break or a command.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def escape_controls(text: str) -> str:
    """The text in one line: what clients send can neither begin a line nor steer a terminal."""
    return CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


class TextFormatter(logging.Formatter):
    """Lines for people; only the lines of a traceback follow, and those are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback below it."""
        message = escape_controls(record.getMessage())
        lines = [f"{self.formatTime(record)} {record.levelname} {record.name}: {message}"]
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            lines += [f"    {escape_controls(line)}" for line in trace]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object per record, in ASCII.

    A record may bring `fields`, which become fields of the object, and `short`, which then stands
    for its message.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The object of a record."""
        ts = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        values: dict[str, object] = {
            "ts": ts.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": getattr(record, "short", None) or record.getMessage(),
        }
        fields: Mapping[str, object] = getattr(record, "fields", {})
        values.update((name, value) for name, value in fields.items() if name not in values)
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def configure_logging(level: str, log_format: Literal["text", "json"] = "text") -> None:
    """Lines on standard error, for our own modules, for uvicorn and for warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))


def is_json() -> bool:
    """Whether lines are JSON, so that nothing else may be printed among them."""
    return any(isinstance(h.formatter, JsonFormatter) for h in logging.getLogger().handlers)


def say(level: int, text: str) -> None:
    """Print what must be seen at every log level: a line of its own, or a record among JSON."""
    line = f"infmoe: error: {text}" if level >= logging.ERROR else f"infmoe: {text}"
    if is_json():
        record = logging.LogRecord("infmoe", level, __file__, 0, text, None, None)
        logging.getLogger().handle(record)
    else:
        sys.stderr.write(f"{escape_controls(line)}\n")
        sys.stderr.flush()
