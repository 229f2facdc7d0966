"""The close conversation: open one, fire its triggers, ask what it may do.

    conversation = open_conversation(lead, EntryPoint.SMS_REPLY)
    conversation.start_qualifying(actor="worker-7")
    conversation.may("send_preview").reason      # "… is QUALIFYING, and send_preview is not allowed from there; …"

Every trigger is one guarded write: the machine decides on facts, the row changes only if nobody has changed it since it
was loaded, and the database adds the history row. If the trigger is refused, conflicts or is rolled back, the object
stays as it was.

>>> from close_engine import connect
>>> database = connect("sqlite:///:memory:")
>>> CloseEngineConversation(stage="BUILDING")
Traceback (most recent call last):
close_engine.StageAssignmentRefused: A conversation starts INITIATED and cannot be created as BUILDING: \
open it with open_conversation(), then fire its triggers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import peewee
from peewee import SQL

from close_engine import hooks, numbers
from close_engine.columns import StageField, VersionField, WithoutStage, is_row, refuse_stage
from close_engine.database.binding import current, moment, now
from close_engine.database.dialect import Dialect
from close_engine.database.fields import (
    LONGEST_SPAN,
    EnumField,
    JsonField,
    OneToOneField,
    TextField,
    UtcDateTimeField,
    clean_json,
    clean_text,
    clean_words,
    dump_json,
    stored_time,
)
from close_engine.database.provenance import Provenance, ProvenanceArguments, Write
from close_engine.database.reading import Rows, is_unreadable
from close_engine.database.transaction import accept, accept_row, atomic, remember
from close_engine.errors import (
    ConversationClosed,
    ConversationCompleted,
    ConversationNotFound,
    ConversationTakenOver,
    InvalidValue,
    LeadHasNoPhone,
    LeadNotFound,
    LeadOptedOut,
    TransitionRefused,
    UserNotFound,
)
from close_engine.firing import (
    change_stage,
    facts_of,
    next_version,
    require_whole,
    run_entry_hooks,
    write_fields,
)
from close_engine.machine import allowed_triggers, decide
from close_engine.models import BaseModel, Lead, StageChange, User
from close_engine.stages import ACTIVE_STAGES, CLOSED_STAGES, AutonomyLevel, EntryPoint, Stage
from close_engine.transcript import Transcript, transcript_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Answer",
    "CloseEngineConversation",
    "Takeover",
    "locked",
    "open_conversation",
    "open_under",
    "waiting_for_us",
]


@dataclass(frozen=True)
class Answer:
    """The answer of `may()`: true if the trigger may be fired.

    Attributes:
        allowed: the answer itself.
        reason: a sentence that says why not; empty if it may be fired.
    """

    allowed: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.allowed


class CloseEngineConversation(WithoutStage, BaseModel):
    """The one close conversation of a lead: a row of `close_engine_conversations`.

    Attributes:
        stage: read it; only triggers change it.
        updated_at: changes with every write, by any writer, which is how a conflict is noticed.
    """

    lead = OneToOneField(
        Lead,
        backref="close_conversation",
        constraint_name="close_engine_conversations_lead_id_fkey",
        on_update="CASCADE",
        on_delete="CASCADE",
    )
    rep = peewee.ForeignKeyField(
        User,
        null=True,
        index=False,
        backref="close_engine_conversations",
        constraint_name="close_engine_conversations_rep_id_fkey",
        on_update="CASCADE",
        on_delete="SET NULL",
    )
    entry_point = EnumField[EntryPoint](EntryPoint, index=True)
    stage = StageField(Stage, default=Stage.INITIATED, index=True, constraints=[SQL("DEFAULT 'INITIATED'")])
    autonomy_level = EnumField[AutonomyLevel](
        AutonomyLevel, default=AutonomyLevel.FULL_AUTO, constraints=[SQL("DEFAULT 'FULL_AUTO'")]
    )
    questions_asked = JsonField(null=True)
    collected_data = JsonField(null=True)
    edit_rounds = peewee.IntegerField(default=0, constraints=[SQL("DEFAULT 0")])
    payment_link_url = TextField["str | None"](null=True)
    payment_link_sent_at = UtcDateTimeField["datetime | None"](null=True)
    stalled_at = UtcDateTimeField["datetime | None"](null=True)
    completed_at = UtcDateTimeField["datetime | None"](null=True)
    closed_lost_at = UtcDateTimeField["datetime | None"](null=True)
    closed_lost_reason = TextField["str | None"](null=True)
    created_at = UtcDateTimeField[datetime](default=now, index=True, constraints=[SQL("DEFAULT CURRENT_TIMESTAMP")])
    updated_at = VersionField(default=now)

    lead_id: str
    rep_id: str | None

    class Meta:
        table_name = "close_engine_conversations"

    # -- triggers ------------------------------------------------------------------------------------------------

    def start_qualifying(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """INITIATED → QUALIFYING: the first message is out. Arguments, result and errors as for `fire`."""
        return self.fire("start_qualifying", **provenance)

    def collect_info(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """QUALIFYING → COLLECTING_INFO: follow up on gaps. Arguments, result and errors as for `fire`."""
        return self.fire("collect_info", **provenance)

    def start_building(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """QUALIFYING or COLLECTING_INFO → BUILDING: generate the site. Arguments, result and errors as for `fire`."""
        return self.fire("start_building", **provenance)

    def send_preview(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """BUILDING or EDIT_LOOP → PREVIEW_SENT: the link is out. Arguments, result and errors as for `fire`."""
        return self.fire("send_preview", **provenance)

    def request_edits(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """PREVIEW_SENT → EDIT_LOOP, and `edit_rounds` + 1. Arguments, result and errors as for `fire`."""
        return self.fire("request_edits", **provenance)

    def request_approval(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """PREVIEW_SENT or EDIT_LOOP → PENDING_APPROVAL. Arguments, result and errors as for `fire`."""
        return self.fire("request_approval", **provenance)

    def withdraw_approval(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """PENDING_APPROVAL → PREVIEW_SENT. Arguments, result and errors as for `fire`."""
        return self.fire("withdraw_approval", **provenance)

    def send_payment_link(
        self, payment_link_url: str, *, approved_by: str | None = None, **provenance: Unpack[ProvenanceArguments]
    ) -> StageChange:
        """PREVIEW_SENT, EDIT_LOOP or PENDING_APPROVAL → PAYMENT_SENT: the payment link is out.

        Args:
            payment_link_url: the link that was sent.
            approved_by: who approved it; required unless the autonomy level is FULL_AUTO. Stored in the metadata.
            provenance: actor, reason, metadata and key, as for `fire`; so are the result and the errors.
        """
        return self.fire("send_payment_link", payment_link_url=payment_link_url, approved_by=approved_by, **provenance)

    def complete(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """Any stage → COMPLETED, if a payment link was sent: paid. Arguments, result and errors as for `fire`."""
        return self.fire("complete", **provenance)

    def stall(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """Any active stage → STALLED: the lead is silent. Arguments, result and errors as for `fire`."""
        return self.fire("stall", **provenance)

    def resume(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """STALLED → where things stand. Arguments, result and errors as for `fire`.

        That is the stage it stalled in, corrected by what happened since: after a first text it is QUALIFYING, after a
        preview PREVIEW_SENT, after a payment link PAYMENT_SENT. If it stalled in PENDING_APPROVAL and no payment link
        waits any more, it is PREVIEW_SENT.
        """
        return self.fire("resume", **provenance)

    def close_lost(
        self,
        reason: str,
        *,
        actor: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> StageChange:
        """Any active stage or STALLED → CLOSED_LOST: the lead did not convert.

        Args:
            reason: why; stored in `closed_lost_reason` and in the history.
            actor, metadata, key: as for `fire`; so are the result and the errors.
        """
        return self.fire("close_lost", actor=actor, reason=reason, metadata=metadata, key=key)

    def reopen(self, **provenance: Unpack[ProvenanceArguments]) -> StageChange:
        """CLOSED_LOST → INITIATED, with its history kept. Arguments, result and errors as for `fire`."""
        return self.fire("reopen", **provenance)

    def fire(
        self,
        trigger: str,
        *,
        actor: str | None = None,
        reason: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
        payment_link_url: str | None = None,
        approved_by: str | None = None,
    ) -> StageChange:
        """Fire a trigger by name. Each trigger is also a method.

        Args:
            trigger: a name of the transition table.
            actor: who does it, for the history.
            reason: why, for the history; for `close_lost` it is required.
            metadata: anything JSON can hold, for the history.
            key: idempotency key of the event behind it, unique within the conversation. Using it again returns the
                first history row and changes nothing.
            payment_link_url, approved_by: see `send_payment_link`.

        Returns:
            the history row.

        Raises:
            UnknownTrigger: there is no trigger of this name.
            TransitionNotAllowed: the table does not allow the trigger from this stage.
            ConditionNotMet: the table allows it, but a condition is not met.
            StageConflict: somebody changed the conversation since it was loaded.
            ConversationNotFound: it was deleted.
            KeyReused: the key was used for another trigger.
            GuardMissing: the database would not record the change.
            InvalidValue: an argument cannot be stored.
        """
        given = {"payment_link_url": payment_link_url, "approved_by": approved_by, "closed_lost_reason": reason}
        if approved_by is not None:
            metadata = {**(metadata or {}), "approved_by": approved_by}
        return change_stage(self, trigger, given, Provenance(actor, reason, metadata, key))

    def record(self, *, questions: Sequence[str] = (), data: Mapping[str, Any] | None = None) -> None:
        """Merge questions and answers into the stored ones, inside the database, so that no answer is lost.

        It works in every stage and never conflicts. The same transaction copies the merged data to the lead's
        `qualification_data`. The object gets the merged values; if it was stale before, it still is.

        Args:
            questions: ids of the questions that were asked; each is kept once, in the order in which they came.
            data: answers by name. A new answer replaces the one of the same name; None is stored as null.

        Raises:
            ConversationNotFound: it was deleted.
            InvalidValue: JSON cannot hold it.
        """
        cls = type(self)
        merged: dict[str, Any] = {}
        dialect = current().dialect
        if isinstance(questions, str):
            raise InvalidValue("questions", questions, "it must be a list of ids")
        if questions:
            asked = clean_json("questions", [clean_text("questions", question) for question in questions])
            merged["questions_asked"] = SQL(dialect.merged_list("questions_asked"), [dump_json(asked)])
        if data:
            if not isinstance(data, Mapping):
                raise InvalidValue("data", data, "it must be a mapping")
            answers = dump_json(clean_json("data", data))
            merged["collected_data"] = SQL(dialect.merged_mapping("collected_data"), [answers])
        if not merged:
            return
        with atomic():
            # Lock the conversation before its lead, as all code here does: another order could deadlock.
            row = current().for_update(cls.select(cls.id, cls.updated_at).where(cls.id == self.id)).first()
            if row is None:
                raise ConversationNotFound(self.id)
            values = {**merged, "updated_at": next_version(row)}
            returned = [cls._meta.fields[name] for name in values]
            (written,) = super().update(**values).where(cls.id == self.id).returning(*returned).execute()
            if data:
                copied = cls.select(cls.collected_data).where(cls.id == self.id)
                Lead.update(qualification_data=copied).where(Lead.id == self.lead_id).execute()
            if row.updated_at != self.updated_at:
                # Somebody changed it since it was loaded. Keep the old version, so that the next trigger conflicts.
                del values["updated_at"]
            accept(self, {name: getattr(written, name) for name in values})

    def no_reply(self, reason: str, *, actor: str | None = None) -> None:
        """Say that the lead's last words need no reply: it is the lead's turn again, and the silence counts from now.

        If it is not our turn, nothing changes. Who said so, and why, is kept in the inbox, with the lead's text.

        Args:
            reason: why, for example "they only said thanks".
            actor: who says so.

        Raises:
            StageConflict: somebody changed the conversation since it was loaded; perhaps the lead wrote again.
            ConversationNotFound: it was deleted.
            InvalidValue: the reason is empty, or an argument cannot be stored.
        """
        provenance = Provenance(actor, reason)
        clean_words("reason", reason, "a reason must be given")
        execute = current().execute
        with atomic():
            require_whole(self)
            write_fields(self, {}, "no_reply()")
            turned = execute(
                "UPDATE {deadlines} SET \"trigger\" = 'stall', at = {moment} "
                "WHERE \"trigger\" = 'answer' AND subject_id = %s RETURNING subject_id",
                (self.id,),
            ).fetchall()
            if turned:
                execute(
                    "UPDATE {inbox} SET no_reply_reason = %s, no_reply_by = %s WHERE id = (SELECT id FROM {inbox} "
                    "WHERE kind = 'text' AND conversation_id = %s ORDER BY id DESC LIMIT 1)",
                    (provenance.reason, provenance.actor, self.id),
                )

    # -- who leads it --------------------------------------------------------------------------------------------

    def take_over(
        self, by: str = "owner", *, until: timedelta | datetime | None = None, reason: str | None = None
    ) -> Takeover:
        """Have a human lead the conversation: nobody else's drafts are let in, and what waits of theirs is withdrawn.

        What the human submits, with `actor` as named here, leaves without further approval. Sweeps leave the
        conversation alone. If the same human has it already, only `until` and the reason, if one is given, are changed.

        Args:
            by: who takes it over.
            until: timedelta or datetime with a timezone, when the AI leads again by itself; None: when it is handed
                back.
            reason: why, for the human and for whoever subscribed to `conversation:taken_over`.

        Returns:
            the Takeover.

        Raises:
            ConversationTakenOver: another human has it.
            ConversationClosed: it is COMPLETED or CLOSED_LOST.
            ConversationNotFound: it was deleted.
            InvalidValue: `by` is empty, `until` has no timezone, or the reason cannot be stored.
        """
        clean_words("by", by, "it must say who takes the conversation over")
        why = {} if reason is None else {"reason": clean_text("reason", reason)}
        dialect = current().dialect
        ends: Any = None if until is None or isinstance(until, timedelta) else Takeover.until.clean(until)
        if isinstance(until, timedelta):
            ends = SQL(dialect.sql("{later}"), [until.total_seconds()])
        with locked(self.id) as conversation:
            if conversation.stage in CLOSED_STAGES:
                raise ConversationClosed(self.id, conversation.stage)
            before = conversation.takeover()
            if before is not None and before.taken_by != by:
                raise ConversationTakenOver(self.id, before.taken_by)
            mine = (Takeover.conversation_id == self.id) & Takeover.handed_back_at.is_null()
            if before is not None:
                Takeover.update({"until": ends, **why}).where(mine).execute()
            else:
                moment = SQL(dialect.sql("{moment}"))
                Takeover.update(handed_back_at=moment).where(mine).execute()  # its time was up
                taking = {"conversation_id": self.id, "taken_by": by, "taken_at": moment, "until": ends, **why}
                Takeover.insert(taking).execute()
                conversation.reload()  # a payment link that waited may have been withdrawn
                write_fields(conversation, {}, "take_over()")
            accept_row(self, conversation)
            taken: Takeover = Takeover.get(mine)
        return taken

    def hand_back(self, by: str = "owner") -> None:
        """Have the AI lead the conversation again. If nobody has taken it over, nothing is changed.

        Args:
            by: who hands it back.

        Raises:
            ConversationNotFound: it was deleted.
            InvalidValue: `by` is empty.
        """
        clean_words("by", by, "it must say who hands the conversation back")
        with locked(self.id) as conversation:
            mine = (Takeover.conversation_id == self.id) & Takeover.handed_back_at.is_null()
            back = {"handed_back_by": by, "handed_back_at": SQL(current().dialect.sql("{moment}"))}
            Takeover.update(back).where(mine).execute()
            write_fields(conversation, {}, "hand_back()")
            accept_row(self, conversation)

    def takeover(self) -> Takeover | None:
        """Return the takeover that lasts, by the database's clock; None if nobody has taken the conversation over."""
        found: Takeover | None = Takeover.lasting().where(Takeover.conversation_id == self.id).first()
        return found

    # -- questions -----------------------------------------------------------------------------------------------

    def may(
        self,
        trigger: str,
        *,
        reason: str | None = None,
        payment_link_url: str | None = None,
        approved_by: str | None = None,
    ) -> Answer:
        """Answer whether a trigger may be fired now with these arguments. Nothing is read or written.

        Args:
            trigger: a name of the transition table.
            reason, payment_link_url, approved_by: as for `fire`.

        Returns:
            an Answer, which is true or false; if false, its `reason` says why.

        Raises:
            UnknownTrigger: there is no such trigger.
        """
        given = {"payment_link_url": payment_link_url, "approved_by": approved_by, "closed_lost_reason": reason}
        try:
            decide(trigger, facts_of(self, given))
        except TransitionRefused as refusal:
            return Answer(False, str(refusal))
        return Answer(True)

    def allowed_triggers(self) -> list[str]:
        """List the triggers that can be fired now, provided you pass their arguments; in the table's order."""
        return allowed_triggers(facts_of(self, {}))

    def history(self) -> list[StageChange]:
        """Return its stage changes, oldest first."""
        return list(StageChange.select().where(StageChange.conversation_id == self.id).order_by(StageChange.id))

    def messages(self) -> Transcript:
        """Return every text in both directions, in the order of time: what was said, what waits, what never left.

        It is one query, however many there are. Texts from before the conversation was opened are in it, and those that
        `record_sent` and `import_texts` have added.

        Returns:
            Transcript, a list of Text; its `as_prompt()` is what a language model takes.
        """
        return transcript_of(self.id)

    @classmethod
    def in_stages(cls, *stages: Stage) -> Rows[CloseEngineConversation]:
        """Return a `readable()` query for the conversations in any of these stages."""
        return cls.select().readable().where(cls.stage.in_([Stage(stage) for stage in stages]))

    @classmethod
    def not_in_stages(cls, *stages: Stage) -> Rows[CloseEngineConversation]:
        """Return a `readable()` query for the conversations in none of these stages."""
        return cls.select().readable().where(cls.stage.not_in([Stage(stage) for stage in stages]))

    @classmethod
    def in_stage_longer_than(cls, stage: Stage, duration: timedelta) -> Rows[CloseEngineConversation]:
        """Return a `readable()` query for the conversations that have been in this stage for longer than that.

        Raises:
            InvalidValue: `duration` is longer than a hundred years.
        """
        if abs(duration) > LONGEST_SPAN:
            raise InvalidValue("duration", str(duration), f"it can be at most {LONGEST_SPAN.days} days")
        cutoff = moment() - duration
        later = StageChange.select(peewee.SQL("1")).where(
            (StageChange.conversation_id == cls.id) & (StageChange.created_at >= cutoff)
        )
        return cls.in_stages(stage).where(~peewee.fn.EXISTS(later))

    # -- rows ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        loaded = self.__data__.get
        return f"<{type(self).__name__} {loaded('id')}: {loaded('stage')}, of lead {loaded('lead')}>"

    @classmethod
    def get_by_id(cls, pk: str) -> CloseEngineConversation:
        """Load a conversation, as Peewee does, but build the SQL only once: every stage change starts here.

        Raises:
            CloseEngineConversation.DoesNotExist: there is none.
            UnreadableRow: Python cannot read it.
        """
        binding, meta = current(), cls._meta
        database, select = binding.database, _select_by_id(binding.dialect)
        cursor = binding.dialect.run(database, lambda: database.execute_sql(select, (pk,)))
        try:
            row = cursor.fetchone()
            if row is None:
                raise cls.DoesNotExist(f"There is no conversation {pk!r}.")
            values = dict(zip(meta.sorted_field_names, row, strict=True))
            for name, value in values.items():
                if value is not None:
                    values[name] = meta.fields[name].python_value(value)
        except Exception as error:
            cursor.close()
            if is_unreadable(error):
                cls.select().where(cls.id == pk).execute()  # says which column it is
            raise
        return cls(__no_default__=True, **values)

    def reload(self) -> None:
        """Load the row again, into this object; unsaved changes are lost.

        Raises:
            ConversationNotFound: it was deleted.
        """
        fresh = type(self).get_or_none(type(self).id == self.id)
        if fresh is None:
            raise ConversationNotFound(self.id)
        accept_row(self, fresh)

    def save(self, force_insert: bool = False, only: Any = None) -> Any:
        """Write the unsaved changes of fields other than the stage.

        Raises:
            StageAssignmentRefused: the fields to write include the stage.
            StageConflict: somebody changed the conversation since it was loaded.
            ConversationNotFound: it was deleted.
        """
        if force_insert:
            remember(self, self._meta.sorted_field_names)
            rows = super().save(force_insert=True, only=only)
            accept(self, dict.fromkeys(self._meta.fields.keys() - self.__data__.keys()))
            return rows
        if not is_row(self):
            raise ConversationNotFound(self.id)
        require_whole(self)
        fields = self.dirty_fields if only is None else only
        fields = [self._meta.combined[field] if isinstance(field, str) else field for field in fields]
        values = {field.name: self.__data__.get(field.name) for field in fields if field.name != "id"}
        if "stage" in values:
            raise refuse_stage(self, self.stage)
        if not values:
            return 0
        write_fields(self, values, "save()")
        accept(self, {"id": self.id})
        return 1


class Takeover(BaseModel):
    """A human leads a conversation, or did.

    Attributes:
        taken_by: who.
        reason: why; None if nobody said so.
        taken_at: datetime, since when.
        until: datetime, when it ends by itself; None if it does not.
        handed_back_by: who handed it back; None if its time was up.
        handed_back_at: datetime, when; None as long as nobody did.
    """

    id: Any = peewee.BigAutoField()
    conversation_id = TextField[str]()
    taken_by = TextField[str]()
    reason = TextField["str | None"](null=True)
    taken_at = UtcDateTimeField[datetime]()
    until = UtcDateTimeField["datetime | None"](null=True)
    handed_back_by = TextField["str | None"](null=True)
    handed_back_at = UtcDateTimeField["datetime | None"](null=True)

    class Meta:
        table_name = "takeovers"
        own_table = "takeovers"

    @classmethod
    def lasting(cls) -> Rows[Takeover]:
        """Return a query for those that last, by the database's clock."""
        goes_on = cls.until.is_null() | (cls.until > SQL(current().dialect.moment))
        return cls.select().where(cls.handed_back_at.is_null() & goes_on)


Takeover.add_index(Takeover.conversation_id, unique=True, where=Takeover.handed_back_at.is_null())
Takeover.add_index(Takeover.conversation_id, Takeover.id)


@cache
def _select_by_id(dialect: Dialect) -> str:
    meta = CloseEngineConversation._meta
    columns = ", ".join(f'"{field.column_name}"' for field in meta.sorted_fields)
    return dialect.sql(f'SELECT {columns} FROM "{meta.table_name}" WHERE "id" = %s')


@contextmanager
def locked(conversation_id: str) -> Iterator[CloseEngineConversation]:
    """Lock a conversation for the length of a transaction: other writers wait instead of conflicting.

    Args:
        conversation_id: its id.

    Yields:
        the conversation as it is now.

    Raises:
        ConversationNotFound: there is none.
    """
    with atomic():
        query = CloseEngineConversation.select().where(CloseEngineConversation.id == conversation_id)
        conversation = current().for_update(query).first()
        if conversation is None:
            raise ConversationNotFound(conversation_id)
        yield conversation


def waiting_for_us(longer_than: timedelta = timedelta(0)) -> Rows[CloseEngineConversation]:
    """Return a `readable()` query for the conversations in which it is our turn, the longest-waiting first.

    It is our turn from the lead's first text that we have not answered, until a text of ours is sent, `no_reply()` says
    that none is needed, or the conversation closes.

    Args:
        longer_than: timedelta, how long the lead must have been waiting.
    """
    model, dialect = CloseEngineConversation, current().dialect
    due = "FROM {deadlines} WHERE \"trigger\" = 'answer'"
    ids = dialect.in_subquery(f"SELECT subject_id {due} AND at <= %s")
    before = stored_time(moment() - longer_than)
    waiting = peewee.NodeList((model.id, SQL(dialect.sql(ids), [before])))
    since = peewee.NodeList((SQL(dialect.sql(f"(SELECT at {due} AND subject_id =")), model.id, SQL(")")))
    open_ = model.stage.in_([*ACTIVE_STAGES, Stage.STALLED])
    return model.select().readable().where(waiting, open_).order_by(since, model.id)


def open_conversation(
    lead: Lead | str,
    entry_point: EntryPoint,
    rep: User | str | None = None,
    key: str | None = None,
    *,
    actor: str | None = None,
    reason: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> CloseEngineConversation:
    """Open the close conversation of a lead, or return the one it has, in one transaction.

    An active conversation is returned unchanged; if two callers open one at once, both get the same. A STALLED one is
    resumed. A CLOSED_LOST one is reopened, and its history is kept. Opening and reopening copy the lead's autonomy
    level to the conversation and set the lead's `close_entry_point`.

    Args:
        lead: the lead or its id.
        entry_point: what brought the lead here.
        rep: the user who looks after it, or their id.
        key: idempotency key. If it has already opened, reopened or resumed the conversation, that conversation is
            returned unchanged.
        actor, reason, metadata: for the history.

    Returns:
        the conversation.

    Raises:
        LeadNotFound: there is no such lead.
        LeadHasNoPhone: the lead has no phone number.
        LeadOptedOut: the lead or its phone number opted out of texts.
        UserNotFound: there is no such rep.
        ConversationCompleted: the lead has paid.
        KeyReused: the key was used for another trigger.
        GuardMissing: the database would not record the opening.
        InvalidValue: an argument cannot be stored.
    """
    return open_under(lead, entry_point, rep, Provenance(actor, reason, metadata, key))


def open_under(
    lead: Lead | str, entry_point: EntryPoint, rep: User | str | None, provenance: Provenance
) -> CloseEngineConversation:
    """Open a conversation as `open_conversation` does, also under a key of the library's."""
    lead_id = lead.id if isinstance(lead, Lead) else lead
    if isinstance(lead, Lead):
        del lead.close_conversation  # a query may have loaded along that there is none
    rep_id = rep.id if isinstance(rep, User) else rep
    entry_point = CloseEngineConversation.entry_point.clean(entry_point)
    for_update = current().for_update
    with atomic():
        # Lock the conversation before its lead, as all code here does: another order could deadlock.
        of_lead = CloseEngineConversation.select().where(CloseEngineConversation.lead == lead_id)
        conversation: CloseEngineConversation | None = of_lead.first()
        if conversation is not None and conversation.stage not in ACTIVE_STAGES:
            conversation = for_update(of_lead).first()  # nobody else may resume or reopen it meanwhile
        if conversation is not None and conversation.stage in ACTIVE_STAGES:
            return conversation
        row = for_update(Lead.select(Lead.id, Lead.phone, Lead.autonomy_level).where(Lead.id == lead_id)).first()
        if row is None:
            raise LeadNotFound(lead_id)
        if conversation is not None:
            if _opened_by(conversation, provenance.key):
                return conversation
            if conversation.stage is Stage.COMPLETED:
                raise ConversationCompleted(conversation.id, lead_id)
        if not (row.phone or "").strip():
            raise LeadHasNoPhone(lead_id)
        if numbers.find(lead_id, numbers.keep(lead_id, row.phone)) is not None:
            raise LeadOptedOut(lead_id)
        if conversation is not None and conversation.stage is Stage.STALLED:
            change_stage(conversation, "resume", {}, provenance)
            return conversation
        if rep_id is not None and User.get_or_none(User.id == rep_id) is None:
            raise UserNotFound(rep_id)
        if conversation is not None:
            copied = {"entry_point": entry_point, "autonomy_level": row.autonomy_level}
            copied["rep"] = conversation.rep_id if rep_id is None else rep_id
            change_stage(conversation, "reopen", {}, provenance, copied)
        else:
            conversation = _insert(row, entry_point, rep_id, provenance)
            if conversation is None:  # another writer, which did not lock the lead, was first
                return open_under(lead, entry_point, rep, provenance)
        Lead.update(close_entry_point=entry_point).where(Lead.id == lead_id).execute()
        if isinstance(lead, Lead):
            accept(lead, {"close_entry_point": entry_point})
    return conversation


def _opened_by(conversation: CloseEngineConversation, key: str | None) -> bool:
    """Return whether this key has already opened, reopened or resumed the conversation."""
    mine = (StageChange.conversation_id == conversation.id) & (StageChange.key == key)
    opening = StageChange.trigger.in_(["open", "reopen", "resume"])
    return key is not None and StageChange.get_or_none(mine & opening) is not None


def _insert(
    lead: Lead, entry_point: EntryPoint, rep_id: str | None, provenance: Provenance
) -> CloseEngineConversation | None:
    """Insert a new conversation, or return None if the lead has got one in the meantime."""
    at = now()
    conversation = CloseEngineConversation(
        lead=lead,
        rep=rep_id,
        entry_point=entry_point,
        autonomy_level=lead.autonomy_level,
        created_at=at,
        updated_at=at,
    )
    insert = CloseEngineConversation.insert(conversation.__data__).on_conflict(
        action="nothing", conflict_target=[CloseEngineConversation.lead]
    )
    with current().attributed(provenance, Write("open", conversation.id, stored_time(at))):
        if not insert.as_rowcount().execute():
            return None
    conversation = CloseEngineConversation.get_by_id(conversation.id)
    if hooks.has_entry_hook(Stage.INITIATED):
        run_entry_hooks(conversation, conversation.history()[-1])
    return conversation
