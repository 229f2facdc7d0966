-- The guard: triggers that refuse every stage change that is not in close_engine.transitions, fill in the stamps that a
-- writer left out, and write the history. They apply to every writer.
--
-- The functions run with their owner's rights, so that the CRM's role needs no rights on the schema close_engine. Their
-- search_path is fixed and they name the schema of every function, so that no writer can redirect their calls.
--
-- The script replaces `public` with the current schema, which holds the CRM's tables. The file can safely run twice.

-- The clock for all stamps and history rows: UTC, cut to the milliseconds that the columns store. A cast to
-- timestamp(3) would round, and could return a moment in the future. PostgreSQL inlines this function.
CREATE OR REPLACE FUNCTION close_engine.moment() RETURNS timestamp without time zone
LANGUAGE sql VOLATILE PARALLEL SAFE AS $body$
SELECT pg_catalog.date_trunc('milliseconds', pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
$body$;

-- Each trigger function refuses to work for any table but its own. Otherwise, whoever may execute it could attach it to a
-- table of theirs and forge history: a dump without rights loses the REVOKE below.
CREATE OR REPLACE FUNCTION close_engine.refuse_table(attached oid, expected text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
        MESSAGE = 'close_engine: this trigger is for ' || expected || ' and not for ' || attached::regclass::text
            || ': if the schema was renamed, run close-engine migrate; if not, drop the trigger';
END
$body$;

-- What Python cannot read back is not let in: one such row would stop whoever reads a list of them. A text of 200
-- characters cannot be deeper than 100 levels, so the usual document costs a comparison of its length.
--
-- Of a longer one, remove the strings, then everything but the brackets, then the innermost pairs, level by level.
-- jsonb writes spaces, so what the library lets in is longer here: up to a million characters become up to two.
CREATE OR REPLACE FUNCTION close_engine.require_readable(subject text, document jsonb) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    outline text := document::text;
    levels integer := 0;
    why text;
BEGIN
    IF coalesce(pg_catalog.length(outline) <= 200, true) THEN
        RETURN;
    END IF;
    IF pg_catalog.length(outline) > 2000000 THEN
        why := 'longer than 2000000 characters';
    ELSE
        outline := pg_catalog.regexp_replace(outline, '"(?:[^"\\]|\\.)*"', '', 'g');
        IF pg_catalog.length(outline) > 4000 AND EXISTS (
            SELECT FROM pg_catalog.regexp_split_to_table(outline, '[^0-9]+') AS number
            WHERE pg_catalog.length(number) > 4000) THEN
            why := 'JSON with a number of more than 4000 digits';
        END IF;
        outline := pg_catalog.translate(pg_catalog.regexp_replace(outline, '[^][{}]', '', 'g'), '{}', '[]');
        WHILE outline <> '' AND why IS NULL LOOP
            outline := pg_catalog.replace(outline, '[]', '');
            levels := levels + 1;
            IF levels > 100 THEN
                why := 'JSON nested deeper than 100 levels';
            END IF;
        END LOOP;
    END IF;
    IF why IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation',
            MESSAGE = 'close_engine: ' || subject || ' cannot be ' || why || ': not every reader could read it';
    END IF;
END
$body$;

-- A time that Python cannot hold, or, for `latest`, one that no clock shows.
CREATE OR REPLACE FUNCTION close_engine.require_time(subject text, at timestamp, latest timestamp) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF at < timestamp '0001-01-01' OR at >= timestamp '9999-01-01' THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: ' || subject || ' cannot be '
            || at || ': a time must be finite and before the year 9999';
    ELSIF at > latest THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: ' || subject || ' cannot be '
            || at || ': that is more than a day after now; check the clock of the writer';
    END IF;
END
$body$;

-- A word that nobody knows would be one more value that Python cannot read. This is no CHECK: an unknown word that was
-- there before would hinder every other write of its row.
CREATE OR REPLACE FUNCTION close_engine.require_word(subject text, word text, known text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF word <> ALL (known) THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'close_engine: ' || subject || ' cannot be '
            || word || ': it must be one of ' || pg_catalog.array_to_string(known, ', ');
    END IF;
END
$body$;

-- The role that writes: the one that was SET, or the one that logged in. In a function with its owner's rights,
-- current_user is the owner. PostgreSQL inlines these three functions.
CREATE OR REPLACE FUNCTION close_engine.writer() RETURNS name LANGUAGE sql STABLE AS $body$
SELECT coalesce(nullif(pg_catalog.current_setting('role'::text), 'none'::text)::name, session_user)
$body$;

-- The actor of a write that bypasses the library.
CREATE OR REPLACE FUNCTION close_engine.actor() RETURNS text LANGUAGE sql STABLE AS $body$
SELECT 'database:'::text || close_engine.writer()::text || CASE WHEN close_engine.writer() = session_user THEN ''::text
    ELSE ' (login '::text || session_user::text || ')'::text END
$body$;

-- What the library says of its write (trigger, actor, reason, metadata, key). Anybody can set the setting that it is in,
-- so only a role that may use this schema is believed. Others are not even looked at: what they wrote may be no JSON.
CREATE OR REPLACE FUNCTION close_engine.context() RETURNS jsonb LANGUAGE sql STABLE AS $body$
SELECT CASE WHEN pg_catalog.current_setting('close_engine.context'::text, true) <> ''::text
        AND pg_catalog.has_schema_privilege(close_engine.writer(), 'close_engine'::text, 'USAGE'::text)
    THEN pg_catalog.current_setting('close_engine.context'::text, true)::jsonb END
$body$;

-- The stage changes that a sweep makes in a transaction, and when. Only the owner of this schema can write that, so nobody else can say that what
-- they write is recorded by a sweep. Each transaction deletes its rows again.
CREATE TABLE IF NOT EXISTS close_engine.sweeping (
    transaction xid8 NOT NULL,
    source text NOT NULL,
    dest text NOT NULL,
    at timestamp(3) without time zone NOT NULL,
    PRIMARY KEY (transaction, source)
);

-- The context is still there when the caller's next plain UPDATE runs in the same transaction, which must not be recorded
-- under the same actor and key. So the guard takes it up only if the row's id, the trigger and a later `updated_at` match.
-- A sweep writes many rows: its context names no row, but its transaction, so that none can be left behind in a session.
-- If the context is of this row, the history row's id and moment take its place, so that the library knows that its write
-- was recorded.
CREATE OR REPLACE FUNCTION close_engine.guard_conversation() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    moment timestamp := close_engine.moment();
    later boolean;
    context jsonb;
    fired text;
    followed boolean;
    ours boolean;
    recorded text;
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass($table$public.close_engine_conversations$table$::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, $table$public.close_engine_conversations$table$::text);
    END IF;
    -- What close_engine.sweep() writes, it records itself. Two IFs: only a sweep pays for the second.
    IF TG_OP = 'UPDATE' AND pg_catalog.current_setting('close_engine.sweeping'::text, true) = 'on' THEN
        IF NEW.id = OLD.id AND NEW.updated_at > OLD.updated_at AND EXISTS (
                SELECT FROM close_engine.sweeping s
                WHERE s.transaction = pg_catalog.pg_current_xact_id() AND s.source = OLD.stage
                    AND s.dest = NEW.stage AND s.at = NEW.updated_at) THEN
            RETURN NEW;
        END IF;
    END IF;
    -- A session in another time zone wrote its local now(): convert it. Leave a session in UTC alone: the library's own
    -- updated_at may be the same millisecond as now(), and the library finds its row by that value.
    IF NEW.updated_at = localtimestamp(3) AND localtimestamp <> current_timestamp AT TIME ZONE 'UTC' THEN
        NEW.updated_at := pg_catalog.date_trunc('milliseconds', current_timestamp AT TIME ZONE 'UTC');
    END IF;
    -- In an INSERT, OLD is NULL. Two comparisons clear all times of nearly every write.
    IF greatest(NEW.updated_at, NEW.created_at, NEW.payment_link_sent_at, NEW.stalled_at, NEW.completed_at,
            NEW.closed_lost_at) > moment + interval '1 day'
        OR least(NEW.updated_at, NEW.created_at, NEW.payment_link_sent_at, NEW.stalled_at, NEW.completed_at,
            NEW.closed_lost_at) < timestamp '0001-01-01' THEN
        PERFORM close_engine.require_time(changed.name || ' of conversation ' || NEW.id, changed.at, changed.latest)
        FROM (VALUES
            ('updated_at', NEW.updated_at, OLD.updated_at, moment + interval '1 day'),
            ('created_at', NEW.created_at, OLD.created_at, NULL),
            ('payment_link_sent_at', NEW.payment_link_sent_at, OLD.payment_link_sent_at, moment + interval '1 day'),
            ('stalled_at', NEW.stalled_at, OLD.stalled_at, moment + interval '1 day'),
            ('completed_at', NEW.completed_at, OLD.completed_at, moment + interval '1 day'),
            ('closed_lost_at', NEW.closed_lost_at, OLD.closed_lost_at, moment + interval '1 day')
        ) AS changed (name, at, was, latest) WHERE changed.at IS DISTINCT FROM changed.was;
    END IF;
    -- One comparison for nearly every write. In an INSERT, all of them are new.
    IF (NEW.questions_asked, NEW.collected_data, NEW.entry_point, NEW.autonomy_level)
        IS DISTINCT FROM (OLD.questions_asked, OLD.collected_data, OLD.entry_point, OLD.autonomy_level) THEN
        IF NEW.questions_asked IS DISTINCT FROM OLD.questions_asked THEN
            PERFORM close_engine.require_readable('questions_asked of conversation ' || NEW.id, NEW.questions_asked);
        END IF;
        IF NEW.collected_data IS DISTINCT FROM OLD.collected_data THEN
            PERFORM close_engine.require_readable('collected_data of conversation ' || NEW.id, NEW.collected_data);
        END IF;
        IF NEW.entry_point IS DISTINCT FROM OLD.entry_point THEN
            PERFORM close_engine.require_word('entry_point of conversation ' || NEW.id, NEW.entry_point,
                ARRAY['INSTANTLY_REPLY', 'SMS_REPLY', 'REP_CLOSE', 'PREVIEW_CTA']);
        END IF;
        IF NEW.autonomy_level IS DISTINCT FROM OLD.autonomy_level THEN
            PERFORM close_engine.require_word('autonomy_level of conversation ' || NEW.id, NEW.autonomy_level,
                ARRAY['FULL_AUTO', 'SEMI_AUTO', 'MANUAL']);
        END IF;
    END IF;
    IF TG_OP = 'INSERT' THEN
        -- The default or now(): rounded by the column, and local time if the session is not in UTC. Replace it.
        IF NEW.created_at = localtimestamp(3) THEN
            NEW.created_at := least(moment, current_timestamp(3) AT TIME ZONE 'UTC');
        END IF;
        IF NOT EXISTS (SELECT FROM close_engine.transitions
                       WHERE machine = 'conversation' AND NEW.stage IN (source, dest)) THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation',
                MESSAGE = 'close_engine: ' || coalesce(NEW.stage, 'NULL') || ' is not a stage';
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
            MESSAGE = 'close_engine: conversation ' || OLD.id
                || ' cannot change its id: its history is stored under it';
    END IF;
    later := NEW.updated_at > OLD.updated_at;
    -- An updated_at that was there before the guard may be in no reader's reach: it may be set back.
    IF NOT later AND (OLD.updated_at <= moment + interval '1 day' OR NEW.updated_at = OLD.updated_at) THEN
        NEW.updated_at := greatest(moment, OLD.updated_at + interval '1 millisecond');
    END IF;
    IF NEW.stage IS NOT DISTINCT FROM OLD.stage THEN
        IF NEW.stage = 'STALLED' AND NEW.stalled_at IS DISTINCT FROM OLD.stalled_at THEN
            DELETE FROM close_engine.deadlines WHERE trigger = 'close_lost' AND subject_id = NEW.id;
            IF NEW.stalled_at IS NOT NULL THEN
                INSERT INTO close_engine.deadlines (trigger, subject_id, at)
                VALUES ('close_lost', NEW.id, NEW.stalled_at);
            END IF;
        END IF;
        RETURN NEW;
    END IF;

    SELECT t.trigger, t.subscribed INTO fired, followed FROM close_engine.transitions t
    WHERE t.machine = 'conversation' AND t.source = OLD.stage AND t.dest = NEW.stage;
    IF NOT FOUND THEN
        -- What was there before the guard may be no stage. Any stage may take its place, and the history begins anew.
        IF EXISTS (SELECT FROM close_engine.transitions WHERE machine = 'conversation' AND OLD.stage IN (source, dest))
            OR NOT EXISTS (SELECT FROM close_engine.transitions
                           WHERE machine = 'conversation' AND NEW.stage IN (source, dest)) THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation',
                MESSAGE = 'close_engine: conversation ' || OLD.id || ' cannot go from ' || OLD.stage || ' to '
                    || coalesce(NEW.stage, 'NULL'),
                HINT = 'The allowed stage changes are in close_engine.transitions.';
        END IF;
        fired := 'adopted';
    END IF;
    context := close_engine.context();
    IF context IS NOT NULL THEN
        ours := context ->> 'id' = NEW.id;
        IF NOT coalesce(later AND context ->> 'trigger' = fired AND (context ->> 'at')::timestamp = NEW.updated_at
                AND coalesce(ours, context ->> 'transaction' = pg_catalog.pg_current_xact_id()::text), false) THEN
            context := NULL;
        END IF;
    END IF;

    -- Where things stand may just have changed, so the library's own write is corrected, and any other is refused.
    -- Two IFs: the function is made by a later migration, and is looked for when the condition is prepared.
    IF fired = 'resume' THEN
        IF NEW.stage <> close_engine.resumes_to(NEW.id, NEW.payment_link_sent_at) THEN
            IF context IS NULL OR ours IS NOT TRUE THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation',
                    MESSAGE = 'close_engine: conversation ' || NEW.id || ' can resume only to '
                        || close_engine.resumes_to(NEW.id, NEW.payment_link_sent_at) || ', where things stand, and not to '
                        || NEW.stage;
            END IF;
            NEW.stage := close_engine.resumes_to(NEW.id, NEW.payment_link_sent_at);
            SELECT t.subscribed INTO followed FROM close_engine.transitions t
            WHERE t.machine = 'conversation' AND t.source = OLD.stage AND t.dest = NEW.stage;
        END IF;
    END IF;

    -- Fill only columns that the writer did not change.
    CASE fired
    WHEN 'request_edits' THEN
        IF NEW.edit_rounds IS NOT DISTINCT FROM OLD.edit_rounds THEN
            NEW.edit_rounds := OLD.edit_rounds + 1;
        END IF;
    WHEN 'send_payment_link' THEN
        IF NEW.payment_link_sent_at IS NOT DISTINCT FROM OLD.payment_link_sent_at THEN
            NEW.payment_link_sent_at := moment;
        END IF;
    WHEN 'complete' THEN
        IF NEW.completed_at IS NOT DISTINCT FROM OLD.completed_at THEN
            NEW.completed_at := moment;
        END IF;
    WHEN 'stall' THEN
        IF NEW.stalled_at IS NOT DISTINCT FROM OLD.stalled_at THEN
            NEW.stalled_at := moment;
        END IF;
    WHEN 'resume' THEN
        IF NEW.stalled_at IS NOT DISTINCT FROM OLD.stalled_at THEN
            NEW.stalled_at := NULL;
        END IF;
        IF NEW.stage = 'PAYMENT_SENT' THEN
            NEW.payment_link_sent_at := coalesce(NEW.payment_link_sent_at, moment);
        END IF;
    WHEN 'close_lost' THEN
        IF NEW.closed_lost_at IS NOT DISTINCT FROM OLD.closed_lost_at THEN
            NEW.closed_lost_at := moment;
        END IF;
    WHEN 'reopen' THEN
        IF NEW.closed_lost_at IS NOT DISTINCT FROM OLD.closed_lost_at THEN
            NEW.closed_lost_at := NULL;
        END IF;
        IF NEW.closed_lost_reason IS NOT DISTINCT FROM OLD.closed_lost_reason THEN
            NEW.closed_lost_reason := NULL;
        END IF;
    WHEN 'adopted' THEN
        IF NEW.stage = 'PAYMENT_SENT' THEN
            NEW.payment_link_sent_at := coalesce(NEW.payment_link_sent_at, moment);
        ELSIF NEW.stage = 'COMPLETED' THEN
            NEW.completed_at := coalesce(NEW.completed_at, moment);
        ELSIF NEW.stage = 'STALLED' THEN
            NEW.stalled_at := coalesce(NEW.stalled_at, moment);
        ELSIF NEW.stage = 'CLOSED_LOST' THEN
            NEW.closed_lost_at := coalesce(NEW.closed_lost_at, moment);
        END IF;
    ELSE
        NULL; -- the other triggers have no stamps
    END CASE;

    INSERT INTO close_engine.history
        (conversation_id, lead_id, trigger, source, dest, actor, reason, metadata, key, created_at)
    VALUES (NEW.id, NEW.lead_id, fired, CASE WHEN fired <> 'adopted' THEN OLD.stage END, NEW.stage,
        CASE WHEN context IS NULL THEN close_engine.actor() ELSE context ->> 'actor' END,
        context ->> 'reason', nullif(context -> 'metadata', 'null'), context ->> 'key', moment)
    RETURNING id INTO recorded;
    IF followed THEN
        PERFORM close_engine.publish('stage:entered', NEW.stage, NEW.id, recorded, pg_catalog.jsonb_build_object(
            'change_id', recorded::bigint, 'from', OLD.stage, 'to', NEW.stage, 'trigger', fired));
    END IF;
    IF ours THEN
        recorded := pg_catalog.set_config('close_engine.context', '[' || recorded || ', "'
            || pg_catalog.to_char(moment, 'YYYY-MM-DD HH24:MI:SS.MS') || '"]', true);
    END IF;
    -- Whose turn it is stays as it is from one active stage to another: a stage change is no text. If it is ours, that
    -- outlives stalling. If not, the lead's silence counts from now.
    IF NEW.stage IN ('COMPLETED', 'CLOSED_LOST') THEN
        DELETE FROM close_engine.deadlines
        WHERE trigger IN ('stall', 'answer', 'close_lost') AND subject_id = NEW.id;
    ELSIF NEW.stage = 'STALLED' OR OLD.stage IN ('COMPLETED', 'STALLED', 'CLOSED_LOST') OR fired = 'adopted' THEN
        -- In place, which is cheaper, unless it was our turn or a row was left behind.
        UPDATE close_engine.deadlines SET trigger = 'close_lost', at = NEW.stalled_at
        WHERE NEW.stage = 'STALLED' AND NEW.stalled_at IS NOT NULL AND trigger = 'stall' AND subject_id = NEW.id
            AND NOT EXISTS (SELECT FROM close_engine.deadlines WHERE trigger = 'close_lost' AND subject_id = NEW.id);
        IF FOUND THEN
            RETURN NEW;
        END IF;
        DELETE FROM close_engine.deadlines WHERE trigger IN ('stall', 'close_lost') AND subject_id = NEW.id;
        IF NEW.stage <> 'STALLED' THEN
            INSERT INTO close_engine.deadlines (trigger, subject_id, at) SELECT 'stall', NEW.id, moment
            WHERE NOT EXISTS (SELECT FROM close_engine.deadlines WHERE trigger = 'answer' AND subject_id = NEW.id);
        ELSIF NEW.stalled_at IS NOT NULL THEN
            INSERT INTO close_engine.deadlines (trigger, subject_id, at) VALUES ('close_lost', NEW.id, NEW.stalled_at);
        END IF;
    END IF;

    RETURN NEW;
END
$body$;

-- The id and the moment of the history row of the library's write, as JSON, for the RETURNING of its statement. If the
-- guard did not see the write, the setting still is the context: an error, so that nothing is written.
CREATE OR REPLACE FUNCTION close_engine.recorded() RETURNS text LANGUAGE plpgsql AS $body$
DECLARE
    setting text := pg_catalog.current_setting('close_engine.context'::text);
BEGIN
    IF pg_catalog.starts_with(setting, '{'::text) THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = 'close_engine: the guard on '
            'close_engine_conversations is missing or disabled: run close-engine migrate';
    END IF;
    RETURN setting;
END
$body$;

-- Whether a sweep may write with the rights of this schema's owner. Policies of row-level security would not hold for it,
-- and triggers and rules of others would run with those rights, too, and with another search_path.
CREATE OR REPLACE FUNCTION close_engine.sweeps_at_once() RETURNS boolean LANGUAGE sql STABLE AS $body$
SELECT NOT c.relrowsecurity AND NOT c.relhasrules AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgrelid = c.oid AND NOT t.tgisinternal
        AND p.pronamespace <> pg_catalog.to_regnamespace('close_engine'::text))
FROM pg_catalog.pg_class c
WHERE c.oid = pg_catalog.to_regclass($table$public.close_engine_conversations$table$::text)
$body$;

-- Stall or close conversations that a sweep has locked, many at once. The guard checks each row as ever. The history, the
-- deadlines and what is subscribed are written here, for all of them together, which takes half the time.
--
-- It runs with its owner's rights, because nobody else may write the history. So it asks for the writer's.
CREATE OR REPLACE FUNCTION close_engine.sweep(ids text[], fired text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
#variable_conflict use_column
DECLARE
    context jsonb := close_engine.context();
    swept timestamp := (context ->> 'at')::timestamp;
    moment timestamp := close_engine.moment();
    entered text := CASE fired WHEN 'stall' THEN 'STALLED' WHEN 'close_lost' THEN 'CLOSED_LOST' END;
    subjects text[];
    changes bigint[];
BEGIN
    IF NOT coalesce(context ->> 'trigger' = fired AND entered IS NOT NULL
            AND context ->> 'transaction' = pg_catalog.pg_current_xact_id()::text
            AND swept <= moment + interval '1 day'  -- the guard lets such a row pass as it is
            AND pg_catalog.has_column_privilege(close_engine.writer(),
                $table$public.close_engine_conversations$table$::text, 'stage'::text, 'UPDATE'::text), false)
        OR NOT close_engine.sweeps_at_once() THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = 'close_engine: ' || close_engine.writer()::text || ' cannot sweep';
    END IF;
    INSERT INTO close_engine.sweeping (transaction, source, dest, at)
    SELECT pg_catalog.pg_current_xact_id(), t.source, t.dest, swept FROM close_engine.transitions t
    WHERE t.machine = 'conversation' AND t.trigger = fired;
    PERFORM pg_catalog.set_config('close_engine.sweeping'::text, 'on'::text, true);
    WITH was AS MATERIALIZED (
        SELECT c.id, c.stage FROM public.close_engine_conversations c WHERE c.id = ANY (ids)
    ), moved AS (
        UPDATE public.close_engine_conversations c SET stage = entered, updated_at = swept,
            stalled_at = CASE fired WHEN 'stall' THEN swept ELSE c.stalled_at END,
            closed_lost_at = CASE fired WHEN 'close_lost' THEN swept ELSE c.closed_lost_at END,
            closed_lost_reason = CASE fired WHEN 'close_lost' THEN context ->> 'reason' ELSE c.closed_lost_reason END
        WHERE c.id = ANY (ids) RETURNING c.id, c.lead_id, c.stage, c.updated_at
    ), recorded AS (
        INSERT INTO close_engine.history
            (conversation_id, lead_id, trigger, source, dest, actor, reason, metadata, created_at)
        SELECT m.id, m.lead_id, fired, was.stage, m.stage, context ->> 'actor', context ->> 'reason',
            nullif(context -> 'metadata', 'null'), moment
        FROM moved m JOIN was ON was.id = m.id WHERE m.stage = entered AND m.updated_at = swept
        RETURNING id, conversation_id
    )
    SELECT pg_catalog.array_agg(r.conversation_id), pg_catalog.array_agg(r.id) INTO subjects, changes FROM recorded r;
    PERFORM pg_catalog.set_config('close_engine.sweeping'::text, ''::text, true);
    DELETE FROM close_engine.sweeping WHERE transaction = pg_catalog.pg_current_xact_id();

    IF fired = 'stall' THEN
        -- Subqueries, so that the planner does not believe that there are few rows of a kind, and reads them all.
        BEGIN
            UPDATE close_engine.deadlines SET trigger = 'close_lost', at = swept
            WHERE trigger = (SELECT 'stall'::text) AND subject_id = ANY (subjects);
        EXCEPTION WHEN unique_violation THEN  -- rows were left behind
            WITH gone AS (
                DELETE FROM close_engine.deadlines
                WHERE trigger = ANY (ARRAY(VALUES ('stall'::text), ('close_lost'))) AND subject_id = ANY (subjects)
                RETURNING subject_id
            )
            INSERT INTO close_engine.deadlines (trigger, subject_id, at)
            SELECT DISTINCT 'close_lost', subject_id, swept FROM gone;
        END;
    ELSE
        DELETE FROM close_engine.deadlines
        WHERE trigger = ANY (ARRAY(VALUES ('stall'::text), ('answer'), ('close_lost'))) AND subject_id = ANY (subjects);
    END IF;
    IF EXISTS (SELECT FROM close_engine.transitions t
               WHERE t.machine = 'conversation' AND t.dest = entered AND t.subscribed) THEN
        PERFORM close_engine.publish('stage:entered', h.dest, h.conversation_id, h.id::text,
            pg_catalog.jsonb_build_object('change_id', h.id, 'from', h.source, 'to', h.dest, 'trigger', h.trigger))
        FROM close_engine.history h WHERE h.id = ANY (changes) ORDER BY h.id;
    END IF;
END
$body$;

-- Record the opening AFTER the INSERT. A BEFORE trigger also fires for an INSERT ... ON CONFLICT DO NOTHING that then
-- inserts no row.
CREATE OR REPLACE FUNCTION close_engine.record_opening() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    moment timestamp := close_engine.moment();
    context jsonb;
    recorded bigint;
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass($table$public.close_engine_conversations$table$::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, $table$public.close_engine_conversations$table$::text);
    END IF;
    context := close_engine.context();
    IF NOT coalesce(context ->> 'trigger' = 'open' AND context ->> 'id' = NEW.id
            AND (context ->> 'at')::timestamp = NEW.updated_at, false) THEN
        context := NULL;
    END IF;

    INSERT INTO close_engine.history
        (conversation_id, lead_id, trigger, source, dest, actor, reason, metadata, key, created_at)
    VALUES (NEW.id, NEW.lead_id, 'open', NULL, NEW.stage,
        CASE WHEN context IS NULL THEN close_engine.actor() ELSE context ->> 'actor' END,
        context ->> 'reason', nullif(context -> 'metadata', 'null'), context ->> 'key', moment)
    RETURNING id INTO recorded;
    IF EXISTS (SELECT FROM close_engine.transitions t
               WHERE t.machine = 'conversation' AND t.dest = NEW.stage AND t.subscribed) THEN
        PERFORM close_engine.publish('stage:entered', NEW.stage, NEW.id, recorded::text,
            pg_catalog.jsonb_build_object('change_id', recorded, 'to', NEW.stage, 'trigger', 'open'));
    END IF;
    DELETE FROM close_engine.deadlines WHERE trigger IN ('stall', 'answer', 'close_lost') AND subject_id = NEW.id;
    IF NEW.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST') THEN
        INSERT INTO close_engine.deadlines (trigger, subject_id, at) VALUES ('stall', NEW.id, moment);
    ELSIF NEW.stage = 'STALLED' AND NEW.stalled_at IS NOT NULL THEN
        INSERT INTO close_engine.deadlines (trigger, subject_id, at) VALUES ('close_lost', NEW.id, NEW.stalled_at);
    END IF;

    RETURN NULL;
END
$body$;

CREATE OR REPLACE FUNCTION close_engine.forget_deadlines() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF TG_RELID IS DISTINCT FROM pg_catalog.to_regclass($table$public.close_engine_conversations$table$::text) THEN
        PERFORM close_engine.refuse_table(TG_RELID, $table$public.close_engine_conversations$table$::text);
    END IF;
    IF TG_OP = 'TRUNCATE' THEN
        DELETE FROM close_engine.deadlines WHERE trigger IN ('stall', 'answer', 'close_lost');
    ELSE
        DELETE FROM close_engine.deadlines
        WHERE trigger IN ('stall', 'answer', 'close_lost') AND subject_id = OLD.id;
    END IF;
    RETURN NULL;
END
$body$;

-- Nor may anybody attach them in the first place.
REVOKE EXECUTE ON FUNCTION
    close_engine.guard_conversation(), close_engine.record_opening(), close_engine.forget_deadlines() FROM PUBLIC;

-- PostgreSQL fires a table's triggers in the order of their names. The guard comes last (zz), so that it sees the row
-- as it will be written. The opening is recorded first (aa), so that it precedes any change made by other triggers.
CREATE OR REPLACE TRIGGER aa_close_engine_opening AFTER INSERT ON public.close_engine_conversations
    FOR EACH ROW EXECUTE FUNCTION close_engine.record_opening();
CREATE OR REPLACE TRIGGER zz_close_engine_deletion AFTER DELETE ON public.close_engine_conversations
    FOR EACH ROW EXECUTE FUNCTION close_engine.forget_deadlines();
CREATE OR REPLACE TRIGGER zz_close_engine_guard BEFORE INSERT OR UPDATE ON public.close_engine_conversations
    FOR EACH ROW EXECUTE FUNCTION close_engine.guard_conversation();
CREATE OR REPLACE TRIGGER zz_close_engine_truncation AFTER TRUNCATE ON public.close_engine_conversations
    FOR EACH STATEMENT EXECUTE FUNCTION close_engine.forget_deadlines();

-- Whatever happened while there was no guard, bring the history and the deadlines up to the rows: every conversation
-- that the history does not know, or knows in another stage, gets a row. Do it after creating the triggers: that takes a
-- lock, which keeps other writers out until the commit, so no change is missed.
INSERT INTO close_engine.history (conversation_id, lead_id, trigger, source, dest, created_at)
SELECT c.id, c.lead_id, 'adopted', newest.dest, c.stage, close_engine.moment()
FROM public.close_engine_conversations c
LEFT JOIN LATERAL (SELECT h.dest FROM close_engine.history h WHERE h.conversation_id = c.id
                   ORDER BY h.id DESC LIMIT 1) newest ON true
WHERE newest.dest IS DISTINCT FROM c.stage
ORDER BY c.created_at, c.id;
-- A silence whose beginning nobody knows counts from now.
DELETE FROM close_engine.deadlines d WHERE d.trigger IN ('stall', 'answer', 'close_lost') AND NOT EXISTS (
    SELECT FROM public.close_engine_conversations c WHERE c.id = d.subject_id AND CASE d.trigger
        WHEN 'stall' THEN c.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
        WHEN 'answer' THEN c.stage NOT IN ('COMPLETED', 'CLOSED_LOST')
        ELSE c.stage = 'STALLED' AND c.stalled_at = d.at END);
INSERT INTO close_engine.deadlines (trigger, subject_id, at)
SELECT 'stall', c.id, close_engine.moment() FROM public.close_engine_conversations c
WHERE c.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
    AND NOT EXISTS (SELECT FROM close_engine.deadlines d WHERE d.trigger = 'answer' AND d.subject_id = c.id)
UNION ALL
SELECT 'close_lost', c.id, c.stalled_at FROM public.close_engine_conversations c
WHERE c.stage = 'STALLED' AND c.stalled_at IS NOT NULL
ON CONFLICT DO NOTHING;
