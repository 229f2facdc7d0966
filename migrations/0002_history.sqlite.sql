-- The history of stage changes, the table of allowed changes, and when something is due because time passes.
--
-- SQLite has no schemas, so the library's tables have the prefix close_engine_.

-- The guard allows exactly these changes. The Python machine has the same table, and a test compares the two.
-- `subscribed` is whether anything is to follow when `dest` is entered: triggers on the subscriptions keep it.
CREATE TABLE IF NOT EXISTS close_engine_transitions (
    machine TEXT NOT NULL,
    "trigger" TEXT NOT NULL,
    source TEXT NOT NULL,
    dest TEXT NOT NULL,
    subscribed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (machine, source, dest)
);

-- No foreign key: the history outlives its conversation.
CREATE TABLE IF NOT EXISTS close_engine_history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id TEXT NOT NULL,
    lead_id TEXT NOT NULL,
    "trigger" TEXT NOT NULL,
    source TEXT,
    dest TEXT NOT NULL,
    actor TEXT,
    reason TEXT,
    metadata TEXT,
    "key" TEXT,
    created_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS close_engine_history_conversation_id_idx ON close_engine_history (conversation_id, id);
-- A conversation uses an idempotency key only once, even if two writers use it at the same moment.
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_history_key_key
    ON close_engine_history (conversation_id, "key") WHERE "key" IS NOT NULL;

-- The context of the library's next write, for the triggers: a table, because SQLite has no settings that end with a
-- transaction. The library writes row 1. The triggers use rows 2 and 3 for their own writes.
CREATE TABLE IF NOT EXISTS close_engine_context (id INTEGER PRIMARY KEY CHECK (id IN (1, 2, 3)), context TEXT NOT NULL);

-- The moment that all statements take for now, if there is a row. The table is empty outside tests.
CREATE TABLE IF NOT EXISTS close_engine_clock (at TEXT NOT NULL);

-- What the sweeps look for, by time. Triggers keep the rows up to date:
--   'stall', an active conversation: it has been the lead's turn since.
--   'answer', in place of 'stall': the lead wrote then, and it has been our turn since, also while it is stalled.
--   'close_lost', a stalled conversation: stalled since.
--   'expire', a pending action: when it expires.
CREATE TABLE IF NOT EXISTS close_engine_deadlines (
    "trigger" TEXT NOT NULL,
    subject_id TEXT NOT NULL,
    at TEXT NOT NULL,
    PRIMARY KEY ("trigger", subject_id)
);
CREATE INDEX IF NOT EXISTS close_engine_deadlines_at_idx ON close_engine_deadlines ("trigger", at);

-- What is to be put into the outbox when something happens. The stage is '' for events that have none. The times are in
-- milliseconds: an effect waits for send_after; or, where debounce is not 0, until nothing more has happened for so long,
-- but at_most so long since the first event (0: ten times as long). Of an action that expires, it is said so long before.
CREATE TABLE IF NOT EXISTS close_engine_subscriptions (
    topic TEXT NOT NULL,
    event TEXT NOT NULL,
    stage TEXT NOT NULL DEFAULT '',
    payload TEXT,
    send_after INTEGER NOT NULL DEFAULT 0,
    debounce INTEGER NOT NULL DEFAULT 0,
    at_most INTEGER NOT NULL DEFAULT 0,
    before INTEGER,
    PRIMARY KEY (event, stage, topic)
);

-- Effects: what is subscribed to an event is put into the outbox in the event's transaction, no matter who causes it, and
-- once: `fact` tells this event from any other of its kind. The payload is the subscription's own, with the facts. SQLite
-- has no functions of its own: what happens is inserted into a view that holds nothing. It is made this early because
-- triggers that insert into it may be there when these files run again.
CREATE VIEW IF NOT EXISTS close_engine_events AS
    SELECT '' AS event, '' AS stage, '' AS conversation_id, '' AS fact, '{}' AS facts WHERE 0;

DROP TRIGGER IF EXISTS close_engine_publish;
CREATE TRIGGER close_engine_publish
INSTEAD OF INSERT ON close_engine_events
BEGIN
    INSERT INTO close_engine_outbox (conversation_id, topic, payload, "key", created_at, available_at)
    SELECT NEW.conversation_id, s.topic,
        json_patch(coalesce(s.payload, '{}'), json_patch(json_object('event', NEW.event), NEW.facts)),
        'close_engine:effect:' || s.topic || ':' || NEW.event || ':' || NEW.fact,
        coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
        strftime('%Y-%m-%d %H:%M:%f', coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
            printf('%+.3f seconds', s.send_after / 1000.0))
    FROM close_engine_subscriptions s WHERE s.event = NEW.event AND s.stage = NEW.stage AND s.debounce = 0
        AND (s.before IS NULL OR json_extract(NEW.facts, '$.expires_at') IS NULL OR json_extract(NEW.facts, '$.expires_at')
            <= strftime('%Y-%m-%dT%H:%M:%fZ', coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
                printf('%+.3f seconds', s.before / 1000.0)))
    ON CONFLICT (conversation_id, "key") WHERE "key" IS NOT NULL DO NOTHING;
    INSERT INTO close_engine_bursts (conversation_id, topic, "key", payload, said, at, until)
    SELECT NEW.conversation_id, s.topic, 'close_engine:effect:' || s.topic || ':' || NEW.event || ':' || NEW.fact,
        coalesce(s.payload, '{}'), json_patch(json_object('event', NEW.event), NEW.facts),
        strftime('%Y-%m-%d %H:%M:%f', coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
            printf('%+.3f seconds', s.debounce / 1000.0)),
        strftime('%Y-%m-%d %H:%M:%f', coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
            printf('%+.3f seconds', coalesce(nullif(s.at_most, 0), 10 * s.debounce) / 1000.0))
    FROM close_engine_subscriptions s WHERE s.event = NEW.event AND s.stage = NEW.stage AND s.debounce > 0
        AND (s.before IS NULL OR json_extract(NEW.facts, '$.expires_at') IS NULL OR json_extract(NEW.facts, '$.expires_at')
            <= strftime('%Y-%m-%dT%H:%M:%fZ', coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
                printf('%+.3f seconds', s.before / 1000.0)));
END;

-- Of a debounced subscription, the event joins the effect of its lane that still waits and was never claimed, or else begins
-- one. The key says that it is debounced: it is none of an effect that carries one event.
CREATE VIEW IF NOT EXISTS close_engine_bursts AS
    SELECT '' AS conversation_id, '' AS topic, '' AS "key", '{}' AS payload, '{}' AS said, '' AS at, '' AS until WHERE 0;

DROP TRIGGER IF EXISTS close_engine_gather;
CREATE TRIGGER close_engine_gather
INSTEAD OF INSERT ON close_engine_bursts
WHEN NOT EXISTS (SELECT 1 FROM close_engine_carried d
    WHERE d.conversation_id = NEW.conversation_id AND d."key" = NEW."key")
BEGIN
    UPDATE close_engine_outbox SET payload = json_insert(payload, '$.events[#]', json(NEW.said)),
        available_at = min(debounced_until, max(available_at, NEW.at))
    WHERE id = (SELECT min(id) FROM close_engine_outbox WHERE conversation_id = NEW.conversation_id AND status = 'PENDING'
            AND topic = NEW.topic AND claims = 0 AND debounced_until IS NOT NULL
            AND CASE WHEN json_valid(payload) THEN json_type(payload, '$.events') = 'array' END);
    INSERT INTO close_engine_outbox
        (conversation_id, topic, payload, "key", created_at, available_at, debounced_until)
    SELECT NEW.conversation_id, NEW.topic,
        json_patch(NEW.payload, json_set(NEW.said, '$.events', json_array(json(NEW.said)))),
        NEW."key" || ':debounced', coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')),
        NEW.at, NEW.until
    WHERE NOT EXISTS (SELECT 1 FROM close_engine_outbox WHERE conversation_id = NEW.conversation_id AND status = 'PENDING'
            AND topic = NEW.topic AND claims = 0 AND debounced_until IS NOT NULL
            AND CASE WHEN json_valid(payload) THEN json_type(payload, '$.events') = 'array' END);
    INSERT INTO close_engine_carried (conversation_id, "key", at) VALUES (NEW.conversation_id, NEW."key",
        coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')));
END;

INSERT INTO close_engine_transitions (machine, "trigger", source, dest) VALUES
    ('conversation', 'start_qualifying', 'INITIATED', 'QUALIFYING'),
    ('conversation', 'collect_info', 'QUALIFYING', 'COLLECTING_INFO'),
    ('conversation', 'start_building', 'QUALIFYING', 'BUILDING'),
    ('conversation', 'start_building', 'COLLECTING_INFO', 'BUILDING'),
    ('conversation', 'send_preview', 'BUILDING', 'PREVIEW_SENT'),
    ('conversation', 'send_preview', 'EDIT_LOOP', 'PREVIEW_SENT'),
    ('conversation', 'request_edits', 'PREVIEW_SENT', 'EDIT_LOOP'),
    ('conversation', 'request_approval', 'PREVIEW_SENT', 'PENDING_APPROVAL'),
    ('conversation', 'request_approval', 'EDIT_LOOP', 'PENDING_APPROVAL'),
    ('conversation', 'withdraw_approval', 'PENDING_APPROVAL', 'PREVIEW_SENT'),
    ('conversation', 'send_payment_link', 'PREVIEW_SENT', 'PAYMENT_SENT'),
    ('conversation', 'send_payment_link', 'EDIT_LOOP', 'PAYMENT_SENT'),
    ('conversation', 'send_payment_link', 'PENDING_APPROVAL', 'PAYMENT_SENT'),
    ('conversation', 'complete', 'INITIATED', 'COMPLETED'),
    ('conversation', 'complete', 'QUALIFYING', 'COMPLETED'),
    ('conversation', 'complete', 'COLLECTING_INFO', 'COMPLETED'),
    ('conversation', 'complete', 'BUILDING', 'COMPLETED'),
    ('conversation', 'complete', 'PREVIEW_SENT', 'COMPLETED'),
    ('conversation', 'complete', 'EDIT_LOOP', 'COMPLETED'),
    ('conversation', 'complete', 'PENDING_APPROVAL', 'COMPLETED'),
    ('conversation', 'complete', 'PAYMENT_SENT', 'COMPLETED'),
    ('conversation', 'complete', 'STALLED', 'COMPLETED'),
    ('conversation', 'complete', 'CLOSED_LOST', 'COMPLETED'),
    ('conversation', 'stall', 'INITIATED', 'STALLED'),
    ('conversation', 'stall', 'QUALIFYING', 'STALLED'),
    ('conversation', 'stall', 'COLLECTING_INFO', 'STALLED'),
    ('conversation', 'stall', 'BUILDING', 'STALLED'),
    ('conversation', 'stall', 'PREVIEW_SENT', 'STALLED'),
    ('conversation', 'stall', 'EDIT_LOOP', 'STALLED'),
    ('conversation', 'stall', 'PENDING_APPROVAL', 'STALLED'),
    ('conversation', 'stall', 'PAYMENT_SENT', 'STALLED'),
    ('conversation', 'resume', 'STALLED', 'INITIATED'),
    ('conversation', 'resume', 'STALLED', 'QUALIFYING'),
    ('conversation', 'resume', 'STALLED', 'COLLECTING_INFO'),
    ('conversation', 'resume', 'STALLED', 'BUILDING'),
    ('conversation', 'resume', 'STALLED', 'PREVIEW_SENT'),
    ('conversation', 'resume', 'STALLED', 'EDIT_LOOP'),
    ('conversation', 'resume', 'STALLED', 'PENDING_APPROVAL'),
    ('conversation', 'resume', 'STALLED', 'PAYMENT_SENT'),
    ('conversation', 'close_lost', 'INITIATED', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'QUALIFYING', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'COLLECTING_INFO', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'BUILDING', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'PREVIEW_SENT', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'EDIT_LOOP', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'PENDING_APPROVAL', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'PAYMENT_SENT', 'CLOSED_LOST'),
    ('conversation', 'close_lost', 'STALLED', 'CLOSED_LOST'),
    ('conversation', 'reopen', 'CLOSED_LOST', 'INITIATED')
ON CONFLICT (machine, source, dest) DO UPDATE SET "trigger" = EXCLUDED."trigger";
