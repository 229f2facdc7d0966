"""The UPDATE of a stage change, exactly as it is sent, compared with readable files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peewee
import pytest

from close_engine import CloseEngineConversation, Stage
from tests.design import GIVEN, TABLE

GOLDEN = Path(__file__).parent / "golden"

#: Breaks a statement into the lines of the golden files.
CLAUSES = re.compile(r" (?=(?:SET|WHERE(?! conversation_id| r\.)|AND(?! key| close_engine\.| \(SELECT)|RETURNING) )")


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_the_update_of_a_stage_change_is_the_one_in_the_golden_file(
    kind: str, database: peewee.Database, conversation_in: Callable[..., CloseEngineConversation]
) -> None:
    sent: dict[str, str] = {}

    def note(event: Any) -> None:
        if event.sql.startswith('UPDATE "close_engine_conversations"'):
            sent[name] = CLAUSES.sub("\n", event.sql)

    conversations = {trigger: conversation_in(Stage[rule.sources[0]]) for trigger, rule in TABLE.items()}
    conversations["complete"] = conversation_in(Stage.PAYMENT_SENT)
    keyed = conversation_in(Stage.QUALIFYING)
    database.query_hooks.append(note)
    for trigger, conversation in conversations.items():
        name = trigger
        conversation.fire(trigger, **GIVEN.get(trigger, {}))
    name = "collect_info with a key"
    keyed.fire("collect_info", key="SM1")

    shown = "\n\n".join(f"-- {name}\n{sql};" for name, sql in sent.items()) + "\n"
    path = GOLDEN / f"stage_change.{'postgresql' if kind == 'postgresql' else 'sqlite'}.sql"
    assert shown == path.read_text(), f"If the statement is meant to change, write it into {path.name}."
