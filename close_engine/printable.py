r"""Text that cannot trick a terminal or a log: what would not be seen as itself is shown escaped.

Anybody may write what a lead, a provider or a driver says: characters that move the cursor, begin a new line, turn the
direction of writing, or show nothing at all.

>>> printable("who\x1b[2J\n?"), printable("\u202etxt.\u200bexe"), printable("Zoë 🎂")
('who\\x1b[2J\\n?', '\\u202etxt.\\u200bexe', 'Zoë 🎂')
>>> log_value("SEND_MESSAGE"), log_value("x attempt=1"), log_value(None)
('SEND_MESSAGE', '"x attempt=1"', 'None')
"""

from __future__ import annotations

import json
import logging
import re
import traceback

__all__ = ["get_logger", "log_value", "printable"]

#: Letters and marks, as Unicode has it, that show nothing.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0]")


def printable(text: str) -> str:
    """Escape, as Python would, the characters that would not be seen as themselves. The result is one line."""
    if text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable() and not _BLANK.match(character):
        return character
    return character.encode("unicode_escape").decode()


def log_value(value: object) -> str:
    """Format the value of a `key=value` in a log line: quoted if it could be taken for more than one."""
    text = str(value)
    if re.search(r"[\s\"'=]", text) or not text:
        text = json.dumps(text, ensure_ascii=False)
    return printable(text)


class _Printable(logging.Filter):
    """Make an event one line before any handler sees it: its formatter may be the user's."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if printable(message) != message:
            record.msg, record.args = printable(message), None
        if record.exc_info and not record.exc_text:
            # Formatters take this text. A line that an error's own words begin is indented, and so no event.
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n").split("\n")
            record.exc_text = "\n".join(f"    {printable(line)}" for line in lines)
        return True


_filter = _Printable()


def get_logger(name: str) -> logging.Logger:
    """Return the logger of this name. Its events are one line each, plus the indented lines of a traceback."""
    logger = logging.getLogger(name)
    logger.addFilter(_filter)
    return logger
