-- Decisions on pending actions, and the closing of conversations: triggers apply the consequences in the same
-- transaction, no matter who writes.
--
-- The actions are a second, small machine in close_engine_transitions: PENDING to APPROVED, REJECTED or EXPIRED.
-- Approving puts the message into the outbox, once; a reply that is older than the lead's last words cannot be approved.
-- Rejecting, expiring or deleting the last pending payment link
-- returns the conversation from PENDING_APPROVAL to PREVIEW_SENT. When a conversation closes or is deleted, its waiting
-- texts are withdrawn and its drafts expire.
--
-- The file can safely run twice.

INSERT INTO close_engine_transitions (machine, "trigger", source, dest) VALUES
    ('action', 'approve', 'PENDING', 'APPROVED'),
    ('action', 'reject', 'PENDING', 'REJECTED'),
    ('action', 'expire', 'PENDING', 'EXPIRED')
ON CONFLICT (machine, source, dest) DO UPDATE SET "trigger" = EXCLUDED."trigger";

-- Where a stalled conversation resumes: where things stand. That is the stage it stalled in, corrected by what happened
-- since. Of an adopted one, the history may not know it. The guard asks this for every writer. SQLite takes a partial
-- index only if the index's own condition stands in the query.
DROP TRIGGER IF EXISTS close_engine_guard_resume;
DROP VIEW IF EXISTS close_engine_resumes_to;
CREATE VIEW close_engine_resumes_to (conversation_id, stage) AS
SELECT c.id, CASE
    WHEN strftime('%Y-%m-%d %H:%M:%f', c.payment_link_sent_at) > h.created_at OR EXISTS (
        SELECT 1 FROM close_engine_outbox o WHERE o.conversation_id = c.id AND o.status = 'SENT'
            AND o.status <> 'PENDING' AND o.topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
            AND o.topic = 'SEND_PAYMENT_LINK'
            AND (o.sent_at > h.created_at OR o.sent_at IS NULL AND o.after_change >= h.id)) THEN 'PAYMENT_SENT'
    WHEN EXISTS (
        SELECT 1 FROM close_engine_outbox o WHERE o.conversation_id = c.id AND o.status = 'SENT'
            AND o.status <> 'PENDING' AND o.topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
            AND o.topic = 'SEND_PREVIEW'
            AND (o.sent_at > h.created_at OR o.sent_at IS NULL AND o.after_change >= h.id)) THEN 'PREVIEW_SENT'
    WHEN h.source = 'INITIATED' AND EXISTS (
        SELECT 1 FROM close_engine_outbox o WHERE o.conversation_id = c.id AND o.status = 'SENT'
            AND o.status <> 'PENDING' AND o.topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
            AND o.topic = 'SEND_MESSAGE'
            AND (o.sent_at > h.created_at OR o.sent_at IS NULL AND o.after_change >= h.id)) THEN 'QUALIFYING'
    -- What others sent counts as well.
    WHEN h.source = 'INITIATED' AND EXISTS (
        SELECT 1 FROM close_engine_texts t WHERE t.lead_id = c.lead_id AND t.direction = 'outbound'
            AND t.at >= h.created_at) THEN 'QUALIFYING'
    WHEN h.source = 'PENDING_APPROVAL' AND NOT EXISTS (
            SELECT 1 FROM pending_actions a WHERE a.conversation_id = c.id
                AND a.status = 'PENDING' AND a.type = 'SEND_PAYMENT_LINK')
        AND NOT EXISTS (
            SELECT 1 FROM close_engine_outbox o WHERE o.conversation_id = c.id
                AND o.status = 'PENDING' AND o.topic = 'SEND_PAYMENT_LINK') THEN 'PREVIEW_SENT'
    WHEN h.source IN ('INITIATED', 'QUALIFYING', 'COLLECTING_INFO', 'BUILDING', 'PREVIEW_SENT', 'EDIT_LOOP',
        'PENDING_APPROVAL', 'PAYMENT_SENT') THEN h.source
    WHEN c.payment_link_sent_at IS NULL THEN 'QUALIFYING'
    ELSE 'PAYMENT_SENT' END
FROM close_engine_conversations c LEFT JOIN close_engine_history h ON h.id = (
    SELECT stalled.id FROM close_engine_history stalled
    WHERE stalled.conversation_id = c.id AND stalled.dest = 'STALLED' ORDER BY stalled.id DESC LIMIT 1);

-- Who writes along that a payment link was sent since may resume to PAYMENT_SENT. RAISE takes nothing but a literal.
CREATE TRIGGER close_engine_guard_resume
BEFORE UPDATE ON close_engine_conversations
WHEN OLD.stage = 'STALLED' AND NEW.stage NOT IN ('STALLED', 'COMPLETED', 'CLOSED_LOST')
    AND (NEW.stage = 'PAYMENT_SENT' AND strftime('%Y-%m-%d %H:%M:%f', NEW.payment_link_sent_at) > (
        SELECT h.created_at FROM close_engine_history h WHERE h.conversation_id = OLD.id AND h.dest = 'STALLED'
        ORDER BY h.id DESC LIMIT 1)) IS NOT TRUE
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to INITIATED, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'INITIATED' AND NEW.stage <> 'INITIATED';
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to QUALIFYING, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'QUALIFYING' AND NEW.stage <> 'QUALIFYING';
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to COLLECTING_INFO, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'COLLECTING_INFO' AND NEW.stage <> 'COLLECTING_INFO';
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to BUILDING, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'BUILDING' AND NEW.stage <> 'BUILDING';
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to PREVIEW_SENT, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'PREVIEW_SENT' AND NEW.stage <> 'PREVIEW_SENT';
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to EDIT_LOOP, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'EDIT_LOOP' AND NEW.stage <> 'EDIT_LOOP';
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to PENDING_APPROVAL, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'PENDING_APPROVAL' AND NEW.stage <> 'PENDING_APPROVAL';
    SELECT RAISE(ABORT, 'close_engine: this conversation can resume only to PAYMENT_SENT, where things stand')
    FROM close_engine_resumes_to WHERE conversation_id = OLD.id AND stage = 'PAYMENT_SENT' AND NEW.stage <> 'PAYMENT_SENT';
END;

DROP TRIGGER IF EXISTS close_engine_action_insert;
CREATE TRIGGER close_engine_action_insert
BEFORE INSERT ON pending_actions
WHEN NOT EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'action' AND NEW.status IN (source, dest))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this is not an action status; the statuses are in close_engine_transitions');
END;

DROP TRIGGER IF EXISTS close_engine_action_begins;
CREATE TRIGGER close_engine_action_begins
BEFORE INSERT ON pending_actions
WHEN EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'action' AND dest = NEW.status)
BEGIN
    SELECT RAISE(ABORT, 'close_engine: an action cannot begin with this status: insert it as PENDING, then decide it');
END;

-- What was there before the guard may be no status. It may become PENDING, and then be decided.
DROP TRIGGER IF EXISTS close_engine_action_update;
CREATE TRIGGER close_engine_action_update
BEFORE UPDATE ON pending_actions
WHEN NEW.status IS NOT OLD.status
    AND NOT EXISTS (SELECT 1 FROM close_engine_transitions
                    WHERE machine = 'action' AND source = OLD.status AND dest = NEW.status)
    AND (NEW.status <> 'PENDING' OR EXISTS (SELECT 1 FROM close_engine_transitions
                                            WHERE machine = 'action' AND OLD.status IN (source, dest)))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this status change is not in close_engine_transitions; a decision is final');
END;

-- What Python cannot read back is not let in: one such row would stop whoever reads a list of them. What was there
-- before and is not changed hinders nobody. Python also refuses 30 February, which SQLite takes for 2 March.
DROP TRIGGER IF EXISTS close_engine_action_insert_readable;
CREATE TRIGGER close_engine_action_insert_readable
BEFORE INSERT ON pending_actions
BEGIN
    SELECT RAISE(ABORT, 'close_engine: type must be one of SEND_PAYMENT_LINK, SEND_MESSAGE, SEND_PREVIEW')
    WHERE NEW.type NOT IN ('SEND_PAYMENT_LINK', 'SEND_MESSAGE', 'SEND_PREVIEW');
    SELECT RAISE(ABORT, 'close_engine: metadata.ifLeadWrites must be one of withdraw, send')
    WHERE json_valid(NEW.metadata) AND json_extract(NEW.metadata, '$.ifLeadWrites') NOT IN ('withdraw', 'send');

    SELECT RAISE(ABORT, 'close_engine: a time must be a text like 2026-01-31 23:59:59.123, and before the year 9999')
    FROM (SELECT NEW.created_at AS value, NULL AS was
        UNION ALL SELECT NEW.expires_at, NULL
        UNION ALL SELECT NEW.approved_at, NULL)
    WHERE value IS NOT was AND value IS NOT NULL AND NOT (typeof(value) = 'text'
        AND date(substr(value, 1, 10)) IS substr(value, 1, 10) AND substr(value, 1, 4) BETWEEN '0001' AND '9998'
        AND strftime('%s', value) IS NOT NULL);

    -- A number of more than 309 digits is infinite for SQLite. The digits of one that is too long stand in a row.
    SELECT RAISE(ABORT, 'close_engine: not every reader could read this JSON: it is not valid, nested deeper than 100 levels, longer than 2000000 characters, or has a number of more than 4000 digits')
    FROM (SELECT NEW.metadata AS document, NULL AS was)
    WHERE document IS NOT was AND document IS NOT NULL AND CASE
        WHEN NOT json_valid(document) OR length(document) > 2000000 THEN 1
        WHEN length(document) <= 200 THEN 0
        WHEN EXISTS (
            SELECT 1 FROM (
                WITH RECURSIVE deep(inner, level) AS (
                    SELECT document, 1
                    UNION ALL
                    SELECT j.value, level + 1 FROM deep JOIN json_each(deep.inner) j
                    WHERE j.type IN ('array', 'object') AND level <= 100)
                SELECT level FROM deep) WHERE level > 100) THEN 1
        WHEN length(document) <= 4000 THEN 0
        ELSE instr(replace(replace(replace(replace(replace(replace(replace(replace(replace(document,
                '1', '0'), '2', '0'), '3', '0'), '4', '0'), '5', '0'), '6', '0'), '7', '0'), '8', '0'), '9', '0'),
                printf('%04001d', 0)) > 0
            AND EXISTS (SELECT 1 FROM json_tree(document) WHERE type = 'integer' AND atom IN (9e999, -9e999))
        END;
END;

DROP TRIGGER IF EXISTS close_engine_action_update_readable;
CREATE TRIGGER close_engine_action_update_readable
BEFORE UPDATE ON pending_actions
BEGIN
    -- A type from before the guard hinders no write but the approval: nobody would send its message.
    SELECT RAISE(ABORT, 'close_engine: type must be one of SEND_PAYMENT_LINK, SEND_MESSAGE, SEND_PREVIEW')
    WHERE NEW.type NOT IN ('SEND_PAYMENT_LINK', 'SEND_MESSAGE', 'SEND_PREVIEW')
        AND (NEW.type IS NOT OLD.type OR NEW.status = 'APPROVED' AND OLD.status IS NOT 'APPROVED');
    SELECT RAISE(ABORT, 'close_engine: metadata.ifLeadWrites must be one of withdraw, send')
    WHERE NEW.metadata IS NOT OLD.metadata AND json_valid(NEW.metadata)
        AND json_extract(NEW.metadata, '$.ifLeadWrites') NOT IN ('withdraw', 'send');

    SELECT RAISE(ABORT, 'close_engine: a time must be a text like 2026-01-31 23:59:59.123, and before the year 9999')
    FROM (SELECT NEW.created_at AS value, OLD.created_at AS was
        UNION ALL SELECT NEW.expires_at, OLD.expires_at
        UNION ALL SELECT NEW.approved_at, OLD.approved_at)
    WHERE value IS NOT was AND value IS NOT NULL AND NOT (typeof(value) = 'text'
        AND date(substr(value, 1, 10)) IS substr(value, 1, 10) AND substr(value, 1, 4) BETWEEN '0001' AND '9998'
        AND strftime('%s', value) IS NOT NULL);

    -- A number of more than 309 digits is infinite for SQLite. The digits of one that is too long stand in a row.
    SELECT RAISE(ABORT, 'close_engine: not every reader could read this JSON: it is not valid, nested deeper than 100 levels, longer than 2000000 characters, or has a number of more than 4000 digits')
    FROM (SELECT NEW.metadata AS document, OLD.metadata AS was)
    WHERE document IS NOT was AND document IS NOT NULL AND CASE
        WHEN NOT json_valid(document) OR length(document) > 2000000 THEN 1
        WHEN length(document) <= 200 THEN 0
        WHEN EXISTS (
            SELECT 1 FROM (
                WITH RECURSIVE deep(inner, level) AS (
                    SELECT document, 1
                    UNION ALL
                    SELECT j.value, level + 1 FROM deep JOIN json_each(deep.inner) j
                    WHERE j.type IN ('array', 'object') AND level <= 100)
                SELECT level FROM deep) WHERE level > 100) THEN 1
        WHEN length(document) <= 4000 THEN 0
        ELSE instr(replace(replace(replace(replace(replace(replace(replace(replace(replace(document,
                '1', '0'), '2', '0'), '3', '0'), '4', '0'), '5', '0'), '6', '0'), '7', '0'), '8', '0'), '9', '0'),
                printf('%04001d', 0)) > 0
            AND EXISTS (SELECT 1 FROM json_tree(document) WHERE type = 'integer' AND atom IN (9e999, -9e999))
        END;
END;

DROP TRIGGER IF EXISTS close_engine_action_expired;
CREATE TRIGGER close_engine_action_expired
BEFORE UPDATE ON pending_actions
WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING'
    AND strftime('%Y-%m-%d %H:%M:%f', OLD.expires_at) <= coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this action has expired');
END;

-- A date that is moved by no days is one of the calendar: 30 February becomes 2 March.
DROP TRIGGER IF EXISTS close_engine_action_complete;
CREATE TRIGGER close_engine_action_complete
BEFORE UPDATE ON pending_actions
WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING'
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this action cannot be approved: somebody must approve a payment link; write who in approved_by')
    WHERE NEW.type = 'SEND_PAYMENT_LINK'
        AND trim(coalesce(NEW.approved_by, ''), ' ' || char(9, 10, 11, 12, 13)) = '';
    SELECT RAISE(ABORT, 'close_engine: this action cannot be approved: a payment link needs its URL; write it in metadata.paymentUrl')
    WHERE NEW.type = 'SEND_PAYMENT_LINK' AND (json_type(NEW.metadata, '$.paymentUrl') IS NOT 'text'
        OR trim(json_extract(NEW.metadata, '$.paymentUrl'), ' ' || char(9, 10, 11, 12, 13)) = '');
    SELECT RAISE(ABORT, 'close_engine: this action cannot be approved: write its metadata.sendAfter as a time like 2026-01-31T08:00:00.000Z')
    FROM (SELECT json_extract(NEW.metadata, '$.sendAfter') AS send_after)
    WHERE send_after IS NOT NULL AND NOT (
        send_after GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9][ T][0-2][0-9]:[0-9][0-9]:[0-9][0-9]*'
        AND date(substr(send_after, 1, 10), '+0 days') IS substr(send_after, 1, 10)
        AND coalesce(strftime('%Y', send_after) BETWEEN '0001' AND '9998', 0));
    SELECT RAISE(ABORT, 'close_engine: this action cannot be approved: write its metadata.notAfter as a time like 2026-01-31T08:00:00.000Z')
    FROM (SELECT json_extract(NEW.metadata, '$.notAfter') AS not_after)
    WHERE not_after IS NOT NULL AND NOT (
        not_after GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9][ T][0-2][0-9]:[0-9][0-9]:[0-9][0-9]*'
        AND date(substr(not_after, 1, 10), '+0 days') IS substr(not_after, 1, 10)
        AND coalesce(strftime('%Y', not_after) BETWEEN '0001' AND '9998', 0));
END;

DROP TRIGGER IF EXISTS close_engine_action_closed;
CREATE TRIGGER close_engine_action_closed
BEFORE UPDATE ON pending_actions
WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING'
    AND NOT EXISTS (SELECT 1 FROM close_engine_conversations
                    WHERE id = NEW.conversation_id AND stage NOT IN ('COMPLETED', 'CLOSED_LOST'))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this action cannot be approved: its conversation is closed or deleted');
END;

-- What a draft knew is compared with the newest text of the lead, never a clock. Only a reply is withdrawn if the lead writes,
-- unless whoever wrote it said otherwise.
DROP TRIGGER IF EXISTS close_engine_action_superseded;
CREATE TRIGGER close_engine_action_superseded
BEFORE UPDATE ON pending_actions
WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING'
    AND coalesce(json_extract(NEW.metadata, '$.ifLeadWrites'),
        CASE NEW.type WHEN 'SEND_MESSAGE' THEN 'withdraw' ELSE 'send' END) = 'withdraw'
    AND (SELECT max(id) FROM close_engine_inbox WHERE kind = 'text' AND conversation_id = NEW.conversation_id)
        > (SELECT after_text FROM close_engine_drafts WHERE action_id = OLD.id)
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this action cannot be approved: the lead has written since it was drafted; submit a new draft');
END;

DROP TRIGGER IF EXISTS close_engine_action_approved;
CREATE TRIGGER close_engine_action_approved
AFTER UPDATE ON pending_actions
WHEN NEW.status = 'APPROVED' AND OLD.status = 'PENDING'
BEGIN
    -- strftime() rounds text with more than three decimals, but moments are cut, never rounded. So remove the extra digits
    -- first.
    INSERT INTO close_engine_outbox
        (conversation_id, topic, body, payload, "trigger", approved_by, submitted_by, "key", action_id, if_lead_writes,
         after_text, after_change, created_at, available_at, not_after, priority)
    -- Whoever changes the words while approving them is their author.
    SELECT NEW.conversation_id, NEW.type, NEW.draft_message,
        CASE WHEN NEW.draft_message <> OLD.draft_message
            AND coalesce(json_type(NEW.metadata) IN ('object', 'null'), 1)
            THEN json_set(CASE json_type(NEW.metadata) WHEN 'object' THEN NEW.metadata ELSE '{}' END,
                '$.editedBy', NEW.approved_by)
            ELSE NEW.metadata END,
        CASE WHEN NEW.type = 'SEND_PREVIEW' THEN 'send_preview'
            WHEN NEW.type = 'SEND_PAYMENT_LINK' THEN 'send_payment_link'
            WHEN stage = 'INITIATED' THEN 'start_qualifying' END,
        NEW.approved_by, json_extract(NEW.metadata, '$.submittedBy'), 'close_engine:action:' || NEW.id,
        NEW.id, coalesce(json_extract(NEW.metadata, '$.ifLeadWrites'),
            CASE NEW.type WHEN 'SEND_MESSAGE' THEN 'withdraw' ELSE 'send' END),
        coalesce((SELECT max(i.id) FROM close_engine_inbox i
            WHERE i.kind = 'text' AND i.conversation_id = NEW.conversation_id), 0),
        (SELECT max(h.id) FROM close_engine_history h WHERE h.conversation_id = NEW.conversation_id), approved_at,
        max(approved_at, coalesce(
            strftime('%Y-%m-%d %H:%M:%f', CASE WHEN send_after GLOB '*:[0-9][0-9].[0-9][0-9][0-9][0-9]*'
                THEN substr(send_after, 1, instr(send_after, '.') + 3)
                    || ltrim(substr(send_after, instr(send_after, '.') + 4), '0123456789')
                ELSE send_after END),
            approved_at)),
        strftime('%Y-%m-%d %H:%M:%f', CASE WHEN not_after GLOB '*:[0-9][0-9].[0-9][0-9][0-9][0-9]*'
            THEN substr(not_after, 1, instr(not_after, '.') + 3)
                || ltrim(substr(not_after, instr(not_after, '.') + 4), '0123456789')
            ELSE not_after END),
        CASE WHEN json_extract(NEW.metadata, '$.sendPriority') IN (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
            THEN json_extract(NEW.metadata, '$.sendPriority')
            WHEN NEW.type = 'SEND_PAYMENT_LINK' THEN 5 ELSE 0 END
    FROM (SELECT c.stage, json_extract(NEW.metadata, '$.sendAfter') AS send_after,
              json_extract(NEW.metadata, '$.notAfter') AS not_after,
              coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')) AS approved_at
          FROM close_engine_conversations c WHERE c.id = NEW.conversation_id);
END;

-- Whatever moment the writer gives, the decision is made now. Row 3 says that this is the stamp, and no second click.
DROP TRIGGER IF EXISTS close_engine_action_stamped;
CREATE TRIGGER close_engine_action_stamped
AFTER UPDATE ON pending_actions
WHEN OLD.status = 'PENDING' AND NEW.status <> 'PENDING' AND (NEW.status = 'APPROVED' OR NEW.approved_at IS NOT NULL)
BEGIN
    INSERT INTO close_engine_context VALUES (3, '{}');
    UPDATE pending_actions SET approved_at = coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE id = NEW.id;
    DELETE FROM close_engine_context WHERE id = 3;
END;

-- Who decided stays, and when. So a second click is no error, and changes neither. An approved_at from before the guard
-- may be in no reader's reach: it may be corrected.
DROP TRIGGER IF EXISTS close_engine_action_decided;
CREATE TRIGGER close_engine_action_decided
AFTER UPDATE ON pending_actions
WHEN (NEW.approved_by, NEW.approved_at) IS NOT (OLD.approved_by, OLD.approved_at)
    AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'action' AND dest = OLD.status)
    AND NOT EXISTS (SELECT 1 FROM close_engine_context WHERE id = 3)
BEGIN
    INSERT INTO close_engine_context VALUES (3, '{}');
    UPDATE pending_actions SET approved_by = OLD.approved_by,
        approved_at = CASE WHEN OLD.approved_at IS NULL OR (typeof(OLD.approved_at) = 'text'
                AND date(substr(OLD.approved_at, 1, 10)) IS substr(OLD.approved_at, 1, 10)
                AND substr(OLD.approved_at, 1, 4) BETWEEN '0001' AND '9998' AND strftime('%s', OLD.approved_at) IS NOT NULL)
            THEN OLD.approved_at ELSE approved_at END
    WHERE id = NEW.id;
    DELETE FROM close_engine_context WHERE id = 3;
END;

-- What happens to an action is an event. What waited and is deleted ends as if it were rejected.
DROP TRIGGER IF EXISTS close_engine_action_waits;
CREATE TRIGGER close_engine_action_waits
AFTER INSERT ON pending_actions
WHEN NEW.status = 'PENDING'
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    VALUES ('action:pending', '', NEW.conversation_id, NEW.id, json_object('action_id', NEW.id, 'type', NEW.type,
        'submitted_by', CASE WHEN json_valid(NEW.metadata) THEN json_extract(NEW.metadata, '$.submittedBy') END,
        'draft', CAST(NEW.draft_message AS TEXT), 'expires_at', strftime('%Y-%m-%dT%H:%M:%fZ', NEW.expires_at)));
END;

DROP TRIGGER IF EXISTS close_engine_action_happened;
CREATE TRIGGER close_engine_action_happened
AFTER UPDATE ON pending_actions
WHEN NEW.status IS NOT OLD.status AND 'PENDING' IN (NEW.status, OLD.status)
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    SELECT CASE WHEN NEW.status = 'PENDING' THEN 'action:pending' WHEN NEW.status = 'APPROVED' THEN 'action:approved'
            WHEN NEW.status = 'REJECTED' THEN 'action:rejected'
            WHEN json_valid(NEW.metadata) AND json_extract(NEW.metadata, '$.supersededBy') IS NOT NULL
                THEN 'action:superseded'
            ELSE 'action:expired' END,
        '', NEW.conversation_id, NEW.id, json_object('action_id', NEW.id, 'type', NEW.type,
        'submitted_by', CASE WHEN json_valid(NEW.metadata) THEN json_extract(NEW.metadata, '$.submittedBy') END,
        'draft', CAST(NEW.draft_message AS TEXT), 'expires_at', strftime('%Y-%m-%dT%H:%M:%fZ', NEW.expires_at),
        'reason', CASE NEW.status WHEN 'REJECTED' THEN
            CASE WHEN json_valid(NEW.metadata) THEN json_extract(NEW.metadata, '$.rejectionReason') END END,
        'by', coalesce(NEW.approved_by, (
                SELECT json_extract(context, '$.actor') FROM close_engine_context
                WHERE id = 1 AND coalesce(json_extract(context, '$.id'), NEW.id) = NEW.id
                    AND json_extract(context, '$.trigger')
                        = CASE NEW.status WHEN 'REJECTED' THEN 'reject' WHEN 'EXPIRED' THEN 'expire' END)));
END;

DROP TRIGGER IF EXISTS close_engine_action_removed;
CREATE TRIGGER close_engine_action_removed
AFTER DELETE ON pending_actions
WHEN OLD.status = 'PENDING'
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    VALUES ('action:rejected', '', OLD.conversation_id, OLD.id, json_object('action_id', OLD.id, 'type', OLD.type,
        'submitted_by', CASE WHEN json_valid(OLD.metadata) THEN json_extract(OLD.metadata, '$.submittedBy') END,
        'draft', CAST(OLD.draft_message AS TEXT), 'expires_at', strftime('%Y-%m-%dT%H:%M:%fZ', OLD.expires_at)));
END;

DROP TRIGGER IF EXISTS close_engine_action_withdrawn;
CREATE TRIGGER close_engine_action_withdrawn
AFTER UPDATE ON pending_actions
WHEN NEW.status IN ('REJECTED', 'EXPIRED') AND OLD.status = 'PENDING' AND NEW.type = 'SEND_PAYMENT_LINK'
    AND EXISTS (SELECT 1 FROM close_engine_conversations
                WHERE id = NEW.conversation_id AND stage = 'PENDING_APPROVAL')
BEGIN
    -- If the library left a context for this decision, record the withdrawal under the actor who decided.
    INSERT OR REPLACE INTO close_engine_context
    SELECT 2, json_object(
        'trigger', 'withdraw_approval', 'id', NEW.conversation_id,
        'at', max(coalesce(json_extract(context, '$.at'), coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))),
            (SELECT strftime('%Y-%m-%d %H:%M:%f', updated_at, '+0.001 seconds') FROM close_engine_conversations
             WHERE id = NEW.conversation_id)),
        'actor', CASE WHEN context IS NULL THEN 'database' ELSE json_extract(context, '$.actor') END,
        'reason', json_extract(context, '$.reason'),
        'metadata', json_object('action_id', NEW.id, 'status', NEW.status))
    FROM (SELECT (SELECT context FROM close_engine_context
                  WHERE id = 1 AND coalesce(json_extract(context, '$.id'), NEW.id) = NEW.id
                      AND json_extract(context, '$.trigger')
                          = CASE NEW.status WHEN 'REJECTED' THEN 'reject' ELSE 'expire' END) AS context);
    -- As on PostgreSQL, the decision writes the conversation even if another link still waits.
    UPDATE close_engine_conversations SET
        stage = CASE WHEN EXISTS (SELECT 1 FROM pending_actions WHERE conversation_id = NEW.conversation_id
                                  AND status = 'PENDING' AND type = 'SEND_PAYMENT_LINK') THEN stage ELSE 'PREVIEW_SENT' END,
        updated_at = (SELECT json_extract(context, '$.at') FROM close_engine_context WHERE id = 2)
    WHERE id = NEW.conversation_id;
    DELETE FROM close_engine_context WHERE id = 2;
END;

-- What waited and is deleted ends as if it were rejected. A decision that is deleted stands.
DROP TRIGGER IF EXISTS close_engine_action_deleted;
CREATE TRIGGER close_engine_action_deleted
AFTER DELETE ON pending_actions
WHEN OLD.status = 'PENDING' AND OLD.type = 'SEND_PAYMENT_LINK'
    AND EXISTS (SELECT 1 FROM close_engine_conversations
                WHERE id = OLD.conversation_id AND stage = 'PENDING_APPROVAL')
BEGIN
    INSERT OR REPLACE INTO close_engine_context
    SELECT 2, json_object(
        'trigger', 'withdraw_approval', 'id', id,
        'at', max(coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
            strftime('%Y-%m-%d %H:%M:%f', updated_at, '+0.001 seconds')),
        'actor', 'database', 'metadata', json_object('action_id', OLD.id, 'status', 'DELETED'))
    FROM close_engine_conversations WHERE id = OLD.conversation_id;
    UPDATE close_engine_conversations SET
        stage = CASE WHEN EXISTS (SELECT 1 FROM pending_actions WHERE conversation_id = OLD.conversation_id
                                  AND status = 'PENDING' AND type = 'SEND_PAYMENT_LINK') THEN stage ELSE 'PREVIEW_SENT' END,
        updated_at = (SELECT json_extract(context, '$.at') FROM close_engine_context WHERE id = 2)
    WHERE id = OLD.conversation_id;
    DELETE FROM close_engine_context WHERE id = 2;
END;

DROP TRIGGER IF EXISTS close_engine_closing;
CREATE TRIGGER close_engine_closing
AFTER UPDATE ON close_engine_conversations
WHEN NEW.stage IN ('COMPLETED', 'CLOSED_LOST') AND NEW.stage <> OLD.stage
BEGIN
    UPDATE close_engine_outbox SET status = 'WITHDRAWN', last_error = 'the conversation is ' || NEW.stage
    WHERE conversation_id = OLD.id AND status = 'PENDING' AND leased_by IS NULL
        AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK');
    UPDATE pending_actions SET status = 'EXPIRED' WHERE conversation_id = OLD.id AND status = 'PENDING';
END;

DROP TRIGGER IF EXISTS close_engine_gone;
CREATE TRIGGER close_engine_gone
AFTER DELETE ON close_engine_conversations
BEGIN
    UPDATE close_engine_outbox SET status = 'WITHDRAWN', last_error = 'the conversation is deleted'
    WHERE conversation_id = OLD.id AND status = 'PENDING' AND leased_by IS NULL
        AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK');
    UPDATE pending_actions SET status = 'EXPIRED' WHERE conversation_id = OLD.id AND status = 'PENDING';
END;

DROP TRIGGER IF EXISTS close_engine_unasked;
CREATE TRIGGER close_engine_unasked
AFTER UPDATE ON close_engine_conversations
WHEN OLD.stage = 'PENDING_APPROVAL' AND NEW.stage = 'PREVIEW_SENT'
BEGIN
    UPDATE pending_actions SET status = 'EXPIRED'
    WHERE conversation_id = OLD.id AND status = 'PENDING' AND type = 'SEND_PAYMENT_LINK';
END;

-- Keep, for each pending action, what it knew, and a deadline if it expires. Other triggers may have changed the action
-- again, so read it.
DROP TRIGGER IF EXISTS close_engine_action_opened;
CREATE TRIGGER close_engine_action_opened
AFTER INSERT ON pending_actions
BEGIN
    INSERT OR REPLACE INTO close_engine_drafts (action_id, after_text)
    SELECT id, coalesce((SELECT max(i.id) FROM close_engine_inbox i
        WHERE i.kind = 'text' AND i.conversation_id = NEW.conversation_id), 0)
    FROM pending_actions WHERE id = NEW.id AND status = 'PENDING';
    DELETE FROM close_engine_deadlines WHERE "trigger" = 'expire' AND subject_id = NEW.id;
    INSERT INTO close_engine_deadlines ("trigger", subject_id, at)
    SELECT 'expire', id, expires_at FROM pending_actions
    WHERE id = NEW.id AND status = 'PENDING' AND expires_at IS NOT NULL;
END;

DROP TRIGGER IF EXISTS close_engine_action_changed;
CREATE TRIGGER close_engine_action_changed
AFTER UPDATE ON pending_actions
WHEN (NEW.id, NEW.status, NEW.expires_at) IS NOT (OLD.id, OLD.status, OLD.expires_at)
BEGIN
    UPDATE close_engine_drafts SET action_id = NEW.id WHERE action_id = OLD.id AND NEW.id <> OLD.id;
    INSERT OR IGNORE INTO close_engine_drafts (action_id, after_text)
    SELECT id, coalesce((SELECT max(i.id) FROM close_engine_inbox i
        WHERE i.kind = 'text' AND i.conversation_id = NEW.conversation_id), 0)
    FROM pending_actions WHERE id = NEW.id AND status = 'PENDING' AND OLD.status <> 'PENDING';
    DELETE FROM close_engine_drafts
    WHERE action_id = NEW.id AND NOT EXISTS (SELECT 1 FROM pending_actions WHERE id = NEW.id AND status = 'PENDING');
    DELETE FROM close_engine_deadlines WHERE "trigger" = 'expire' AND subject_id IN (OLD.id, NEW.id);
    INSERT INTO close_engine_deadlines ("trigger", subject_id, at)
    SELECT 'expire', id, expires_at FROM pending_actions
    WHERE id = NEW.id AND status = 'PENDING' AND expires_at IS NOT NULL;
END;

DROP TRIGGER IF EXISTS close_engine_action_gone;
CREATE TRIGGER close_engine_action_gone
AFTER DELETE ON pending_actions
BEGIN
    DELETE FROM close_engine_drafts WHERE action_id = OLD.id;
    DELETE FROM close_engine_deadlines WHERE "trigger" = 'expire' AND subject_id = OLD.id;
END;

-- A text that a human must see first, since its level has become stricter, does not leave: it becomes an action.
DROP TRIGGER IF EXISTS close_engine_ask_human;
CREATE TRIGGER close_engine_ask_human
AFTER UPDATE ON close_engine_outbox
WHEN NEW.action_id IS NOT NULL AND OLD.action_id IS NULL
BEGIN
    INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata, created_at, expires_at)
    SELECT NEW.action_id, c.id, c.lead_id, NEW.topic, coalesce(NEW.body, ''),
        json_patch(json_patch(json_patch(json_patch(
                CASE json_type(NEW.payload) WHEN 'object' THEN NEW.payload ELSE '{}' END,
                json_object('submittedBy', NEW.submitted_by)),
            json_object('ifLeadWrites', NEW.if_lead_writes)),
            json_object('notAfter', NEW.not_after)),
            json_object('sendPriority', nullif(NEW.priority, CASE NEW.topic WHEN 'SEND_PAYMENT_LINK' THEN 5 ELSE 0 END))),
        NEW.available_at, min(strftime('%Y-%m-%d %H:%M:%f', NEW.available_at, '+1 day'),
            coalesce(NEW.not_after, '9999'))
    FROM close_engine_conversations c WHERE c.id = NEW.conversation_id;
END;

-- A human takes over: what others have drafted and waits is withdrawn.
DROP TRIGGER IF EXISTS close_engine_takeover;
CREATE TRIGGER close_engine_takeover
AFTER INSERT ON close_engine_takeovers
BEGIN
    UPDATE close_engine_outbox SET status = 'WITHDRAWN', last_error = 'a human has taken over'
    WHERE conversation_id = NEW.conversation_id AND status = 'PENDING' AND leased_by IS NULL
        AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
        AND NEW.taken_by NOT IN (coalesce(submitted_by, ''), coalesce(approved_by, ''));
    UPDATE pending_actions SET status = 'EXPIRED'
    WHERE conversation_id = NEW.conversation_id AND status = 'PENDING'
        AND coalesce(CASE WHEN json_valid(metadata) THEN json_extract(metadata, '$.submittedBy') END, '') <> NEW.taken_by;
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    VALUES ('conversation:taken_over', '', NEW.conversation_id, NEW.id,
        json_object('by', NEW.taken_by, 'reason', NEW.reason, 'until', NEW.until));
END;

DROP TRIGGER IF EXISTS close_engine_handed_back;
CREATE TRIGGER close_engine_handed_back
AFTER UPDATE ON close_engine_takeovers
WHEN NEW.handed_back_by IS NOT NULL AND OLD.handed_back_at IS NULL
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    VALUES ('conversation:handed_back', '', NEW.conversation_id, NEW.id, json_object('by', NEW.handed_back_by));
END;

-- Whatever happened while there were no triggers, bring the drafts, the deadlines and the outbox up to the rows.
DELETE FROM close_engine_drafts WHERE NOT EXISTS (
    SELECT 1 FROM pending_actions a WHERE a.id = action_id AND a.status = 'PENDING');
INSERT OR IGNORE INTO close_engine_drafts (action_id, after_text)
SELECT a.id, coalesce((SELECT max(i.id) FROM close_engine_inbox i
    WHERE i.kind = 'text' AND i.conversation_id = a.conversation_id), 0)
FROM pending_actions a WHERE a.status = 'PENDING';
DELETE FROM close_engine_deadlines WHERE "trigger" = 'expire' AND NOT EXISTS (
    SELECT 1 FROM pending_actions a WHERE a.id = subject_id AND a.status = 'PENDING' AND a.expires_at = at);
INSERT OR IGNORE INTO close_engine_deadlines ("trigger", subject_id, at)
SELECT 'expire', id, expires_at FROM pending_actions WHERE status = 'PENDING' AND expires_at IS NOT NULL;
UPDATE close_engine_outbox SET status = 'WITHDRAWN', last_error = 'the conversation is deleted'
WHERE status = 'PENDING' AND leased_by IS NULL
    AND NOT EXISTS (SELECT 1 FROM close_engine_conversations c WHERE c.id = conversation_id);
