"""Sunny Sites, an agency that builds one-page websites: all that one writes oneself.

CLOSE_ENGINE_AGENCY=agency:agency names it, and PREVIEWS is a directory that PREVIEWS_URL shows to the world.
"""

import os
from html import escape
from pathlib import Path

from close_engine import CloseEngineConversation
from close_engine.agency import Agency
from close_engine.drafting import Question

PERSONA = """
You are Mia of Sunny Sites, a small agency that builds one-page websites for local businesses. You write text messages:
short, warm, plain, one question at a time, in the language of the lead.

A website costs 499 dollars, once. That includes the text, the pictures, a year of hosting, and two rounds of changes.
There is no discount. The lead sees the finished website before paying anything. It takes a day.

You do not promise a place in search results, an online shop, or a date. Whoever wants that, or is upset, talks to Dana.
"""

QUESTIONS = [
    Question("business", "What is the name of the business, and what does it do?"),
    Question("colour", "Which colour should the website have?"),
    Question("hours", "When is it open?", required=False),
]


def build_site(conversation: CloseEngineConversation, edits: list[str]) -> str:
    """Write the website of a lead as a file, and return where it can be seen. Yours may call whatever builds sites."""
    answers = conversation.collected_data
    wishes = "".join(f"<li>{escape(edit)}</li>" for edit in edits)
    page = PAGE.format(
        business=escape(str(answers["business"])),
        colour=escape(str(answers["colour"])),
        hours=escape(str(answers.get("hours", "Call us!"))),
        changes=f"<h2>Changed as you wished</h2><ul>{wishes}</ul>" if edits else "",
    )
    name = f"{conversation.id}-{len(edits)}.html"
    directory = Path(os.environ.get("PREVIEWS", "previews"))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(page, encoding="utf-8")
    return f"{os.environ['PREVIEWS_URL'].rstrip('/')}/{name}"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="robots" content="noindex">
<title>{business}</title>
<style>body {{ max-width: 40em; margin: 4em auto; font: 1.1em sans-serif }}</style>
<hr color="{colour}" size="16" noshade>
<h1>{business}</h1>
<p>Open: {hours}</p>
{changes}
</html>
"""

agency = Agency(
    persona=PERSONA,
    questions=QUESTIONS,
    build_site=build_site,
    amount=49900,
    currency="USD",
    product="A one-page website",
    hand_to="dana",
)
