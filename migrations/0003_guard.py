"""The guard: triggers that refuse every stage change outside the table, fill forgotten stamps and write the history.

They hold for every writer. A writer that goes through close_engine leaves a context (who, why, under which key) for
the row it is about to write; the guard takes it up only for exactly that write, recognised by the row's id, the trigger
that leads there and the new `updated_at`, which is later than the old. On PostgreSQL the functions run with their
owner's rights, so the Prisma application's role needs none on our schema.

Conversations that exist already get one history row each, with the trigger `adopted`. Every script here may run again
over what it made before.
"""

import peewee

# The context of this very change, or none.
TAKE_UP = """
    context := nullif(current_setting('close_engine.context', true), '')::jsonb;
    IF coalesce(context ->> 'trigger', {fired}) <> {fired} OR coalesce(context ->> 'id', NEW.id) <> NEW.id
        OR (context ->> 'at')::timestamp(3) IS DISTINCT FROM NEW.updated_at THEN
        context := NULL;
    ELSE
        moment := NEW.updated_at;
    END IF;
"""

# Whether the conversation becomes active by this change.
BEGINS = "OLD.stage IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')"

# What each trigger stamps, where the writer left the column as it was: {now} is the moment of the change.
STAMPS = {
    "request_edits": {"edit_rounds": "OLD.edit_rounds + 1"},
    "send_payment_link": {"payment_link_sent_at": "{now}"},
    "complete": {"completed_at": "{now}"},
    "stall": {"stalled_at": "{now}"},
    "resume": {"stalled_at": "NULL"},
    "close_lost": {"closed_lost_at": "{now}"},
    "reopen": {"closed_lost_at": "NULL", "closed_lost_reason": "NULL"},
}
STAMP = """
        IF NEW.{column} IS NOT DISTINCT FROM OLD.{column} THEN
            NEW.{column} := {value};
        END IF;"""

# What both functions end with.
WRITE_DOWN = """
    INSERT INTO close_engine.history
        (conversation_id, lead_id, trigger, source, dest, actor, reason, metadata, key, created_at)
    VALUES (NEW.id, NEW.lead_id, {fired}, {source}, NEW.stage,
        CASE WHEN context IS NULL THEN 'database:' || session_user ELSE context ->> 'actor' END,
        context ->> 'reason', nullif(context -> 'metadata', 'null'), context ->> 'key', moment);
    IF NEW.stage IN ('COMPLETED', 'STALLED', 'CLOSED_LOST') THEN
        DELETE FROM close_engine.silence WHERE conversation_id = NEW.id;
    ELSIF {begins} THEN
        INSERT INTO close_engine.silence (conversation_id, since) VALUES (NEW.id, moment)
        ON CONFLICT (conversation_id) DO UPDATE SET since = EXCLUDED.since;
    END IF;
"""

GUARD = """
CREATE OR REPLACE FUNCTION close_engine.guard_conversation() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    moment timestamp(3) := clock_timestamp() AT TIME ZONE 'UTC';
    later boolean;
    context jsonb;
    fired text;
BEGIN
    -- now() of a session elsewhere than in UTC.
    IF NEW.updated_at = localtimestamp(3) THEN
        NEW.updated_at := current_timestamp AT TIME ZONE 'UTC';
    END IF;
    IF TG_OP = 'INSERT' THEN
        IF NEW.created_at = localtimestamp(3) THEN
            NEW.created_at := current_timestamp AT TIME ZONE 'UTC';
        END IF;
        IF NOT EXISTS (SELECT FROM close_engine.transitions
                       WHERE machine = 'conversation' AND NEW.stage IN (source, dest)) THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation',
                MESSAGE = 'close_engine: ' || coalesce(NEW.stage, 'NULL') || ' is no stage';
        END IF;
        IF NEW.stage = 'PAYMENT_SENT' THEN
            NEW.payment_link_sent_at := coalesce(NEW.payment_link_sent_at, moment);
        ELSIF NEW.stage = 'COMPLETED' THEN
            NEW.completed_at := coalesce(NEW.completed_at, moment);
        ELSIF NEW.stage = 'STALLED' THEN
            NEW.stalled_at := coalesce(NEW.stalled_at, moment);
        ELSIF NEW.stage = 'CLOSED_LOST' THEN
            NEW.closed_lost_at := coalesce(NEW.closed_lost_at, moment);
        END IF;
        RETURN NEW;
    END IF;

    IF NEW.id <> OLD.id THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: conversation ' || OLD.id || ' keeps its id, by which its history is found';
    END IF;
    later := NEW.updated_at > OLD.updated_at;
    IF NOT later THEN
        NEW.updated_at := greatest(moment, OLD.updated_at + interval '1 millisecond');
    END IF;
    IF NEW.stage IS NOT DISTINCT FROM OLD.stage THEN
        RETURN NEW;
    END IF;

    SELECT t.trigger INTO fired FROM close_engine.transitions t
    WHERE t.machine = 'conversation' AND t.source = OLD.stage AND t.dest = NEW.stage;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: conversation ' || OLD.id || ' cannot go from ' || OLD.stage || ' to '
                || coalesce(NEW.stage, 'NULL'),
            HINT = 'The allowed stage changes are in close_engine.transitions.';
    END IF;
    IF later THEN
{take_up}
    END IF;

    CASE fired
{stamps}
    ELSE
        NULL; -- the others stamp nothing
    END CASE;

{write_down}
    RETURN NEW;
END
$body$
"""

RECORD_OPENING = """
CREATE OR REPLACE FUNCTION close_engine.record_opening() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    moment timestamp(3) := clock_timestamp() AT TIME ZONE 'UTC';
    context jsonb;
BEGIN
{take_up}
{write_down}
    RETURN NULL;
END
$body$
"""

FORGET_SILENCE = """
CREATE OR REPLACE FUNCTION close_engine.forget_silence() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        DELETE FROM close_engine.silence;
    ELSE
        DELETE FROM close_engine.silence WHERE conversation_id = OLD.id;
    END IF;
    RETURN NULL;
END
$body$
"""

# PostgreSQL fires a table's triggers in the order of their names: the guard is to see the row as it will be written,
# and the opening is to be recorded before what the triggers of others make of it.
POSTGRES_TRIGGERS = {
    "aa_close_engine_opening": "AFTER INSERT ON close_engine_conversations FOR EACH ROW "
    "EXECUTE FUNCTION close_engine.record_opening()",
    "zz_close_engine_deletion": "AFTER DELETE ON close_engine_conversations FOR EACH ROW "
    "EXECUTE FUNCTION close_engine.forget_silence()",
    "zz_close_engine_guard": "BEFORE INSERT OR UPDATE ON close_engine_conversations FOR EACH ROW "
    "EXECUTE FUNCTION close_engine.guard_conversation()",
    "zz_close_engine_truncation": "AFTER TRUNCATE ON close_engine_conversations FOR EACH STATEMENT "
    "EXECUTE FUNCTION close_engine.forget_silence()",
}
POSTGRES_FUNCTIONS = "close_engine.guard_conversation(), close_engine.record_opening(), close_engine.forget_silence()"

NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"
MILLISECONDS = f"coalesce(strftime('%Y-%m-%d %H:%M:%f', {{0}}), {NOW})"
CONTEXT = """(SELECT context FROM close_engine_context
    WHERE coalesce(json_extract(context, '$.trigger'), {fired}) = {fired}
      AND coalesce(json_extract(context, '$.id'), NEW.id) = NEW.id
      AND json_extract(context, '$.at') = NEW.updated_at{and_written})"""
FIRED = """(SELECT "trigger" FROM close_engine_transitions
    WHERE machine = 'conversation' AND source = OLD.stage AND dest = NEW.stage)"""
RECORD = """
    INSERT INTO close_engine_history
        (conversation_id, lead_id, "trigger", source, dest, actor, reason, metadata, "key", created_at)
    SELECT NEW.id, NEW.lead_id, {fired}, {source}, NEW.stage,
        CASE WHEN context IS NULL THEN 'database' ELSE json_extract(context, '$.actor') END,
        json_extract(context, '$.reason'), json_extract(context, '$.metadata'), json_extract(context, '$.key'),
        CASE WHEN context IS NULL THEN {now} ELSE NEW.updated_at END
    FROM (SELECT {context} AS context);
"""
KEEP_SILENCE = """
    DELETE FROM close_engine_silence
    WHERE conversation_id = NEW.id AND NEW.stage IN ('COMPLETED', 'STALLED', 'CLOSED_LOST');
    INSERT OR REPLACE INTO close_engine_silence (conversation_id, since)
    SELECT NEW.id, created_at FROM close_engine_history
    WHERE NEW.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST') AND {begins} AND conversation_id = NEW.id
    ORDER BY id DESC LIMIT 1;
"""
# A column that the writer left as it was, and that would be another with the stamp: no write in vain, for each is one
# that moves updated_at.
FORGOTTEN = "NEW.{0} IS OLD.{0} AND {0} IS NOT {1}"


def stamp(trigger, column, value):
    value = value.format(now=NOW)
    return (
        f"UPDATE close_engine_conversations SET {column} = {value} "
        f"WHERE id = NEW.id AND {FIRED} = '{trigger}' AND {FORGOTTEN.format(column, value)};"
    )


SQLITE_TRIGGERS = {
    "close_engine_guard_insert": """
BEFORE INSERT ON close_engine_conversations WHEN NOT EXISTS
    (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation' AND NEW.stage IN (source, dest))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this is no stage');
END""",
    "close_engine_guard_id": """
BEFORE UPDATE OF id ON close_engine_conversations WHEN NEW.id IS NOT OLD.id
BEGIN
    SELECT RAISE(ABORT, 'close_engine: a conversation keeps its id, by which its history is found');
END""",
    "close_engine_guard_update": f"""
BEFORE UPDATE OF stage ON close_engine_conversations WHEN NEW.stage IS NOT OLD.stage AND {FIRED} IS NULL
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this stage change is not in close_engine_transitions');
END""",
    "close_engine_opening": f"""
AFTER INSERT ON close_engine_conversations
BEGIN
    {RECORD.format(fired="'open'", source="NULL", now=NOW, context=CONTEXT.format(fired="'open'", and_written=""))}
    {KEEP_SILENCE.format(begins="true")}
    UPDATE close_engine_conversations SET
        payment_link_sent_at = CASE WHEN stage = 'PAYMENT_SENT' THEN {NOW} ELSE payment_link_sent_at END,
        completed_at = CASE WHEN stage = 'COMPLETED' THEN {NOW} ELSE completed_at END,
        stalled_at = CASE WHEN stage = 'STALLED' THEN {NOW} ELSE stalled_at END,
        closed_lost_at = CASE WHEN stage = 'CLOSED_LOST' THEN {NOW} ELSE closed_lost_at END
    WHERE id = NEW.id AND CASE stage
        WHEN 'PAYMENT_SENT' THEN payment_link_sent_at WHEN 'COMPLETED' THEN completed_at
        WHEN 'STALLED' THEN stalled_at WHEN 'CLOSED_LOST' THEN closed_lost_at ELSE '' END IS NULL;
    UPDATE close_engine_conversations SET updated_at = {MILLISECONDS.format("updated_at")}
        WHERE id = NEW.id AND updated_at IS NOT {MILLISECONDS.format("updated_at")};
END""",
    "close_engine_record": f"""
AFTER UPDATE OF stage ON close_engine_conversations WHEN NEW.stage IS NOT OLD.stage
BEGIN
    {
        RECORD.format(
            fired=FIRED,
            source="OLD.stage",
            now=NOW,
            context=CONTEXT.format(fired=FIRED, and_written=" AND NEW.updated_at > OLD.updated_at"),
        )
    }
    {KEEP_SILENCE.format(begins=BEGINS)}
    {"".join(stamp(trigger, *set_to) for trigger, columns in STAMPS.items() for set_to in columns.items())}
END""",
    # The library finds a row again by the text of its updated_at: it must be later than before, and have its form,
    # which only a row that is being inserted did not have before.
    "close_engine_version": f"""
AFTER UPDATE ON close_engine_conversations
WHEN NEW.updated_at IS NOT {MILLISECONDS.format("NEW.updated_at")}
    OR (NEW.updated_at <= OLD.updated_at AND OLD.updated_at IS {MILLISECONDS.format("OLD.updated_at")})
BEGIN
    UPDATE close_engine_conversations
    SET updated_at = max({MILLISECONDS.format("updated_at")},
        CASE WHEN NEW.updated_at <= OLD.updated_at THEN {NOW} ELSE '' END,
        strftime('%Y-%m-%d %H:%M:%f', OLD.updated_at, '+0.001 seconds'))
    WHERE id = NEW.id;
END""",
    "close_engine_deletion": """
AFTER DELETE ON close_engine_conversations
BEGIN
    DELETE FROM close_engine_silence WHERE conversation_id = OLD.id;
END""",
}


# After the triggers, which keep other writers out until this is committed: no change goes unrecorded in between.
ADOPT = [
    """
INSERT INTO {prefix}history (conversation_id, lead_id, "trigger", dest, created_at)
SELECT c.id, c.lead_id, 'adopted', c.stage, {now} FROM close_engine_conversations c
WHERE NOT EXISTS (SELECT 1 FROM {prefix}history h WHERE h.conversation_id = c.id) ORDER BY c.created_at, c.id
""",
    """
INSERT INTO {prefix}silence (conversation_id, since)
SELECT c.id, c.updated_at FROM close_engine_conversations c
WHERE c.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
    AND NOT EXISTS (SELECT 1 FROM {prefix}silence s WHERE s.conversation_id = c.id)
""",
]


def function_text(text, fired, source, begins):
    take_up, write_down = (part.format(fired=fired, source=source, begins=begins) for part in (TAKE_UP, WRITE_DOWN))
    stamps = "".join(
        f"    WHEN '{trigger}' THEN"
        + "".join(STAMP.format(column=column, value=value.format(now="moment")) for column, value in columns.items())
        + "\n"
        for trigger, columns in STAMPS.items()
    )
    text = text.replace("{take_up}", take_up).replace("{write_down}", write_down)
    return text.replace("{stamps}\n", stamps)


def up(migrator, db):
    if isinstance(db, peewee.PostgresqlDatabase):
        statements = [
            function_text(GUARD, fired="fired", source="OLD.stage", begins=BEGINS),
            function_text(RECORD_OPENING, fired="'open'", source="NULL", begins="true"),
            FORGET_SILENCE,
            # Whoever may see our schema could otherwise make them write for a table of his own.
            f"REVOKE EXECUTE ON FUNCTION {POSTGRES_FUNCTIONS} FROM PUBLIC",
        ]
        statements += [f"CREATE OR REPLACE TRIGGER {name} {body}" for name, body in POSTGRES_TRIGGERS.items()]
        prefix, now = "close_engine.", "clock_timestamp() AT TIME ZONE 'UTC'"
    else:
        form = MILLISECONDS.format("updated_at")
        statements = [f"UPDATE close_engine_conversations SET updated_at = {form} WHERE updated_at IS NOT {form}"]
        statements += [f"CREATE TRIGGER IF NOT EXISTS {name} {body}" for name, body in SQLITE_TRIGGERS.items()]
        prefix, now = "close_engine_", NOW
    statements += [statement.format(prefix=prefix, now=now) for statement in ADOPT]
    for statement in statements:
        db.execute_sql(statement)


def down(migrator, db):
    if isinstance(db, peewee.PostgresqlDatabase):
        statements = [f"DROP TRIGGER IF EXISTS {name} ON close_engine_conversations" for name in POSTGRES_TRIGGERS]
        statements += [f"DROP FUNCTION IF EXISTS {POSTGRES_FUNCTIONS}"]
    else:
        statements = [f"DROP TRIGGER IF EXISTS {name}" for name in SQLITE_TRIGGERS]
    for statement in statements:
        db.execute_sql(statement)
