-- Decisions on pending actions, and the closing of conversations: triggers apply the consequences in the same
-- transaction, no matter who writes.
--
-- The actions are a second, small machine in close_engine.transitions: PENDING to APPROVED, REJECTED or EXPIRED.
-- Approving puts the message into the outbox, once; a reply that is older than the lead's last words cannot be approved.
-- Rejecting, expiring or deleting the last pending payment link
-- returns the conversation from PENDING_APPROVAL to PREVIEW_SENT. When a conversation closes or is deleted, its waiting
-- texts are withdrawn and its drafts expire.
--
-- A decision locks the action first, then its conversation. Closing locks the conversation first, so it skips locked
-- actions instead of waiting for them: otherwise the two could deadlock.
--
-- The script replaces `public` with the current schema, which holds the CRM's tables. The file can safely run twice.

INSERT INTO close_engine.transitions (machine, trigger, source, dest) VALUES
    ('action', 'approve', 'PENDING', 'APPROVED'),
    ('action', 'reject', 'PENDING', 'REJECTED'),
    ('action', 'expire', 'PENDING', 'EXPIRED')
ON CONFLICT (machine, source, dest) DO UPDATE SET trigger = EXCLUDED.trigger;

-- The moment in metadata.sendAfter or metadata.notAfter, in UTC: what the library writes there, without an offset, and
-- what toISOString() and other writers of ISO 8601 do, with one. Cut to milliseconds first: the cast would round.
CREATE OR REPLACE FUNCTION close_engine.moment_in(action text, metadata jsonb, name text)
RETURNS timestamp without time zone
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    given text := metadata ->> name;
    at timestamp;
BEGIN
    IF given IS NULL THEN
        RETURN NULL;
    END IF;
    IF given ~ ('^[0-9]{4}-[0-9]{2}-[0-9]{2}[ T]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]+)?'
            || '(Z|[+-](0[0-9]|1[0-4]):[0-5][0-9])?$') THEN
        given := pg_catalog.regexp_replace(given, '(?<=[.][0-9][0-9][0-9])[0-9]+', '');
        BEGIN
            at := (given || CASE WHEN given ~ '(Z|[+-][0-9]{2}:[0-9]{2})$' THEN '' ELSE 'Z' END)::timestamptz
                AT TIME ZONE 'UTC';
        EXCEPTION WHEN data_exception THEN
            at := NULL; -- as of 30 February
        END;
    END IF;
    IF coalesce(at < timestamp '0001-01-01' OR at >= timestamp '9999-01-01', true) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: action ' || action
            || ' cannot be approved: its metadata.' || name || ' is ' || pg_catalog.left(metadata ->> name, 100)
            || '; write a time like 2026-01-31T08:00:00.000Z';
    END IF;
    RETURN at;
END
$body$;

-- The id of the newest text of the lead; 0 if there is none. What a draft knew is compared with it, never a clock.
CREATE OR REPLACE FUNCTION close_engine.last_text(conversation text) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    RETURN coalesce((SELECT pg_catalog.max(i.id) FROM close_engine.inbox i
        WHERE i.kind = 'text' AND i.conversation_id = conversation), 0);
END
$body$;

-- What becomes of a draft if the lead writes: only a reply is withdrawn, unless whoever wrote it said otherwise.
CREATE OR REPLACE FUNCTION close_engine.if_lead_writes(type text, metadata jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    RETURN coalesce(metadata ->> 'ifLeadWrites', CASE type WHEN 'SEND_MESSAGE' THEN 'withdraw' ELSE 'send' END);
END
$body$;

-- Where a stalled conversation resumes: where things stand. That is the stage it stalled in, corrected by what happened
-- since. Of an adopted one, the history may not know it. The guard asks this for every writer.
CREATE OR REPLACE FUNCTION close_engine.resumes_to(conversation text, link_sent_at timestamp) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $body$
SELECT CASE
    WHEN link_sent_at > stalled.at OR 'SEND_PAYMENT_LINK' = ANY (sent.topics) THEN 'PAYMENT_SENT'
    WHEN 'SEND_PREVIEW' = ANY (sent.topics) THEN 'PREVIEW_SENT'
    -- What others sent counts as well.
    WHEN stalled.source = 'INITIATED' AND (sent.topics <> '{}' OR EXISTS (
        SELECT FROM close_engine.texts t WHERE t.direction = 'outbound' AND t.at >= stalled.at
            AND t.lead_id = (SELECT c.lead_id FROM public.close_engine_conversations c WHERE c.id = conversation)))
        THEN 'QUALIFYING'
    WHEN stalled.source = 'PENDING_APPROVAL' AND NOT EXISTS (
            SELECT FROM public.pending_actions a WHERE a.conversation_id = conversation
                AND a.status = 'PENDING' AND a.type = 'SEND_PAYMENT_LINK')
        AND NOT EXISTS (
            SELECT FROM close_engine.outbox o WHERE o.conversation_id = conversation
                AND o.status = 'PENDING' AND o.topic = 'SEND_PAYMENT_LINK') THEN 'PREVIEW_SENT'
    ELSE coalesce(stalled.source, CASE WHEN link_sent_at IS NULL THEN 'QUALIFYING' ELSE 'PAYMENT_SENT' END)
    END
FROM (SELECT) one
LEFT JOIN LATERAL (
    SELECT h.id, h.created_at AS at, CASE WHEN h.source IN ('INITIATED', 'QUALIFYING', 'COLLECTING_INFO', 'BUILDING',
        'PREVIEW_SENT', 'EDIT_LOOP', 'PENDING_APPROVAL', 'PAYMENT_SENT') THEN h.source END AS source
    FROM close_engine.history h WHERE h.conversation_id = conversation AND h.dest = 'STALLED'
    ORDER BY h.id DESC LIMIT 1) stalled ON true
CROSS JOIN LATERAL (
    SELECT ARRAY(SELECT o.topic FROM close_engine.outbox o WHERE o.conversation_id = conversation
        AND o.status = 'SENT' AND o.topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
        AND (o.sent_at > stalled.at OR o.sent_at IS NULL AND o.after_change >= stalled.id)) AS topics) sent
$body$;

CREATE OR REPLACE FUNCTION close_engine.guard_action() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    moment timestamp := close_engine.moment();
    found text;
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass($table$public.pending_actions$table$::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, $table$public.pending_actions$table$::text);
    END IF;
    -- In an INSERT, OLD is NULL.
    PERFORM close_engine.require_time(changed.name || ' of action ' || NEW.id, changed.at, NULL)
    FROM (VALUES
        ('created_at', NEW.created_at, OLD.created_at),
        ('expires_at', NEW.expires_at, OLD.expires_at),
        ('approved_at', NEW.approved_at, OLD.approved_at)
    ) AS changed (name, at, was) WHERE changed.at IS DISTINCT FROM changed.was;
    IF NEW.metadata IS DISTINCT FROM OLD.metadata THEN
        PERFORM close_engine.require_readable('metadata of action ' || NEW.id, NEW.metadata);
        PERFORM close_engine.require_word('metadata.ifLeadWrites of action ' || NEW.id, NEW.metadata ->> 'ifLeadWrites',
            ARRAY['withdraw', 'send']);
    END IF;
    -- A type from before the guard hinders no write but the approval: nobody would send its message.
    IF NEW.type IS DISTINCT FROM OLD.type
        OR NEW.status = 'APPROVED' AND NEW.status IS DISTINCT FROM OLD.status THEN
        PERFORM close_engine.require_word('type of action ' || NEW.id, NEW.type,
            ARRAY['SEND_PAYMENT_LINK', 'SEND_MESSAGE', 'SEND_PREVIEW']);
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.status IS NOT DISTINCT FROM OLD.status THEN
        -- Who decided stays, and when. So a second click is no error, and changes neither. An approved_at from before the
        -- guard may be in no reader's reach: it may be corrected.
        IF (NEW.approved_by, NEW.approved_at) IS DISTINCT FROM (OLD.approved_by, OLD.approved_at)
            AND EXISTS (SELECT FROM close_engine.transitions WHERE machine = 'action' AND dest = OLD.status) THEN
            NEW.approved_by := OLD.approved_by;
            IF coalesce(OLD.approved_at BETWEEN timestamp '0001-01-01' AND timestamp '9998-12-31 23:59:59.999', true)
                THEN
                NEW.approved_at := OLD.approved_at;
            END IF;
        END IF;
        RETURN NEW;
    END IF;
    IF NOT EXISTS (SELECT FROM close_engine.transitions
                   WHERE machine = 'action' AND NEW.status IN (source, dest)) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: ' || coalesce(NEW.status, 'NULL') || ' is not an action status';
    END IF;
    IF TG_OP = 'INSERT' THEN
        IF EXISTS (SELECT FROM close_engine.transitions WHERE machine = 'action' AND dest = NEW.status) THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: action ' || NEW.id
                || ' cannot begin as ' || NEW.status || ': insert it as PENDING, then decide it';
        END IF;
        -- The default or now(): rounded by the column, and local time if the session is not in UTC. Replace it.
        IF NEW.created_at = localtimestamp(3) THEN
            NEW.created_at := least(moment, current_timestamp(3) AT TIME ZONE 'UTC');
        END IF;
        RETURN NEW;
    END IF;
    -- What was there before the guard may be no status. It may become PENDING, and then be decided.
    IF NOT EXISTS (SELECT FROM close_engine.transitions
                   WHERE machine = 'action' AND source = OLD.status AND dest = NEW.status)
        AND (NEW.status <> 'PENDING' OR EXISTS (SELECT FROM close_engine.transitions
                                                WHERE machine = 'action' AND OLD.status IN (source, dest))) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: action ' || OLD.id || ' cannot go from ' || OLD.status || ' to ' || NEW.status;
    END IF;
    -- Whatever moment the writer gives, the decision is made now.
    IF NEW.status = 'APPROVED' OR NEW.approved_at IS NOT NULL THEN
        NEW.approved_at := moment;
    END IF;
    IF NEW.status <> 'APPROVED' THEN
        RETURN NEW;
    END IF;
    IF OLD.expires_at <= moment THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: action ' || OLD.id || ' has expired';
    END IF;
    IF NEW.type = 'SEND_PAYMENT_LINK' AND NOT coalesce(NEW.approved_by ~ '[^[:space:]]', false) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: action ' || OLD.id
            || ' cannot be approved: somebody must approve a payment link; write who in approved_by';
    ELSIF NEW.type = 'SEND_PAYMENT_LINK' AND NOT coalesce(pg_catalog.jsonb_typeof(NEW.metadata -> 'paymentUrl') = 'string'
            AND NEW.metadata ->> 'paymentUrl' ~ '[^[:space:]]', false) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: action ' || OLD.id
            || ' cannot be approved: a payment link needs its URL; write it in metadata.paymentUrl';
    END IF;
    PERFORM close_engine.moment_in(OLD.id, NEW.metadata, 'sendAfter'),
        close_engine.moment_in(OLD.id, NEW.metadata, 'notAfter');
    -- Lock the conversation, so that it cannot close between this check and the commit.
    SELECT stage INTO found FROM public.close_engine_conversations WHERE id = NEW.conversation_id FOR NO KEY UPDATE;
    IF coalesce(found, 'deleted') IN ('COMPLETED', 'CLOSED_LOST', 'deleted') THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: action ' || OLD.id
            || ' cannot be approved: its conversation is ' || coalesce(found, 'deleted');
    END IF;
    -- Nor can the lead write now. What they wrote while this waited for the conversation has superseded the draft.
    IF close_engine.if_lead_writes(NEW.type, NEW.metadata) = 'withdraw'
        AND close_engine.last_text(NEW.conversation_id)
            > (SELECT d.after_text FROM close_engine.drafts d WHERE d.action_id = OLD.id) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: action ' || OLD.id
            || ' cannot be approved: the lead has written since it was drafted; submit a new draft';
    END IF;
    RETURN NEW;
END
$body$;

CREATE OR REPLACE FUNCTION close_engine.follow_decision() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    outer_context text := pg_catalog.current_setting('close_engine.context', true);
    context jsonb;
    version timestamp;
    -- In a DELETE, NEW is NULL. What waited and is deleted ends as if it were rejected; a decision that is deleted stands.
    action record := coalesce(NEW, OLD);
    happened text;
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass($table$public.pending_actions$table$::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, $table$public.pending_actions$table$::text);
    END IF;
    -- In an INSERT, OLD is NULL.
    IF NEW.status = 'PENDING' AND OLD.status IS DISTINCT FROM NEW.status THEN
        happened := 'action:pending';
    ELSIF OLD.status = 'PENDING' AND NEW.status IS DISTINCT FROM OLD.status THEN
        happened := CASE WHEN NEW.status = 'APPROVED' THEN 'action:approved'
            WHEN NEW.status = 'EXPIRED' AND NEW.metadata ->> 'supersededBy' IS NOT NULL THEN 'action:superseded'
            WHEN NEW.status = 'EXPIRED' THEN 'action:expired' ELSE 'action:rejected' END;
    ELSE
        RETURN NULL;
    END IF;
    -- The context of this decision, in this transaction: one that is left in a session must not name who decides next.
    context := close_engine.context();
    IF NOT coalesce(context ->> 'trigger' = CASE NEW.status WHEN 'REJECTED' THEN 'reject' WHEN 'EXPIRED' THEN 'expire' END
            AND coalesce(context ->> 'id', action.id) = action.id
            AND context ->> 'transaction' = pg_catalog.pg_current_xact_id()::text, false) THEN
        context := NULL;
    END IF;
    PERFORM close_engine.publish(happened, '', action.conversation_id, action.id, pg_catalog.jsonb_build_object(
        'action_id', action.id, 'type', action.type, 'by', coalesce(NEW.approved_by, context ->> 'actor'),
        'submitted_by', action.metadata ->> 'submittedBy', 'draft', action.draft_message,
        'expires_at', pg_catalog.to_char(action.expires_at, 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
        'reason', CASE NEW.status WHEN 'REJECTED' THEN action.metadata ->> 'rejectionReason' END));
    IF happened = 'action:pending' THEN
        RETURN NULL;
    END IF;
    IF NEW.status = 'APPROVED' THEN
        INSERT INTO close_engine.outbox
            (conversation_id, topic, body, payload, trigger, approved_by, submitted_by, key, action_id, if_lead_writes,
             after_text, after_change, created_at, available_at, not_after, priority)
        -- Whoever changes the words while approving them is their author.
        SELECT NEW.conversation_id, NEW.type, NEW.draft_message,
            CASE WHEN NEW.draft_message <> OLD.draft_message
                AND coalesce(pg_catalog.jsonb_typeof(NEW.metadata) = 'object', true)
                THEN coalesce(NEW.metadata, '{}') || pg_catalog.jsonb_build_object('editedBy', NEW.approved_by)
                ELSE NEW.metadata END,
            CASE WHEN NEW.type = 'SEND_PREVIEW' THEN 'send_preview'
                WHEN NEW.type = 'SEND_PAYMENT_LINK' THEN 'send_payment_link'
                WHEN c.stage = 'INITIATED' THEN 'start_qualifying' END,
            NEW.approved_by, NEW.metadata ->> 'submittedBy', 'close_engine:action:' || NEW.id,
            NEW.id, close_engine.if_lead_writes(NEW.type, NEW.metadata), close_engine.last_text(NEW.conversation_id),
            (SELECT pg_catalog.max(h.id) FROM close_engine.history h WHERE h.conversation_id = NEW.conversation_id),
            NEW.approved_at,
            greatest(NEW.approved_at, close_engine.moment_in(NEW.id, NEW.metadata, 'sendAfter')),
            close_engine.moment_in(NEW.id, NEW.metadata, 'notAfter'),
            CASE WHEN NEW.metadata ->> 'sendPriority' ~ '^[0-9]$' THEN (NEW.metadata ->> 'sendPriority')::integer
                WHEN NEW.type = 'SEND_PAYMENT_LINK' THEN 5 ELSE 0 END
        FROM public.close_engine_conversations c WHERE c.id = NEW.conversation_id
        ON CONFLICT (conversation_id, key) WHERE key IS NOT NULL DO NOTHING;
        RETURN NULL;
    END IF;
    IF action.type <> 'SEND_PAYMENT_LINK' THEN
        RETURN NULL;
    END IF;
    SELECT greatest(coalesce((context ->> 'at')::timestamp, close_engine.moment()),
            updated_at + interval '1 millisecond')
        INTO version FROM public.close_engine_conversations
        WHERE id = action.conversation_id AND stage = 'PENDING_APPROVAL' FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    ELSIF EXISTS (SELECT FROM public.pending_actions WHERE conversation_id = action.conversation_id
            AND status = 'PENDING' AND type = 'SEND_PAYMENT_LINK') THEN
        -- Write the row, so that a REPEATABLE READ that cannot see this decision fails instead of staying here for good.
        UPDATE public.close_engine_conversations SET updated_at = version WHERE id = action.conversation_id;
        RETURN NULL;
    END IF;
    -- The guard would not believe a context of the CRM's role, and cannot see that this function set it. So the history
    -- row gets it afterwards.
    PERFORM pg_catalog.set_config('close_engine.context', '', true);
    UPDATE public.close_engine_conversations SET stage = 'PREVIEW_SENT', updated_at = version
    WHERE id = action.conversation_id;
    PERFORM pg_catalog.set_config('close_engine.context', coalesce(outer_context, ''), true);
    UPDATE close_engine.history SET
        actor = CASE WHEN context IS NULL THEN actor ELSE context ->> 'actor' END,
        reason = context ->> 'reason',
        metadata = pg_catalog.jsonb_build_object('action_id', action.id, 'status', coalesce(NEW.status, 'DELETED'))
    WHERE id = (SELECT h.id FROM close_engine.history h WHERE h.conversation_id = action.conversation_id
        AND h.trigger = 'withdraw_approval' ORDER BY h.id DESC LIMIT 1);
    RETURN NULL;
END
$body$;

CREATE OR REPLACE FUNCTION close_engine.withdraw_waiting() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    -- In a DELETE, NEW is NULL, and so is every comparison with it. In a TRUNCATE, OLD is NULL too.
    over boolean := coalesce(NEW.stage IN ('COMPLETED', 'CLOSED_LOST') AND NEW.stage <> OLD.stage, true);
    approval_withdrawn boolean := OLD.stage = 'PENDING_APPROVAL' AND NEW.stage = 'PREVIEW_SENT';
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass($table$public.close_engine_conversations$table$::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, $table$public.close_engine_conversations$table$::text);
    END IF;
    IF TG_OP = 'TRUNCATE' THEN
        -- All of them are gone, and end as if each had been deleted.
        UPDATE close_engine.outbox SET status = 'WITHDRAWN', last_error = 'the conversation is deleted'
        WHERE status = 'PENDING' AND leased_by IS NULL
            AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK');
        UPDATE public.pending_actions SET status = 'EXPIRED' WHERE id IN (SELECT id FROM public.pending_actions
            WHERE status = 'PENDING' FOR UPDATE SKIP LOCKED);
        RETURN NULL;
    END IF;
    IF over THEN
        UPDATE close_engine.outbox
        SET status = 'WITHDRAWN', last_error = 'the conversation is ' || coalesce(NEW.stage, 'deleted')
        WHERE conversation_id = OLD.id AND status = 'PENDING' AND leased_by IS NULL
            AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK');
    END IF;
    IF over OR approval_withdrawn THEN
        -- Skip actions that another transaction is deciding.
        UPDATE public.pending_actions SET status = 'EXPIRED' WHERE id IN (SELECT id FROM public.pending_actions
            WHERE conversation_id = OLD.id AND status = 'PENDING'
                AND (over OR type = 'SEND_PAYMENT_LINK') FOR UPDATE SKIP LOCKED);
    END IF;
    RETURN NULL;
END
$body$;

-- Keep, for each pending action, what it knew, and a deadline if it expires.
CREATE OR REPLACE FUNCTION close_engine.follow_draft() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass($table$public.pending_actions$table$::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, $table$public.pending_actions$table$::text);
    END IF;
    IF TG_OP = 'TRUNCATE' THEN
        DELETE FROM close_engine.drafts;
        DELETE FROM close_engine.deadlines WHERE trigger = 'expire';
        -- Nothing waits any more.
        UPDATE public.close_engine_conversations SET stage = 'PREVIEW_SENT' WHERE stage = 'PENDING_APPROVAL';
        RETURN NULL;
    END IF;
    IF TG_OP = 'UPDATE'
        AND (NEW.id, NEW.status, NEW.expires_at) IS NOT DISTINCT FROM (OLD.id, OLD.status, OLD.expires_at) THEN
        RETURN NULL;
    END IF;
    -- In an INSERT, OLD is NULL; in a DELETE, NEW.
    IF NEW.status = 'PENDING' AND OLD.status IS DISTINCT FROM 'PENDING' THEN
        INSERT INTO close_engine.drafts (action_id, after_text)
        VALUES (NEW.id, close_engine.last_text(NEW.conversation_id))
        ON CONFLICT (action_id) DO UPDATE SET after_text = EXCLUDED.after_text;
    ELSIF OLD.status = 'PENDING' AND NEW.status IS DISTINCT FROM 'PENDING' THEN
        DELETE FROM close_engine.drafts WHERE action_id = OLD.id;
    ELSIF NEW.id <> OLD.id THEN
        UPDATE close_engine.drafts SET action_id = NEW.id WHERE action_id = OLD.id;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM close_engine.deadlines WHERE trigger = 'expire' AND subject_id = OLD.id;
    END IF;
    IF NEW.status = 'PENDING' AND NEW.expires_at IS NOT NULL THEN
        INSERT INTO close_engine.deadlines (trigger, subject_id, at) VALUES ('expire', NEW.id, NEW.expires_at)
        ON CONFLICT (trigger, subject_id) DO UPDATE SET at = EXCLUDED.at;
    END IF;
    RETURN NULL;
END
$body$;

-- A human takes over: what others have drafted and waits is withdrawn. Or hands back.
CREATE OR REPLACE FUNCTION close_engine.follow_takeover() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass('close_engine.takeovers'::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, 'close_engine.takeovers');
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF NEW.handed_back_by IS NOT NULL AND OLD.handed_back_at IS NULL THEN
            PERFORM close_engine.publish('conversation:handed_back', '', NEW.conversation_id, NEW.id::text,
                pg_catalog.jsonb_build_object('by', NEW.handed_back_by));
        END IF;
        RETURN NULL;
    END IF;
    PERFORM close_engine.publish('conversation:taken_over', '', NEW.conversation_id, NEW.id::text,
        pg_catalog.jsonb_build_object('by', NEW.taken_by, 'reason', NEW.reason, 'until', NEW.until));
    UPDATE close_engine.outbox SET status = 'WITHDRAWN', last_error = 'a human has taken over'
    WHERE conversation_id = NEW.conversation_id AND status = 'PENDING' AND leased_by IS NULL
        AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
        AND NEW.taken_by NOT IN (coalesce(submitted_by, ''), coalesce(approved_by, ''));
    -- Skip actions that another transaction is deciding.
    UPDATE public.pending_actions SET status = 'EXPIRED' WHERE id IN (SELECT id FROM public.pending_actions WHERE conversation_id = NEW.conversation_id AND status = 'PENDING'
        AND coalesce(metadata ->> 'submittedBy', '') <> NEW.taken_by FOR UPDATE SKIP LOCKED);
    RETURN NULL;
END
$body$;

-- Nobody may attach these functions to a table of their own.
REVOKE EXECUTE ON FUNCTION
    close_engine.guard_action(), close_engine.follow_decision(), close_engine.withdraw_waiting(),
    close_engine.follow_draft(), close_engine.follow_takeover() FROM PUBLIC;

-- These triggers name no column: the CRM could not alter it any more. What the action knew comes first (aa), so that a
-- trigger that changes the action again has the last word.
CREATE OR REPLACE TRIGGER aa_close_engine_draft AFTER INSERT OR UPDATE OR DELETE ON public.pending_actions
    FOR EACH ROW EXECUTE FUNCTION close_engine.follow_draft();
CREATE OR REPLACE TRIGGER zz_close_engine_guard BEFORE INSERT OR UPDATE ON public.pending_actions
    FOR EACH ROW EXECUTE FUNCTION close_engine.guard_action();
CREATE OR REPLACE TRIGGER zz_close_engine_decision AFTER INSERT OR UPDATE OR DELETE ON public.pending_actions
    FOR EACH ROW EXECUTE FUNCTION close_engine.follow_decision();
CREATE OR REPLACE TRIGGER zz_close_engine_truncation AFTER TRUNCATE ON public.pending_actions
    FOR EACH STATEMENT EXECUTE FUNCTION close_engine.follow_draft();
-- PostgreSQL prepares the WHEN condition again for every statement, so keep it short. It lets some rows through for
-- which the function does nothing.
CREATE OR REPLACE TRIGGER zz_close_engine_closing AFTER UPDATE ON public.close_engine_conversations
    FOR EACH ROW WHEN (OLD.stage = 'PENDING_APPROVAL' OR NEW.stage IN ('COMPLETED', 'CLOSED_LOST'))
    EXECUTE FUNCTION close_engine.withdraw_waiting();
CREATE OR REPLACE TRIGGER zz_close_engine_gone AFTER DELETE ON public.close_engine_conversations
    FOR EACH ROW EXECUTE FUNCTION close_engine.withdraw_waiting();
CREATE OR REPLACE TRIGGER zz_close_engine_emptied AFTER TRUNCATE ON public.close_engine_conversations
    FOR EACH STATEMENT EXECUTE FUNCTION close_engine.withdraw_waiting();

CREATE OR REPLACE TRIGGER close_engine_takeover AFTER INSERT OR UPDATE ON close_engine.takeovers
    FOR EACH ROW EXECUTE FUNCTION close_engine.follow_takeover();

-- Whatever happened while there were no triggers, bring the drafts, the deadlines and the outbox up to the rows.
DELETE FROM close_engine.drafts d WHERE NOT EXISTS (
    SELECT FROM public.pending_actions a WHERE a.id = d.action_id AND a.status = 'PENDING');
INSERT INTO close_engine.drafts (action_id, after_text)
SELECT a.id, close_engine.last_text(a.conversation_id) FROM public.pending_actions a WHERE a.status = 'PENDING'
ON CONFLICT DO NOTHING;
DELETE FROM close_engine.deadlines d WHERE d.trigger = 'expire' AND NOT EXISTS (
    SELECT FROM public.pending_actions a WHERE a.id = d.subject_id AND a.status = 'PENDING' AND a.expires_at = d.at);
INSERT INTO close_engine.deadlines (trigger, subject_id, at)
SELECT 'expire', a.id, a.expires_at FROM public.pending_actions a
WHERE a.status = 'PENDING' AND a.expires_at IS NOT NULL
ON CONFLICT DO NOTHING;
UPDATE close_engine.outbox o SET status = 'WITHDRAWN', last_error = 'the conversation is deleted'
WHERE o.status = 'PENDING' AND o.leased_by IS NULL
    AND NOT EXISTS (SELECT FROM public.close_engine_conversations c WHERE c.id = o.conversation_id);
