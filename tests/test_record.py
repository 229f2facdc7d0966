"""Questions and answers are merged in the database: none are overwritten, and the lead gets them, too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    CloseEngineConversation,
    ConversationNotFound,
    EntryPoint,
    InvalidValue,
    Lead,
    Stage,
    StageConflict,
)
from close_engine.testing import MovableClock, new_lead
from tests.command_line import background
from tests.rows import copy_of
from tests.workers import held, race, sql

ConversationIn = Callable[..., CloseEngineConversation]


def kept(conversation: CloseEngineConversation) -> tuple[Any, Any, Any]:
    """Return what the conversation and its lead hold in the database."""
    row = copy_of(conversation)
    return row.questions_asked, row.collected_data, Lead.get_by_id(row.lead_id).qualification_data


def test_questions_are_kept_once_in_the_order_in_which_they_came(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.record(questions=["hours", "prices", "hours"])
    conversation.record(questions=["logo", "prices", "colours"])
    assert conversation.questions_asked == ["hours", "prices", "logo", "colours"]
    assert kept(conversation) == (["hours", "prices", "logo", "colours"], None, None)


def test_answers_are_merged_key_by_key_and_copied_to_the_lead(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.record(data={"name": "Ada's Bakery", "hours": {"mon": "9-5", "tue": None}})
    conversation.record(data={"hours": {"mon": "8-4"}, "phone": None})
    merged = {"name": "Ada's Bakery", "hours": {"mon": "8-4"}, "phone": None}
    assert conversation.collected_data == merged
    assert kept(conversation) == (None, merged, merged)


def test_none_replaces_an_answer_by_null_and_removes_nothing(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.record(data={"name": "Ada", "logo": "a.png"})
    conversation.record(data={"logo": None})
    assert kept(conversation)[1:] == ({"name": "Ada", "logo": None},) * 2


def test_questions_and_answers_can_be_recorded_together(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.record(questions=["name"], data={"name": "Ada"})
    assert kept(conversation) == (["name"], {"name": "Ada"}, {"name": "Ada"})


def test_nothing_recorded_writes_nothing(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    before = copy_of(conversation).__data__
    conversation.record()
    conversation.record(questions=[], data={})
    assert copy_of(conversation).__data__ == before


DEEP: object = "the bottom"
for level in range(45):
    DEEP = {"level": level, "below": [DEEP, None, True]}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(DEEP, id="deep"),
        pytest.param("é日本🍞\u2028\\\" ' %s {outbox} \u001f", id="odd characters"),
        pytest.param({"日本": {"": [], "{}": {}}}, id="odd keys"),
        pytest.param([0, -1, 2**53, 0.1, 1e-7, -12.5, False, None, "", [], {}], id="every kind of value"),
    ],
)
def test_any_json_comes_back_as_it_went_in(conversation_in: ConversationIn, answer: object) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.record(data={"answer": answer, "other": 1})
    conversation.record(questions=["q"], data={"later": answer})
    expected = {"answer": answer, "other": 1, "later": answer}
    assert kept(conversation) == (["q"], expected, expected)
    assert json.dumps(conversation.collected_data, sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_a_document_of_half_a_megabyte_is_merged_into_another(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    pages = {f"page {number}": "lorem ipsum é " * 34 for number in range(1000)}
    conversation.record(data={"first": pages})
    conversation.record(data={"second": pages})
    assert len(json.dumps(pages, ensure_ascii=False)) > 450_000
    assert kept(conversation)[1:] == ({"first": pages, "second": pages},) * 2


@pytest.mark.parametrize(
    ("questions", "data"), [("null", "null"), ("{}", "[]"), ('{"a": 1}', '["a"]'), ('"text"', '"text"'), ("7", "false")]
)
def test_what_a_foreign_writer_left_in_another_shape_gives_way(
    conversation_in: ConversationIn, questions: str, data: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    columns = "questions_asked = %s, collected_data = %s"
    sql(f"UPDATE close_engine_conversations SET {columns} WHERE id = %s", questions, data, conversation.id)
    conversation.record(questions=["name"], data={"name": "Ada"})
    assert kept(conversation) == (["name"], {"name": "Ada"}, {"name": "Ada"})


def test_what_a_foreign_writer_left_in_the_right_shape_is_kept(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    columns = "questions_asked = %s, collected_data = %s"
    odd = '["a", {"id": 1}, "a", null]'
    sql(f"UPDATE close_engine_conversations SET {columns} WHERE id = %s", odd, '{"a": [1]}', conversation.id)
    conversation.record(questions=["a", "b"], data={"b": 2})
    assert kept(conversation) == (["a", {"id": 1}, None, "b"], {"a": [1], "b": 2}, {"a": [1], "b": 2})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"questions": "name"}, "questions"),
        ({"questions": [7]}, "questions"),
        ({"questions": ["a\x00"]}, "questions"),
        ({"data": {"a": float("nan")}}, "data"),
        ({"data": {7: "a"}}, "data"),
        ({"data": {"a": {"b": object()}}}, "data"),
        ({"data": {"a": "\ud800"}}, "data"),
        ({"data": [["a", "b"]]}, "data"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(
    conversation_in: ConversationIn, given: dict[str, Any], field: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    before = copy_of(conversation).__data__
    with pytest.raises(InvalidValue) as refused:
        conversation.record(**given)
    assert refused.value.field == field
    assert copy_of(conversation).__data__ == before == conversation.__data__


def test_answers_are_recorded_in_every_stage(conversation_in: ConversationIn) -> None:
    for stage in Stage:
        conversation = conversation_in(stage)
        conversation.record(data={"name": "Ada"})
        assert kept(conversation)[1:] == ({"name": "Ada"},) * 2
        assert copy_of(conversation).stage is stage


def test_the_object_holds_what_a_reload_gives_and_can_go_on(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    version = conversation.updated_at
    conversation.record(questions=["q"], data={"a": (1, 2)})
    assert conversation.__data__ == copy_of(conversation).__data__
    assert not conversation._dirty
    assert conversation.updated_at > version
    conversation.collect_info()


def test_a_stale_object_records_and_is_still_in_conflict(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    copy_of(conversation).collect_info()
    conversation.record(data={"name": "Ada"})
    assert conversation.collected_data == {"name": "Ada"}
    with pytest.raises(StageConflict) as conflict:
        conversation.start_building()
    assert (conflict.value.expected, conflict.value.found) == (Stage.QUALIFYING, Stage.COLLECTING_INFO)


def test_answers_of_two_workers_with_old_copies_are_both_kept(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    other = copy_of(conversation)
    conversation.record(questions=["name"], data={"name": "Ada"})
    other.record(questions=["hours"], data={"hours": "9-5"})
    assert kept(conversation) == (["name", "hours"], *({"name": "Ada", "hours": "9-5"},) * 2)


def test_rolled_back_neither_the_conversation_nor_the_lead_nor_the_object_has_it(
    conversation_in: ConversationIn,
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.record(questions=["q"], data={"a": 1})
    before = dict(conversation.__data__)
    with close_engine.atomic() as transaction:
        conversation.record(questions=["r"], data={"a": 2})
        transaction.rollback()
    assert conversation.__data__ == before
    assert kept(conversation) == (["q"], {"a": 1}, {"a": 1})


def test_a_lead_that_cannot_be_written_leaves_the_conversation_as_it_was(
    conversation_in: ConversationIn, database: peewee.Database
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    before = dict(conversation.__data__)
    database.execute_sql("ALTER TABLE leads RENAME COLUMN qualification_data TO elsewhere")
    with pytest.raises(peewee.DatabaseError):
        conversation.record(data={"a": 1})
    assert conversation.__data__ == before
    assert copy_of(conversation).collected_data is None


def test_a_deleted_conversation_is_named_in_the_error(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    sql("DELETE FROM close_engine_conversations WHERE id = %s", conversation.id)
    with pytest.raises(ConversationNotFound, match=conversation.id):
        conversation.record(data={"a": 1})
    assert Lead.get_by_id(conversation.lead_id).qualification_data is None


def assert_all_kept(conversation: CloseEngineConversation, workers: int, each: int) -> None:
    questions, data, copied = kept(conversation)
    assert data == copied == {f"{worker}.{number}": [worker] for worker in range(workers) for number in range(each)}
    assert len(questions) == workers * each + 1
    for worker in range(workers):
        own = [question for question in questions if question.startswith(f"{worker}.")]
        assert own == [f"{worker}.{number}" for number in range(each)]


def recorder(conversation: CloseEngineConversation, worker: int, each: int) -> Callable[[], None]:
    def record() -> None:
        for number in range(each):
            name = f"{worker}.{number}"
            conversation.record(questions=["common", name], data={name: [worker]})

    return record


def test_concurrent_answers_never_overwrite_each_other(postgres: peewee.Database) -> None:
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    recorders = [recorder(copy_of(conversation), worker, 15) for worker in range(8)]
    assert race(recorders, behind=held(conversation)) == [None] * 8
    assert_all_kept(conversation, 8, 15)


RECORDER = """
import sys
import close_engine
from tests.test_record import recorder

url, conversation_id, worker = sys.argv[1:]
close_engine.connect(url)
conversation = close_engine.CloseEngineConversation.get_by_id(conversation_id)
print("ready", flush=True)
sys.stdin.readline()
recorder(conversation, int(worker), 15)()
"""


def test_concurrent_answers_of_processes_on_one_sqlite_file_are_all_kept(sqlite_template: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    (tmp_path / "test.db").write_bytes(sqlite_template.read_bytes())
    database = close_engine.connect(url)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    with ExitStack() as running:
        processes: list[Any] = []
        for worker in range(3):
            command = [sys.executable, "-c", RECORDER, url, conversation.id, str(worker)]
            one = background(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(running.enter_context(one))
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:  # SQLite does not show who waits: the answers are kept however they overlap
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            process.communicate()
            assert process.returncode == 0
    assert_all_kept(conversation, 3, 15)
    database.close()
