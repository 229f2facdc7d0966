"""How values are shown on a page. Everything is escaped; what a lead wrote can neither move nor hide what is around it.

>>> plain("pay \\u202emoc.elpmaxe\\u202c now")
'pay \ufffdmoc.elpmaxe\ufffd now'
>>> is_link("https://example.com/p/1"), is_link("javascript:alert(1)")
(True, False)
>>> span(timedelta(minutes=95))
'1.6 h'
"""

from __future__ import annotations

import json
import unicodedata
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from close_engine.database.binding import now

__all__ = ["environment", "is_link", "plain", "span"]

#: What turns the direction of the words around it. The marks that languages need are not among them.
_TURNING = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}

#: What people write in capitals.
_INITIALS = {"ai", "sms"}


def plain(value: Any) -> str:
    """Return a text without the characters that hide, move or turn others: a sign stands in their place."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return "".join(
        "\ufffd" if each in _TURNING or (unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t") else each
        for each in text.replace("\r\n", "\n")
    )


def is_link(value: Any) -> bool:
    """Return whether something is an address that a page may lead to."""
    try:
        parts = urlsplit(value) if isinstance(value, str) and value.isprintable() else None
        return parts is not None and parts.scheme in ("https", "http") and bool(parts.hostname)
    except ValueError:
        return False


def span(length: timedelta | None) -> str:
    """Format a length of time in a suitable unit."""
    if length is None:
        return "–"
    seconds = max(length.total_seconds(), 0)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def ago(at: datetime | None) -> str:
    """Format how long ago a moment is, or how long it takes until then."""
    if at is None:
        return "–"
    passed = now() - at
    return f"{span(passed)} ago" if passed >= timedelta(0) else f"in {span(-passed)}"


def moment(at: datetime | None) -> str:
    """Format a moment in UTC."""
    return "–" if at is None else f"{at.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def words(value: Any) -> str:
    """Format a value of JSON: words as they are, anything else as JSON."""
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def human(word: Any) -> str:
    """Format one of our words for people: PREVIEW_SENT is "Preview sent", SMS_REPLY is "SMS reply"."""
    first, _, rest = str(word).lower().partition("_")
    return " ".join([first.upper() if first in _INITIALS else first.capitalize(), *rest.split("_")]).strip()


def environment() -> Environment:
    """Return the templates. A name that a page forgot to give is an error, and everything is escaped."""
    templates = Environment(
        loader=PackageLoader("close_engine.web.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "plain": plain,
        "span": span,
        "ago": ago,
        "moment": moment,
        "words": words,
        "human": human,
        "thousands": lambda number: f"{number:,}",
    }
    templates.tests["link"] = is_link
    return templates
