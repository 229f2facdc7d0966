"""What carriers define: the form of a phone number, and the words by which people opt out of texts.

>>> e164("(0044) 20 7946 0958")
'+442079460958'
>>> lexicon()[spelling("  Stop! ")]
<Keyword.OPT_OUT: 'OPT_OUT'>
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from enum import Enum
from typing import Any

from close_engine.errors import ConfigurationError

try:
    import phonenumbers
except ImportError:  # an extra: close-engine[phone]
    phonenumbers = None  # type: ignore[assignment]

__all__ = ["KEYWORDS", "Keyword", "e164", "lexicon", "require_region", "spelling"]

#: No number is longer. PostgreSQL's index could not hold all the digits that somebody may write.
_MOST_DIGITS = 40


class Keyword(Enum):
    """What a text asks for that consists of one of the carriers' words."""

    OPT_OUT = "OPT_OUT"
    OPT_IN = "OPT_IN"
    HELP = "HELP"


#: The carriers' words. Case, spaces and punctuation do not matter.
KEYWORDS: Mapping[str, Keyword] = {
    **dict.fromkeys(
        ("STOP", "STOPALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"),
        Keyword.OPT_OUT,
    ),
    **dict.fromkeys(("START", "UNSTOP"), Keyword.OPT_IN),
    "HELP": Keyword.HELP,
}


def spelling(text: str) -> str:
    """Return what counts of a text that may be a keyword: its letters and digits, in one case."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(character for character in folded if character.isalnum())


def lexicon(words: Mapping[str, Keyword] | None = None) -> dict[str, Keyword]:
    """Return the keywords by their spelling.

    Args:
        words: the words instead of `KEYWORDS`.

    Raises:
        ConfigurationError: a word has no letters, or no Keyword.
    """
    found: dict[str, Keyword] = {}
    for word, keyword in (KEYWORDS if words is None else words).items():
        if not isinstance(keyword, Keyword):
            raise ConfigurationError(f"The word {word!r} must stand for a Keyword, such as Keyword.OPT_OUT.")
        if not isinstance(word, str) or not spelling(word):
            raise ConfigurationError(f"{word!r} cannot be a keyword: a word must have letters.")
        found[spelling(word)] = keyword
    return found


def require_region(region: str | None) -> None:
    """Refuse a region that phone numbers cannot be read by.

    Raises:
        ConfigurationError: it is no region, or the library that knows the regions is not installed.
    """
    if region is None:
        return
    if phonenumbers is None:
        raise ConfigurationError(
            f"The region {region!r} is of no use without the library phonenumbers: pip install close-engine[phone]."
        )
    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise ConfigurationError(f"There is no region {region!r}: give two letters, such as US.")


def e164(phone: Any, region: str | None = None) -> str | None:
    """Return a phone number in the one form of E.164, however it is written.

    Without the library phonenumbers, and if it cannot read the number, it is its digits as given; then `00` at the
    beginning is the same as `+`.

    Args:
        phone: what stands in the CRM.
        region: where numbers without a country code are from.

    Returns:
        str; None if it has no digits.
    """
    text = unicodedata.normalize("NFKC", "" if phone is None else str(phone))
    digits = "".join(str(unicodedata.digit(character)) for character in text if character.isdecimal())
    is_international = "+" in text[: next((place for place, each in enumerate(text) if each.isdecimal()), 0)]
    if not is_international and digits.startswith("00") and region is None:
        is_international, digits = True, digits.removeprefix("00")
        text = f"+{digits}"
    if not digits:
        return None
    as_given = (f"+{digits}" if is_international else digits)[:_MOST_DIGITS]
    if phonenumbers is None:
        return as_given
    try:
        read = phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        return as_given
    formatted: str = phonenumbers.format_number(read, phonenumbers.PhoneNumberFormat.E164)
    return formatted
