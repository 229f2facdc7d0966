"""The contenders of `stage_change`: what people would use instead, each used as its documentation shows.

Each is a context manager that connects once and yields a function that makes one durable stage change: load by id,
check with the state machine, write the row and a history row in one transaction. All have the whole transition table,
the same columns and the same driver, psycopg2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from types import SimpleNamespace
from typing import Any

import peewee
import sqlalchemy
import statemachine
import transitions
from playhouse import db_url
from sqlalchemy import orm
from statemachine.states import States

from bench.ground import EDITS, TRIGGER, utc_now
from close_engine.machine import TRANSITIONS
from close_engine.stages import Stage

Change = Callable[[str], object]

# `resume` looks into the history for its destination. A machine without a history goes to QUALIFYING.
TABLE = [[t.trigger, [s.value for s in t.sources], (t.dest or Stage.QUALIFYING).value] for t in TRANSITIONS]


# -- peewee and transitions ------------------------------------------------------------------------------------------


class PeeweeModel(peewee.Model):
    class Meta:
        database = peewee.DatabaseProxy()
        legacy_table_names = False
        only_save_dirty = True


class PeeweeConversation(PeeweeModel):
    id = peewee.TextField(primary_key=True)
    lead_id = peewee.TextField()
    rep_id = peewee.TextField(null=True)
    entry_point = peewee.TextField()
    stage = peewee.TextField()
    autonomy_level = peewee.TextField()
    questions_asked = peewee.JSONField(null=True)
    collected_data = peewee.JSONField(null=True)
    edit_rounds = peewee.IntegerField()
    payment_link_url = peewee.TextField(null=True)
    payment_link_sent_at = peewee.DateTimeField(null=True)
    stalled_at = peewee.DateTimeField(null=True)
    completed_at = peewee.DateTimeField(null=True)
    closed_lost_at = peewee.DateTimeField(null=True)
    closed_lost_reason = peewee.TextField(null=True)
    created_at = peewee.DateTimeField()
    updated_at = peewee.DateTimeField()

    class Meta:
        table_name = "close_engine_conversations"


class PeeweeHistory(PeeweeModel):
    id = peewee.BigAutoField()
    conversation_id = peewee.TextField()
    lead_id = peewee.TextField()
    trigger = peewee.TextField()
    source = peewee.TextField(null=True)
    dest = peewee.TextField()
    actor = peewee.TextField(null=True)
    created_at = peewee.DateTimeField()

    class Meta:
        table_name = "history"


def load_with_machine(conversation_id: str) -> PeeweeConversation:
    conversation = PeeweeConversation.get_by_id(conversation_id)
    transitions.Machine(
        model=conversation,
        states=[stage.value for stage in Stage],
        transitions=TABLE,
        initial=conversation.stage,
        model_attribute="stage",
        auto_transitions=False,
    )
    return conversation


@contextmanager
def peewee_machine(url: str) -> Iterator[Change]:
    """Use a `transitions.Machine` for each object, then `save()` and a history row."""
    database = db_url.connect(url)
    PeeweeModel._meta.database.initialize(database)

    def change(conversation_id: str) -> None:
        conversation = load_with_machine(conversation_id)
        source, trigger = conversation.stage, TRIGGER[conversation.stage]
        conversation.trigger(trigger)
        conversation.edit_rounds += EDITS[source]
        conversation.updated_at = utc_now()
        with database.atomic():
            conversation.save()
            PeeweeHistory.create(
                conversation_id=conversation.id,
                lead_id=conversation.lead_id,
                trigger=trigger,
                source=source,
                dest=conversation.stage,
                actor="bench",
                created_at=conversation.updated_at,
            )

    yield change
    database.close()


# -- django-fsm-2 ----------------------------------------------------------------------------------------------------


@cache
def django_models() -> SimpleNamespace:
    """Set up Django and define the models."""
    import django
    from django.conf import settings

    # Hide psycopg 3, which Django would prefer: all contenders must use the same driver.
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "psycopg"}
    sys.modules["psycopg"] = None  # type: ignore[assignment]
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "CONN_MAX_AGE": None}},
        INSTALLED_APPS=[],
        USE_TZ=False,
        TIME_ZONE="UTC",
    )
    django.setup()
    from django.db import connection, models, transaction
    from django_fsm import ConcurrentTransitionMixin, FSMField
    from django_fsm import transition as fsm_transition

    connection.vendor  # noqa: B018 - loads the backend
    del sys.modules["psycopg"]
    sys.modules.update(kept)

    triggers = {
        trigger: fsm_transition(field="stage", source=sources, target=dest)(lambda self: None)
        for trigger, sources, dest in TABLE
    }
    for trigger, method in triggers.items():
        method.__name__ = trigger

    class DjangoConversation(ConcurrentTransitionMixin, models.Model):
        id = models.TextField(primary_key=True)
        lead_id = models.TextField()
        rep_id = models.TextField(null=True)
        entry_point = models.TextField()
        stage = FSMField(max_length=None, protected=True)
        autonomy_level = models.TextField()
        questions_asked = models.JSONField(null=True)
        collected_data = models.JSONField(null=True)
        edit_rounds = models.IntegerField()
        payment_link_url = models.TextField(null=True)
        payment_link_sent_at = models.DateTimeField(null=True)
        stalled_at = models.DateTimeField(null=True)
        completed_at = models.DateTimeField(null=True)
        closed_lost_at = models.DateTimeField(null=True)
        closed_lost_reason = models.TextField(null=True)
        created_at = models.DateTimeField()
        updated_at = models.DateTimeField()
        vars().update(triggers)

        class Meta:
            app_label = "bench"
            managed = False
            db_table = "close_engine_conversations"

    class DjangoHistory(models.Model):
        id = models.BigAutoField(primary_key=True)
        conversation_id = models.TextField()
        lead_id = models.TextField()
        trigger = models.TextField()
        source = models.TextField(null=True)
        dest = models.TextField()
        actor = models.TextField(null=True)
        created_at = models.DateTimeField()

        class Meta:
            app_label = "bench"
            managed = False
            db_table = "history"

    return SimpleNamespace(
        Conversation=DjangoConversation, History=DjangoHistory, connection=connection, atomic=transaction.atomic
    )


@contextmanager
def django_fsm(url: str) -> Iterator[Change]:
    """Use `ConcurrentTransitionMixin`, whose `save()` checks the stage that was loaded, and a history row."""
    django = django_models()
    given = sqlalchemy.make_url(url)
    django.connection.settings_dict.update(
        NAME=given.database,
        USER=given.username,
        HOST=given.query.get("host") or given.host,
        PORT=given.query.get("port") or given.port,
    )

    def change(conversation_id: str) -> None:
        conversation = django.Conversation.objects.get(pk=conversation_id)
        source, trigger = conversation.stage, TRIGGER[conversation.stage]
        getattr(conversation, trigger)()
        conversation.edit_rounds += EDITS[source]
        conversation.updated_at = utc_now()
        with django.atomic():
            conversation.save(update_fields=["stage", "edit_rounds", "updated_at"])
            django.History.objects.create(
                conversation_id=conversation.id,
                lead_id=conversation.lead_id,
                trigger=trigger,
                source=source,
                dest=conversation.stage,
                actor="bench",
                created_at=conversation.updated_at,
            )

    yield change
    django.connection.close()


# -- python-statemachine and SQLAlchemy ------------------------------------------------------------------------------


class SqlAlchemyModel(orm.DeclarativeBase):
    pass


class SqlAlchemyConversation(SqlAlchemyModel):
    __tablename__ = "close_engine_conversations"

    id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    lead_id: orm.Mapped[str]
    rep_id: orm.Mapped[str | None]
    entry_point: orm.Mapped[str]
    stage: orm.Mapped[str]
    autonomy_level: orm.Mapped[str]
    questions_asked: orm.Mapped[Any | None] = orm.mapped_column(sqlalchemy.JSON)
    collected_data: orm.Mapped[Any | None] = orm.mapped_column(sqlalchemy.JSON)
    edit_rounds: orm.Mapped[int]
    payment_link_url: orm.Mapped[str | None]
    payment_link_sent_at: orm.Mapped[datetime | None]
    stalled_at: orm.Mapped[datetime | None]
    completed_at: orm.Mapped[datetime | None]
    closed_lost_at: orm.Mapped[datetime | None]
    closed_lost_reason: orm.Mapped[str | None]
    created_at: orm.Mapped[datetime]
    updated_at: orm.Mapped[datetime] = orm.mapped_column()

    # SQLAlchemy's own version check: if the version has changed, the UPDATE raises StaleDataError.
    __mapper_args__ = {"version_id_col": updated_at, "version_id_generator": lambda _: utc_now()}  # noqa: RUF012


class SqlAlchemyHistory(SqlAlchemyModel):
    __tablename__ = "history"

    id: orm.Mapped[int] = orm.mapped_column(sqlalchemy.BigInteger, primary_key=True)
    conversation_id: orm.Mapped[str]
    lead_id: orm.Mapped[str]
    trigger: orm.Mapped[str]
    source: orm.Mapped[str | None]
    dest: orm.Mapped[str]
    actor: orm.Mapped[str | None]
    created_at: orm.Mapped[datetime]


def _conversation_machine() -> type[statemachine.StateMachine]:
    states = States.from_enum(Stage, initial=Stage.INITIATED, final=Stage.COMPLETED, use_enum_instance=False)
    named = {stage.value: getattr(states, stage.name) for stage in Stage}
    events: dict[str, Any] = {}
    for trigger, sources, dest in TABLE:
        rows = [named[source].to(named[dest]) for source in sources]
        events[trigger] = rows[0]
        for row in rows[1:]:
            events[trigger] |= row
    return type("ConversationMachine", (statemachine.StateMachine,), {"states_of_enum": states, **events})


ConversationMachine = _conversation_machine()


@contextmanager
def python_statemachine(url: str) -> Iterator[Change]:
    """Use a machine on a SQLAlchemy object with a version column, and a history row."""
    given = sqlalchemy.make_url(url)
    engine = sqlalchemy.create_engine(given.set(drivername="postgresql+psycopg2"))

    def change(conversation_id: str) -> None:
        with orm.Session(engine, expire_on_commit=False) as session, session.begin():
            conversation = session.get_one(SqlAlchemyConversation, conversation_id)
            machine = ConversationMachine(conversation, state_field="stage")
            source, trigger = conversation.stage, TRIGGER[conversation.stage]
            machine.send(trigger)
            conversation.edit_rounds += EDITS[source]
            session.add(
                SqlAlchemyHistory(
                    conversation_id=conversation.id,
                    lead_id=conversation.lead_id,
                    trigger=trigger,
                    source=source,
                    dest=conversation.stage,
                    actor="bench",
                    created_at=utc_now(),
                )
            )

    yield change
    engine.dispose()
