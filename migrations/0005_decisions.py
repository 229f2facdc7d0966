"""Decisions on pending actions, and closings: whoever makes one, what follows from it follows at once.

A second, small machine in the table of allowed changes: PENDING to APPROVED, REJECTED or EXPIRED. Approving puts the
message into the outbox, once; it is refused past `expires_at` and for a conversation that has closed. Rejecting or
expiring the last payment link that waits takes its conversation back from PENDING_APPROVAL. The action's row is locked
first, then its conversation's; a closing conversation, which goes the other way, waits for no action.

When a conversation closes or is deleted, the texts that still wait for it are withdrawn, and its drafts expire.

Partial indexes, which Prisma does not see, let the sweeps find their rows without reading a table.
"""

import peewee

TRANSITIONS = [("approve", "PENDING", "APPROVED"), ("reject", "PENDING", "REJECTED"), ("expire", "PENDING", "EXPIRED")]

INDEXES = {
    "pending_actions_close_engine_expiry": "pending_actions (expires_at) WHERE status = 'PENDING'",
    "pending_actions_close_engine_queue": "pending_actions (created_at, id) WHERE status = 'PENDING'",
    "close_engine_conversations_stalled": "close_engine_conversations (stalled_at) WHERE stage = 'STALLED'",
}

# What an approved action becomes in the outbox: {moment} is when it was approved.
ENQUEUE = """
    INSERT INTO {prefix}outbox
        (conversation_id, lead_id, topic, body, payload, "trigger", approved_by, submitted_by, "key",
        created_at, available_at)
    SELECT NEW.conversation_id, NEW.lead_id, NEW.type, NEW.draft_message, NEW.metadata,
        CASE WHEN NEW.type = 'SEND_PREVIEW' THEN 'send_preview'
            WHEN NEW.type = 'SEND_PAYMENT_LINK' THEN 'send_payment_link'
            WHEN c.stage = 'INITIATED' THEN 'start_qualifying' END,
        NEW.approved_by, {submitted_by}, 'action:' || NEW.id, {moment},
        {greatest}({moment}, coalesce({send_after}, {moment}))
    FROM {conversations} c WHERE c.id = NEW.conversation_id
"""

# What a foreign writer put there in another form is no delay.
SEND_AFTER = r"""CASE WHEN NEW.metadata ->> 'sendAfter' ~ '^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?$'
            THEN (NEW.metadata ->> 'sendAfter')::timestamp(3) END"""

GUARD = """
CREATE OR REPLACE FUNCTION close_engine.guard_action() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    moment timestamp(3) := clock_timestamp() AT TIME ZONE 'UTC';
    found text;
BEGIN
    IF NOT EXISTS (SELECT FROM close_engine.transitions
                   WHERE machine = 'action' AND NEW.status IN (source, dest)) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: ' || coalesce(NEW.status, 'NULL') || ' is no status of an action';
    END IF;
    IF TG_OP = 'INSERT' OR NEW.status = OLD.status THEN
        RETURN NEW;
    END IF;
    IF NOT EXISTS (SELECT FROM close_engine.transitions
                   WHERE machine = 'action' AND source = OLD.status AND dest = NEW.status) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: action ' || OLD.id || ' cannot go from ' || OLD.status || ' to ' || NEW.status;
    END IF;
    IF NEW.status <> 'APPROVED' THEN
        RETURN NEW;
    END IF;
    NEW.approved_at := coalesce(NEW.approved_at, moment);
    IF OLD.expires_at <= NEW.approved_at THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: action ' || OLD.id || ' has expired';
    END IF;
    SELECT stage INTO found FROM {conversations} WHERE id = NEW.conversation_id FOR NO KEY UPDATE;
    IF coalesce(found, 'deleted') IN ('COMPLETED', 'CLOSED_LOST', 'deleted') THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: action ' || OLD.id
            || ' cannot be approved: its conversation is ' || coalesce(found, 'deleted');
    END IF;
    RETURN NEW;
END
$body$
"""

FOLLOW = """
CREATE OR REPLACE FUNCTION close_engine.follow_decision() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    outer_context text := current_setting('close_engine.context', true);
    context jsonb := nullif(outer_context, '')::jsonb;
    version timestamp(3);
BEGIN
    IF NEW.status = 'APPROVED' THEN
        {enqueue}
        ON CONFLICT (conversation_id, key) WHERE key IS NOT NULL DO NOTHING;
        RETURN NULL;
    END IF;
    IF NEW.type <> 'SEND_PAYMENT_LINK' THEN
        RETURN NULL;
    END IF;
    IF coalesce(context ->> 'id', NEW.id) <> NEW.id THEN
        context := NULL;
    END IF;
    SELECT greatest(coalesce((context ->> 'at')::timestamp(3), clock_timestamp() AT TIME ZONE 'UTC'),
            updated_at + interval '1 millisecond')
        INTO version FROM {conversations} WHERE id = NEW.conversation_id AND stage = 'PENDING_APPROVAL'
        FOR NO KEY UPDATE;
    IF NOT FOUND OR EXISTS (SELECT FROM {actions} WHERE conversation_id = NEW.conversation_id
            AND status = 'PENDING' AND type = 'SEND_PAYMENT_LINK') THEN
        RETURN NULL;
    END IF;
    PERFORM set_config('close_engine.context', jsonb_build_object(
        'trigger', 'withdraw_approval', 'id', NEW.conversation_id, 'at', version,
        'actor', CASE WHEN context IS NULL THEN 'database:' || session_user ELSE context ->> 'actor' END,
        'reason', context ->> 'reason',
        'metadata', jsonb_build_object('action_id', NEW.id, 'status', NEW.status))::text, true);
    UPDATE {conversations} SET stage = 'PREVIEW_SENT', updated_at = version WHERE id = NEW.conversation_id;
    PERFORM set_config('close_engine.context', coalesce(outer_context, ''), true);
    RETURN NULL;
END
$body$
"""

# Whoever may see our schema could otherwise attach them to a table of his own.
REVOKE = (
    "REVOKE EXECUTE ON FUNCTION close_engine.guard_action(), close_engine.follow_decision(), "
    "close_engine.withdraw_waiting() FROM PUBLIC"
)

POSTGRES_TRIGGERS = [
    "CREATE OR REPLACE TRIGGER zz_close_engine_guard BEFORE INSERT OR UPDATE OF status ON pending_actions "
    "FOR EACH ROW EXECUTE FUNCTION close_engine.guard_action()",
    "CREATE OR REPLACE TRIGGER zz_close_engine_decision AFTER UPDATE OF status ON pending_actions "
    "FOR EACH ROW WHEN (OLD.status = 'PENDING' AND NEW.status <> 'PENDING') "
    "EXECUTE FUNCTION close_engine.follow_decision()",
]

WITHDRAW = """
    UPDATE {prefix}outbox SET status = 'WITHDRAWN', last_error = 'the conversation is ' || {now_it_is}
    WHERE conversation_id = OLD.id AND status = 'PENDING' AND leased_by IS NULL
        AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
"""

# Drafts that somebody decides on at this moment are his.
WITHDRAW_WAITING = """
CREATE OR REPLACE FUNCTION close_engine.withdraw_waiting() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    over boolean := coalesce(NEW.stage IN ('COMPLETED', 'CLOSED_LOST') AND NEW.stage <> OLD.stage, true);
    approval_withdrawn boolean := OLD.stage = 'PENDING_APPROVAL' AND NEW.stage = 'PREVIEW_SENT';
BEGIN
    IF over THEN
        {withdraw};
    END IF;
    IF over OR approval_withdrawn THEN
        UPDATE {actions} SET status = 'EXPIRED' WHERE id IN (SELECT id FROM {actions}
            WHERE conversation_id = OLD.id AND status = 'PENDING'
                AND (over OR type = 'SEND_PAYMENT_LINK') FOR UPDATE SKIP LOCKED);
    END IF;
    RETURN NULL;
END
$body$
"""
POSTGRES_WITHDRAWING = [
    # Wider than what it acts on: PostgreSQL reads a condition anew for every statement, so that a short one is cheaper.
    "CREATE OR REPLACE TRIGGER zz_close_engine_closing AFTER UPDATE OF stage ON close_engine_conversations "
    "FOR EACH ROW WHEN (OLD.stage = 'PENDING_APPROVAL' OR NEW.stage IN ('COMPLETED', 'CLOSED_LOST')) "
    "EXECUTE FUNCTION close_engine.withdraw_waiting()",
    "CREATE OR REPLACE TRIGGER zz_close_engine_gone AFTER DELETE ON close_engine_conversations "
    "FOR EACH ROW EXECUTE FUNCTION close_engine.withdraw_waiting()",
]

NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"
CONTEXT = """(SELECT context FROM close_engine_context
    WHERE id = 1 AND coalesce(json_extract(context, '$.id'), NEW.id) = NEW.id)"""
VERSION = f"""max(coalesce(json_extract({CONTEXT}, '$.at'), {NOW}), (SELECT
    strftime('%Y-%m-%d %H:%M:%f', updated_at, '+0.001 seconds') FROM close_engine_conversations
    WHERE id = NEW.conversation_id))"""
ALLOWED = "SELECT 1 FROM close_engine_transitions WHERE machine = 'action' AND"

SQLITE_TRIGGERS = {
    "close_engine_action_insert": f"""
BEFORE INSERT ON pending_actions WHEN NOT EXISTS ({ALLOWED} NEW.status IN (source, dest))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this is no status of an action');
END""",
    "close_engine_action_update": f"""
BEFORE UPDATE OF status ON pending_actions
WHEN NEW.status IS NOT OLD.status AND NOT EXISTS ({ALLOWED} source = OLD.status AND dest = NEW.status)
BEGIN
    SELECT RAISE(ABORT, 'close_engine: an action that is decided stays so');
END""",
    "close_engine_action_expired": f"""
BEFORE UPDATE OF status ON pending_actions
WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING' AND OLD.expires_at <= coalesce(NEW.approved_at, {NOW})
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this action has expired');
END""",
    "close_engine_action_closed": """
BEFORE UPDATE OF status ON pending_actions
WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING' AND NOT EXISTS (SELECT 1 FROM close_engine_conversations
    WHERE id = NEW.conversation_id AND stage NOT IN ('COMPLETED', 'CLOSED_LOST'))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: the conversation of this action has closed');
END""",
    "close_engine_action_approved": """
AFTER UPDATE OF status ON pending_actions WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING'
BEGIN
    UPDATE pending_actions SET approved_at = {now} WHERE id = NEW.id AND approved_at IS NULL;
    {enqueue};
END""".format(
        now=NOW,
        enqueue=ENQUEUE.format(
            prefix="close_engine_",
            conversations="close_engine_conversations",
            moment=f"coalesce(NEW.approved_at, {NOW})",
            greatest="max",
            submitted_by="json_extract(NEW.metadata, '$.submittedBy')",
            send_after="strftime('%Y-%m-%d %H:%M:%f', json_extract(NEW.metadata, '$.sendAfter'))",
        ),
    ),
    "close_engine_action_withdrawn": f"""
AFTER UPDATE OF status ON pending_actions
WHEN NEW.status IN ('REJECTED', 'EXPIRED') AND OLD.status = 'PENDING' AND NEW.type = 'SEND_PAYMENT_LINK'
    AND NOT EXISTS (SELECT 1 FROM pending_actions WHERE conversation_id = NEW.conversation_id
        AND status = 'PENDING' AND type = 'SEND_PAYMENT_LINK')
    AND EXISTS (SELECT 1 FROM close_engine_conversations
        WHERE id = NEW.conversation_id AND stage = 'PENDING_APPROVAL')
BEGIN
    INSERT OR REPLACE INTO close_engine_context VALUES (2, json_object(
        'trigger', 'withdraw_approval', 'id', NEW.conversation_id, 'at', {VERSION},
        'actor', CASE WHEN {CONTEXT} IS NULL THEN 'database' ELSE json_extract({CONTEXT}, '$.actor') END,
        'reason', json_extract({CONTEXT}, '$.reason'),
        'metadata', json_object('action_id', NEW.id, 'status', NEW.status)));
    UPDATE close_engine_conversations SET stage = 'PREVIEW_SENT',
        updated_at = (SELECT json_extract(context, '$.at') FROM close_engine_context WHERE id = 2)
    WHERE id = NEW.conversation_id;
    DELETE FROM close_engine_context WHERE id = 2;
END""",
    "close_engine_closing": f"""
AFTER UPDATE OF stage ON close_engine_conversations
WHEN NEW.stage IN ('COMPLETED', 'CLOSED_LOST') AND NEW.stage <> OLD.stage
BEGIN
    {WITHDRAW.format(prefix="close_engine_", now_it_is="NEW.stage")};
    UPDATE pending_actions SET status = 'EXPIRED' WHERE conversation_id = OLD.id AND status = 'PENDING';
END""",
    "close_engine_gone": f"""
AFTER DELETE ON close_engine_conversations
BEGIN
    {WITHDRAW.format(prefix="close_engine_", now_it_is="'deleted'")};
    UPDATE pending_actions SET status = 'EXPIRED' WHERE conversation_id = OLD.id AND status = 'PENDING';
END""",
    "close_engine_unasked": """
AFTER UPDATE OF stage ON close_engine_conversations
WHEN OLD.stage = 'PENDING_APPROVAL' AND NEW.stage = 'PREVIEW_SENT'
BEGIN
    UPDATE pending_actions SET status = 'EXPIRED'
    WHERE conversation_id = OLD.id AND status = 'PENDING' AND type = 'SEND_PAYMENT_LINK';
END""",
}


def up(migrator, db):
    if isinstance(db, peewee.PostgresqlDatabase):
        ((schema,),) = db.execute_sql("SELECT quote_ident(current_schema())").fetchall()
        names = {"conversations": f"{schema}.close_engine_conversations", "actions": f"{schema}.pending_actions"}
        enqueue = ENQUEUE.format(
            prefix="close_engine.",
            moment="NEW.approved_at",
            greatest="greatest",
            submitted_by="NEW.metadata ->> 'submittedBy'",
            send_after=SEND_AFTER,
            **names,
        )
        withdraw = WITHDRAW.format(prefix="close_engine.", now_it_is="coalesce(NEW.stage, 'deleted')")
        functions = [
            text.format(enqueue=enqueue, withdraw=withdraw, **names) for text in (GUARD, FOLLOW, WITHDRAW_WAITING)
        ]
        statements = [*functions, REVOKE, *POSTGRES_TRIGGERS, *POSTGRES_WITHDRAWING]
        prefix, mark = "close_engine.", "%s"
    else:
        statements = [f"CREATE TRIGGER IF NOT EXISTS {name} {body}" for name, body in SQLITE_TRIGGERS.items()]
        prefix, mark = "close_engine_", "?"
    for transition in TRANSITIONS:
        db.execute_sql(
            f"INSERT INTO {prefix}transitions VALUES ('action', {mark}, {mark}, {mark}) ON CONFLICT DO NOTHING",
            transition,
        )
    statements += [f"CREATE INDEX IF NOT EXISTS {name} ON {covered}" for name, covered in INDEXES.items()]
    for statement in statements:
        db.execute_sql(statement)


def down(migrator, db):
    if isinstance(db, peewee.PostgresqlDatabase):
        prefix = "close_engine."
        statements = [
            "DROP TRIGGER IF EXISTS zz_close_engine_closing ON close_engine_conversations",
            "DROP TRIGGER IF EXISTS zz_close_engine_gone ON close_engine_conversations",
            "DROP TRIGGER IF EXISTS zz_close_engine_decision ON pending_actions",
            "DROP TRIGGER IF EXISTS zz_close_engine_guard ON pending_actions",
            "DROP FUNCTION IF EXISTS close_engine.withdraw_waiting()",
            "DROP FUNCTION IF EXISTS close_engine.follow_decision()",
            "DROP FUNCTION IF EXISTS close_engine.guard_action()",
        ]
    else:
        prefix = "close_engine_"
        statements = [f"DROP TRIGGER IF EXISTS {name}" for name in SQLITE_TRIGGERS]
    statements += [f"DROP INDEX IF EXISTS {name}" for name in INDEXES]
    statements.append(f"DELETE FROM {prefix}transitions WHERE machine = 'action'")
    for statement in statements:
        db.execute_sql(statement)
