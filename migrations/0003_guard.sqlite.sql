-- The guard: triggers that refuse every stage change that is not in close_engine_transitions, fill in the stamps that a
-- writer left out, and write the history. They apply to every writer.
--
-- The library puts the context of its write (actor, reason, metadata, key) into close_engine_context. The triggers use
-- it only if the row's id, the trigger and a later `updated_at` match.
--
-- SQLite promises no order in which triggers fire, so each of them works in any order. The file can safely run twice.

-- It reads a view, without which no conversation could be written. Both are made again later.
DROP TRIGGER IF EXISTS close_engine_guard_resume;

-- The library finds a row by the text of its updated_at, so all rows need the same format. strftime() rounds text with
-- more than three decimals, but moments are cut, never rounded. So remove the extra digits first.
UPDATE close_engine_conversations SET updated_at = coalesce(
    strftime('%Y-%m-%d %H:%M:%f', CASE WHEN updated_at GLOB '*:[0-9][0-9].[0-9][0-9][0-9][0-9]*'
        THEN substr(updated_at, 1, instr(updated_at, '.') + 3)
            || ltrim(substr(updated_at, instr(updated_at, '.') + 4), '0123456789')
        ELSE updated_at END),
    coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')))
WHERE updated_at IS NOT strftime('%Y-%m-%d %H:%M:%f', updated_at);

DROP TRIGGER IF EXISTS close_engine_guard_insert;
CREATE TRIGGER close_engine_guard_insert
BEFORE INSERT ON close_engine_conversations
WHEN NOT EXISTS (SELECT 1 FROM close_engine_transitions
                 WHERE machine = 'conversation' AND NEW.stage IN (source, dest))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this is not a stage; the stages are in close_engine_transitions');
END;

DROP TRIGGER IF EXISTS close_engine_guard_id;
CREATE TRIGGER close_engine_guard_id
BEFORE UPDATE ON close_engine_conversations
WHEN NEW.id IS NOT OLD.id
BEGIN
    SELECT RAISE(ABORT, 'close_engine: a conversation cannot change its id: its history is stored under it');
END;

-- What was there before the guard may be no stage. Any stage may take its place.
DROP TRIGGER IF EXISTS close_engine_guard_update;
CREATE TRIGGER close_engine_guard_update
BEFORE UPDATE ON close_engine_conversations
WHEN NEW.stage IS NOT OLD.stage
    AND NOT EXISTS (SELECT 1 FROM close_engine_transitions
                    WHERE machine = 'conversation' AND source = OLD.stage AND dest = NEW.stage)
    AND (EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation' AND OLD.stage IN (source, dest))
        OR NOT EXISTS (SELECT 1 FROM close_engine_transitions
                       WHERE machine = 'conversation' AND NEW.stage IN (source, dest)))
BEGIN
    SELECT RAISE(ABORT, 'close_engine: this stage change is not in close_engine_transitions');
END;

-- What Python cannot read back is not let in: one such row would stop whoever reads a list of them. What was there
-- before and is not changed hinders nobody. Python also refuses 30 February, which SQLite takes for 2 March.
DROP TRIGGER IF EXISTS close_engine_guard_insert_readable;
CREATE TRIGGER close_engine_guard_insert_readable
BEFORE INSERT ON close_engine_conversations
BEGIN
    SELECT RAISE(ABORT, 'close_engine: entry_point must be one of INSTANTLY_REPLY, SMS_REPLY, REP_CLOSE, PREVIEW_CTA')
    WHERE NEW.entry_point NOT IN ('INSTANTLY_REPLY', 'SMS_REPLY', 'REP_CLOSE', 'PREVIEW_CTA');
    SELECT RAISE(ABORT, 'close_engine: autonomy_level must be one of FULL_AUTO, SEMI_AUTO, MANUAL')
    WHERE NEW.autonomy_level NOT IN ('FULL_AUTO', 'SEMI_AUTO', 'MANUAL');

    SELECT RAISE(ABORT, 'close_engine: a time must be a text like 2026-01-31 23:59:59.123, and before the year 9999')
    FROM (SELECT NEW.created_at AS value, NULL AS was
        UNION ALL SELECT NEW.payment_link_sent_at, NULL
        UNION ALL SELECT NEW.stalled_at, NULL
        UNION ALL SELECT NEW.completed_at, NULL
        UNION ALL SELECT NEW.closed_lost_at, NULL)
    WHERE value IS NOT was AND value IS NOT NULL AND NOT (typeof(value) = 'text'
        AND date(substr(value, 1, 10)) IS substr(value, 1, 10) AND substr(value, 1, 4) BETWEEN '0001' AND '9998'
        AND strftime('%s', value) IS NOT NULL);

    SELECT RAISE(ABORT, 'close_engine: this time is more than a day after now; check the clock of the writer')
    FROM (SELECT NEW.updated_at AS value, NULL AS was
        UNION ALL SELECT NEW.payment_link_sent_at, NULL
        UNION ALL SELECT NEW.stalled_at, NULL
        UNION ALL SELECT NEW.completed_at, NULL
        UNION ALL SELECT NEW.closed_lost_at, NULL)
    WHERE value IS NOT was AND strftime('%Y-%m-%d %H:%M:%f', value) > strftime('%Y-%m-%d %H:%M:%f',
        coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')), '+1 day');

    -- A number of more than 309 digits is infinite for SQLite. The digits of one that is too long stand in a row.
    SELECT RAISE(ABORT, 'close_engine: not every reader could read this JSON: it is not valid, nested deeper than 100 levels, longer than 2000000 characters, or has a number of more than 4000 digits')
    FROM (SELECT NEW.questions_asked AS document, NULL AS was
        UNION ALL SELECT NEW.collected_data, NULL)
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

DROP TRIGGER IF EXISTS close_engine_guard_update_readable;
CREATE TRIGGER close_engine_guard_update_readable
BEFORE UPDATE ON close_engine_conversations
BEGIN
    SELECT RAISE(ABORT, 'close_engine: entry_point must be one of INSTANTLY_REPLY, SMS_REPLY, REP_CLOSE, PREVIEW_CTA')
    WHERE NEW.entry_point IS NOT OLD.entry_point AND NEW.entry_point NOT IN ('INSTANTLY_REPLY', 'SMS_REPLY', 'REP_CLOSE', 'PREVIEW_CTA');
    SELECT RAISE(ABORT, 'close_engine: autonomy_level must be one of FULL_AUTO, SEMI_AUTO, MANUAL')
    WHERE NEW.autonomy_level IS NOT OLD.autonomy_level AND NEW.autonomy_level NOT IN ('FULL_AUTO', 'SEMI_AUTO', 'MANUAL');

    SELECT RAISE(ABORT, 'close_engine: a time must be a text like 2026-01-31 23:59:59.123, and before the year 9999')
    FROM (SELECT NEW.created_at AS value, OLD.created_at AS was
        UNION ALL SELECT NEW.payment_link_sent_at, OLD.payment_link_sent_at
        UNION ALL SELECT NEW.stalled_at, OLD.stalled_at
        UNION ALL SELECT NEW.completed_at, OLD.completed_at
        UNION ALL SELECT NEW.closed_lost_at, OLD.closed_lost_at)
    WHERE value IS NOT was AND value IS NOT NULL AND NOT (typeof(value) = 'text'
        AND date(substr(value, 1, 10)) IS substr(value, 1, 10) AND substr(value, 1, 4) BETWEEN '0001' AND '9998'
        AND strftime('%s', value) IS NOT NULL);

    SELECT RAISE(ABORT, 'close_engine: this time is more than a day after now; check the clock of the writer')
    FROM (SELECT NEW.updated_at AS value, OLD.updated_at AS was
        UNION ALL SELECT NEW.payment_link_sent_at, OLD.payment_link_sent_at
        UNION ALL SELECT NEW.stalled_at, OLD.stalled_at
        UNION ALL SELECT NEW.completed_at, OLD.completed_at
        UNION ALL SELECT NEW.closed_lost_at, OLD.closed_lost_at)
    WHERE value IS NOT was AND strftime('%Y-%m-%d %H:%M:%f', value) > strftime('%Y-%m-%d %H:%M:%f',
        coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')), '+1 day');

    -- A number of more than 309 digits is infinite for SQLite. The digits of one that is too long stand in a row.
    SELECT RAISE(ABORT, 'close_engine: not every reader could read this JSON: it is not valid, nested deeper than 100 levels, longer than 2000000 characters, or has a number of more than 4000 digits')
    FROM (SELECT NEW.questions_asked AS document, OLD.questions_asked AS was
        UNION ALL SELECT NEW.collected_data, OLD.collected_data)
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

DROP TRIGGER IF EXISTS close_engine_opening;
CREATE TRIGGER close_engine_opening
AFTER INSERT ON close_engine_conversations
BEGIN
    INSERT INTO close_engine_history
        (conversation_id, lead_id, "trigger", source, dest, actor, reason, metadata, "key", created_at)
    SELECT NEW.id, NEW.lead_id, 'open', NULL, NEW.stage,
        CASE WHEN context IS NULL THEN 'database' ELSE json_extract(context, '$.actor') END,
        json_extract(context, '$.reason'), json_extract(context, '$.metadata'), json_extract(context, '$.key'),
        coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    FROM (SELECT (SELECT context FROM close_engine_context
                  WHERE json_extract(context, '$.trigger') = 'open' AND json_extract(context, '$.id') = NEW.id
                      AND json_extract(context, '$.at') = NEW.updated_at) AS context);

    UPDATE close_engine_conversations SET
        payment_link_sent_at = CASE WHEN stage = 'PAYMENT_SENT' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
            ELSE payment_link_sent_at END,
        completed_at = CASE WHEN stage = 'COMPLETED' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')) ELSE completed_at END,
        stalled_at = CASE WHEN stage = 'STALLED' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')) ELSE stalled_at END,
        closed_lost_at = CASE WHEN stage = 'CLOSED_LOST' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
            ELSE closed_lost_at END
    WHERE id = NEW.id AND CASE stage
        WHEN 'PAYMENT_SENT' THEN payment_link_sent_at WHEN 'COMPLETED' THEN completed_at
        WHEN 'STALLED' THEN stalled_at WHEN 'CLOSED_LOST' THEN closed_lost_at ELSE '' END IS NULL;

    DELETE FROM close_engine_deadlines WHERE "trigger" IN ('stall', 'answer', 'close_lost') AND subject_id = NEW.id;
    INSERT INTO close_engine_deadlines ("trigger", subject_id, at)
    SELECT CASE stage WHEN 'STALLED' THEN 'close_lost' ELSE 'stall' END, id,
        CASE stage WHEN 'STALLED' THEN stalled_at ELSE (
            SELECT h.created_at FROM close_engine_history h WHERE h.conversation_id = NEW.id
            ORDER BY h.id DESC LIMIT 1) END
    FROM close_engine_conversations WHERE id = NEW.id AND stage NOT IN ('COMPLETED', 'CLOSED_LOST');

    UPDATE close_engine_conversations SET updated_at = coalesce(
        strftime('%Y-%m-%d %H:%M:%f', CASE WHEN updated_at GLOB '*:[0-9][0-9].[0-9][0-9][0-9][0-9]*'
            THEN substr(updated_at, 1, instr(updated_at, '.') + 3)
                || ltrim(substr(updated_at, instr(updated_at, '.') + 4), '0123456789')
            ELSE updated_at END),
        coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')))
    WHERE id = NEW.id AND updated_at IS NOT strftime('%Y-%m-%d %H:%M:%f', updated_at);
END;

DROP TRIGGER IF EXISTS close_engine_record;
CREATE TRIGGER close_engine_record
AFTER UPDATE ON close_engine_conversations
WHEN NEW.stage IS NOT OLD.stage
BEGIN
    INSERT INTO close_engine_history
        (conversation_id, lead_id, "trigger", source, dest, actor, reason, metadata, "key", created_at)
    SELECT NEW.id, NEW.lead_id, fired, OLD.stage, NEW.stage,
        CASE WHEN context IS NULL THEN 'database' ELSE json_extract(context, '$.actor') END,
        json_extract(context, '$.reason'), json_extract(context, '$.metadata'), json_extract(context, '$.key'),
        coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    FROM (SELECT t."trigger" AS fired,
              (SELECT context FROM close_engine_context
               WHERE json_extract(context, '$.trigger') = t."trigger"
                   AND coalesce(json_extract(context, '$.id'), NEW.id) = NEW.id
                   AND json_extract(context, '$.at') = NEW.updated_at
                   AND NEW.updated_at > OLD.updated_at) AS context
          FROM close_engine_transitions t
          WHERE t.machine = 'conversation' AND t.source = OLD.stage AND t.dest = NEW.stage);

    -- If the context is of this row, the history row's id and moment take its place: the library's write was recorded.
    UPDATE close_engine_context SET context = (
        SELECT json_array(h.id, h.created_at) FROM close_engine_history h
        WHERE h.conversation_id = NEW.id ORDER BY h.id DESC LIMIT 1)
    WHERE id = 1 AND json_extract(context, '$.id') = NEW.id;

    -- What was no stage is mended: the history begins anew.
    INSERT INTO close_engine_history (conversation_id, lead_id, "trigger", dest, actor, created_at)
    SELECT NEW.id, NEW.lead_id, 'adopted', NEW.stage, 'database', coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE NOT EXISTS (SELECT 1 FROM close_engine_transitions
                      WHERE machine = 'conversation' AND OLD.stage IN (source, dest));
    UPDATE close_engine_conversations SET
        payment_link_sent_at = CASE WHEN stage = 'PAYMENT_SENT' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
            ELSE payment_link_sent_at END,
        completed_at = CASE WHEN stage = 'COMPLETED' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')) ELSE completed_at END,
        stalled_at = CASE WHEN stage = 'STALLED' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')) ELSE stalled_at END,
        closed_lost_at = CASE WHEN stage = 'CLOSED_LOST' THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
            ELSE closed_lost_at END
    WHERE id = NEW.id AND CASE stage
        WHEN 'PAYMENT_SENT' THEN payment_link_sent_at WHEN 'COMPLETED' THEN completed_at
        WHEN 'STALLED' THEN stalled_at WHEN 'CLOSED_LOST' THEN closed_lost_at ELSE '' END IS NULL
        AND NOT EXISTS (SELECT 1 FROM close_engine_transitions
                        WHERE machine = 'conversation' AND OLD.stage IN (source, dest));

    -- Whose turn it is stays as it is from one active stage to another: a stage change is no text. If it is ours, that
    -- outlives stalling. If not, the lead's silence counts from now.
    DELETE FROM close_engine_deadlines WHERE "trigger" = 'stall' AND subject_id = NEW.id
        AND NEW.stage IN ('COMPLETED', 'STALLED', 'CLOSED_LOST');
    DELETE FROM close_engine_deadlines WHERE "trigger" = 'answer' AND subject_id = NEW.id
        AND NEW.stage IN ('COMPLETED', 'CLOSED_LOST');
    INSERT OR REPLACE INTO close_engine_deadlines ("trigger", subject_id, at)
    SELECT 'stall', NEW.id, created_at FROM close_engine_history
    WHERE NEW.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
        AND (OLD.stage IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
            OR NOT EXISTS (SELECT 1 FROM close_engine_transitions
                           WHERE machine = 'conversation' AND OLD.stage IN (source, dest)))
        AND NOT EXISTS (SELECT 1 FROM close_engine_deadlines WHERE "trigger" = 'answer' AND subject_id = NEW.id)
        AND conversation_id = NEW.id
    ORDER BY id DESC LIMIT 1;

    -- Each UPDATE fills a column that the writer did not change, and only if the value differs: any write, even without
    -- a change, moves updated_at.
    UPDATE close_engine_conversations SET edit_rounds = OLD.edit_rounds + 1
    WHERE id = NEW.id AND NEW.edit_rounds IS OLD.edit_rounds AND edit_rounds IS NOT OLD.edit_rounds + 1
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'request_edits' AND source = OLD.stage AND dest = NEW.stage);
    UPDATE close_engine_conversations SET payment_link_sent_at = coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE id = NEW.id AND NEW.payment_link_sent_at IS OLD.payment_link_sent_at
        AND payment_link_sent_at IS NOT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'send_payment_link' AND source = OLD.stage AND dest = NEW.stage);
    UPDATE close_engine_conversations SET completed_at = coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE id = NEW.id AND NEW.completed_at IS OLD.completed_at
        AND completed_at IS NOT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'complete' AND source = OLD.stage AND dest = NEW.stage);
    UPDATE close_engine_conversations SET stalled_at = coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE id = NEW.id AND NEW.stalled_at IS OLD.stalled_at
        AND stalled_at IS NOT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'stall' AND source = OLD.stage AND dest = NEW.stage);
    UPDATE close_engine_conversations SET stalled_at = NULL
    WHERE id = NEW.id AND NEW.stalled_at IS OLD.stalled_at AND stalled_at IS NOT NULL
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'resume' AND source = OLD.stage AND dest = NEW.stage);
    UPDATE close_engine_conversations SET payment_link_sent_at = coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE id = NEW.id AND OLD.stage = 'STALLED' AND NEW.stage = 'PAYMENT_SENT' AND payment_link_sent_at IS NULL;
    UPDATE close_engine_conversations SET closed_lost_at = coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE id = NEW.id AND NEW.closed_lost_at IS OLD.closed_lost_at
        AND closed_lost_at IS NOT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'close_lost' AND source = OLD.stage AND dest = NEW.stage);
    UPDATE close_engine_conversations SET closed_lost_at = NULL
    WHERE id = NEW.id AND NEW.closed_lost_at IS OLD.closed_lost_at AND closed_lost_at IS NOT NULL
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'reopen' AND source = OLD.stage AND dest = NEW.stage);
    UPDATE close_engine_conversations SET closed_lost_reason = NULL
    WHERE id = NEW.id AND NEW.closed_lost_reason IS OLD.closed_lost_reason AND closed_lost_reason IS NOT NULL
        AND EXISTS (SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation'
                    AND "trigger" = 'reopen' AND source = OLD.stage AND dest = NEW.stage);
END;

-- updated_at must grow with every write and have the format by which the library finds the row. The old value lacks
-- this format only while a row is being inserted. One that was there before the guard, far ahead, may be set back.
DROP TRIGGER IF EXISTS close_engine_version;
CREATE TRIGGER close_engine_version
AFTER UPDATE ON close_engine_conversations
WHEN NEW.updated_at IS NOT strftime('%Y-%m-%d %H:%M:%f', NEW.updated_at)
    OR (NEW.updated_at <= OLD.updated_at AND OLD.updated_at IS strftime('%Y-%m-%d %H:%M:%f', OLD.updated_at)
        AND (NEW.updated_at = OLD.updated_at OR OLD.updated_at <= strftime('%Y-%m-%d %H:%M:%f',
            coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')), '+1 day')))
BEGIN
    UPDATE close_engine_conversations SET updated_at = max(
        coalesce(
            strftime('%Y-%m-%d %H:%M:%f', CASE WHEN updated_at GLOB '*:[0-9][0-9].[0-9][0-9][0-9][0-9]*'
                THEN substr(updated_at, 1, instr(updated_at, '.') + 3)
                    || ltrim(substr(updated_at, instr(updated_at, '.') + 4), '0123456789')
                ELSE updated_at END),
            coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))),
        CASE WHEN NEW.updated_at <= OLD.updated_at THEN coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')) ELSE '' END,
        strftime('%Y-%m-%d %H:%M:%f', OLD.updated_at, '+0.001 seconds'))
    WHERE id = NEW.id;
END;

-- Other triggers may have changed the row again, so read it.
DROP TRIGGER IF EXISTS close_engine_stalled;
CREATE TRIGGER close_engine_stalled
AFTER UPDATE ON close_engine_conversations
WHEN (NEW.stage, NEW.stalled_at) IS NOT (OLD.stage, OLD.stalled_at) AND 'STALLED' IN (NEW.stage, OLD.stage)
BEGIN
    DELETE FROM close_engine_deadlines WHERE "trigger" = 'close_lost' AND subject_id = NEW.id;
    INSERT INTO close_engine_deadlines ("trigger", subject_id, at)
    SELECT 'close_lost', id, stalled_at FROM close_engine_conversations
    WHERE id = NEW.id AND stage = 'STALLED' AND stalled_at IS NOT NULL;
END;

DROP TRIGGER IF EXISTS close_engine_deletion;
CREATE TRIGGER close_engine_deletion
AFTER DELETE ON close_engine_conversations
BEGIN
    DELETE FROM close_engine_deadlines WHERE "trigger" IN ('stall', 'answer', 'close_lost') AND subject_id = OLD.id;
END;

-- Whatever happened while there was no guard, bring the history and the deadlines up to the rows: every conversation
-- that the history does not know, or knows in another stage, gets a row.
INSERT INTO close_engine_history (conversation_id, lead_id, "trigger", source, dest, created_at)
SELECT id, lead_id, 'adopted', known, stage, coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
FROM (SELECT c.*, (SELECT h.dest FROM close_engine_history h WHERE h.conversation_id = c.id
                   ORDER BY h.id DESC LIMIT 1) AS known FROM close_engine_conversations c)
WHERE known IS NOT stage
ORDER BY created_at, id;
-- A silence whose beginning nobody knows counts from now.
DELETE FROM close_engine_deadlines WHERE "trigger" IN ('stall', 'answer', 'close_lost') AND NOT EXISTS (
    SELECT 1 FROM close_engine_conversations c WHERE c.id = subject_id AND CASE "trigger"
        WHEN 'stall' THEN c.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
        WHEN 'answer' THEN c.stage NOT IN ('COMPLETED', 'CLOSED_LOST')
        ELSE c.stage = 'STALLED' AND c.stalled_at = at END);
INSERT OR IGNORE INTO close_engine_deadlines ("trigger", subject_id, at)
SELECT 'stall', id, coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
FROM close_engine_conversations c
WHERE stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
    AND NOT EXISTS (SELECT 1 FROM close_engine_deadlines d WHERE d."trigger" = 'answer' AND d.subject_id = c.id)
UNION ALL
SELECT 'close_lost', id, stalled_at FROM close_engine_conversations WHERE stage = 'STALLED' AND stalled_at IS NOT NULL;
