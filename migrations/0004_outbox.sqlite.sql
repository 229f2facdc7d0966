-- The outbox holds the messages to send, the inbox what was received already. Drafts say what whoever wrote a pending action
-- knew, and takeovers which conversations a human leads. Who opted
-- out is not texted.
--
-- Prisma does not see these tables. The partial indexes cover only the messages that still wait, so they stay small no
-- matter how many were sent.

CREATE TABLE IF NOT EXISTS close_engine_outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id TEXT NOT NULL,
    topic TEXT NOT NULL,
    body TEXT,
    payload TEXT,
    "trigger" TEXT,
    approved_by TEXT,
    submitted_by TEXT,
    "key" TEXT,
    send_key TEXT NOT NULL DEFAULT (lower(hex(randomblob(16)))),
    action_id TEXT,
    level TEXT,
    if_lead_writes TEXT,
    after_text INTEGER,
    after_change INTEGER,
    status TEXT NOT NULL DEFAULT 'PENDING',
    created_at TEXT NOT NULL,
    available_at TEXT NOT NULL,
    not_after TEXT,
    priority INTEGER NOT NULL DEFAULT 0,
    debounced_until TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL DEFAULT 36,
    claims INTEGER NOT NULL DEFAULT 0,
    unreported INTEGER NOT NULL DEFAULT 0,
    leased_by TEXT,
    leased_at TEXT,
    sent_at TEXT,
    provider_id TEXT,
    last_error TEXT,
    refusal TEXT
);
CREATE INDEX IF NOT EXISTS close_engine_outbox_available_at_idx
    ON close_engine_outbox (available_at, id) WHERE status = 'PENDING';
-- What is urgent is found first: whether anything of it is due, and then priority by priority.
CREATE INDEX IF NOT EXISTS close_engine_outbox_urgent_idx
    ON close_engine_outbox (available_at) WHERE status = 'PENDING' AND priority > 0;
CREATE INDEX IF NOT EXISTS close_engine_outbox_priority_idx
    ON close_engine_outbox (priority, available_at, id) WHERE status = 'PENDING' AND priority > 0;
CREATE INDEX IF NOT EXISTS close_engine_outbox_conversation_id_idx
    ON close_engine_outbox (conversation_id, id) WHERE status = 'PENDING';
-- At most one message of a lane is in flight, no matter what the workers do. The texts of a conversation are one lane,
-- each other topic is one of its own.
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_outbox_text_in_flight_key
    ON close_engine_outbox (conversation_id) WHERE status = 'PENDING' AND leased_by IS NOT NULL
        AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK');
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_outbox_effect_in_flight_key
    ON close_engine_outbox (conversation_id, topic) WHERE status = 'PENDING' AND leased_by IS NOT NULL
        AND topic NOT IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK');
CREATE INDEX IF NOT EXISTS close_engine_outbox_leased_idx
    ON close_engine_outbox (available_at) WHERE status = 'PENDING' AND leased_by IS NOT NULL;
-- What was sent is found by its send key, if that is what the provider names.
CREATE INDEX IF NOT EXISTS close_engine_outbox_send_key_idx ON close_engine_outbox (send_key) WHERE status = 'SENT';
-- What was sent to a lead since its conversation stalled says where things stand. A transcript has what was withdrawn, too.
CREATE INDEX IF NOT EXISTS close_engine_outbox_settled_idx ON close_engine_outbox (conversation_id, sent_at)
    WHERE status <> 'PENDING' AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK');
CREATE INDEX IF NOT EXISTS close_engine_outbox_dead_idx ON close_engine_outbox (id) WHERE status = 'DEAD';
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_outbox_key_key
    ON close_engine_outbox (conversation_id, "key") WHERE "key" IS NOT NULL;
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_outbox_provider_id_key
    ON close_engine_outbox (provider_id) WHERE provider_id IS NOT NULL;

-- The phone number of each lead that is texted: the text that the CRM had, and what was read from it.
CREATE TABLE IF NOT EXISTS close_engine_numbers (
    lead_id TEXT NOT NULL PRIMARY KEY,
    phone TEXT,
    number TEXT
);
CREATE INDEX IF NOT EXISTS close_engine_numbers_number_idx ON close_engine_numbers (number);

-- Who opted out of texts: a row for a lead, and one for its number. It is in force until it is lifted.
CREATE TABLE IF NOT EXISTS close_engine_optouts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    lead_id TEXT,
    number TEXT,
    source TEXT NOT NULL,
    "key" TEXT,
    created_at TEXT NOT NULL,
    lifted_at TEXT,
    lifted_by TEXT,
    lifted_key TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_optouts_lead_id_key
    ON close_engine_optouts (lead_id) WHERE lifted_at IS NULL;
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_optouts_number_key
    ON close_engine_optouts (number) WHERE lifted_at IS NULL;
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_optouts_key_key
    ON close_engine_optouts (lead_id, "key") WHERE "key" IS NOT NULL;

-- What is not sent for now. A pause lasts until somebody resumes; an empty topic stands for all.
CREATE TABLE IF NOT EXISTS close_engine_pauses (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL,
    reason TEXT NOT NULL,
    paused_by TEXT,
    paused_at TEXT NOT NULL,
    resumed_by TEXT,
    resumed_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_pauses_topic_key ON close_engine_pauses (topic) WHERE resumed_at IS NULL;

-- Which events an effect of a debounced subscription carries, by the key that each would have if it came alone, and since
-- when: `prune` deletes what is old.
CREATE TABLE IF NOT EXISTS close_engine_carried (
    conversation_id TEXT NOT NULL,
    "key" TEXT NOT NULL,
    at TEXT NOT NULL,
    PRIMARY KEY (conversation_id, "key")
);

-- What providers say of a message after it was sent, one row for each sending. Until a message is marked as sent, only one
-- of the two ids may be known. A status only goes forward.
CREATE TABLE IF NOT EXISTS close_engine_deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    provider_id TEXT,
    send_key TEXT,
    message_id INTEGER,
    status TEXT NOT NULL,
    error TEXT,
    at TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_deliveries_provider_id_key
    ON close_engine_deliveries (provider_id) WHERE provider_id IS NOT NULL;
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_deliveries_send_key_key
    ON close_engine_deliveries (send_key) WHERE send_key IS NOT NULL;
-- Nearly always empty: every message that is marked as sent looks there.
CREATE INDEX IF NOT EXISTS close_engine_deliveries_early_provider_id_idx
    ON close_engine_deliveries (provider_id) WHERE message_id IS NULL;
CREATE INDEX IF NOT EXISTS close_engine_deliveries_early_send_key_idx
    ON close_engine_deliveries (send_key) WHERE message_id IS NULL;
CREATE INDEX IF NOT EXISTS close_engine_deliveries_message_id_idx ON close_engine_deliveries (message_id);
CREATE INDEX IF NOT EXISTS close_engine_deliveries_undelivered_idx
    ON close_engine_deliveries (message_id) WHERE status = 'undelivered';

-- After a text of ours it is the lead's turn, whoever marks it sent, unless the lead wrote after it was drafted, and still
-- waits for an answer.
DROP TRIGGER IF EXISTS close_engine_sent;
CREATE TRIGGER close_engine_sent
AFTER UPDATE ON close_engine_outbox
WHEN NEW.status = 'SENT' AND OLD.status <> 'SENT' AND NEW.topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
BEGIN
    UPDATE close_engine_deadlines SET "trigger" = 'stall',
        at = coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))
    WHERE "trigger" IN ('stall', 'answer') AND subject_id = NEW.conversation_id AND ("trigger" = 'stall' OR NOT EXISTS (
        SELECT 1 FROM close_engine_inbox i
        WHERE i.kind = 'text' AND i.conversation_id = NEW.conversation_id AND i.id > NEW.after_text));
END;

-- What a provider said of a message before it was marked as sent becomes its delivery: the furthest, if it was said by both
-- ids.
DROP TRIGGER IF EXISTS close_engine_adopted;
CREATE TRIGGER close_engine_adopted
AFTER UPDATE ON close_engine_outbox
WHEN NEW.status = 'SENT' AND OLD.status <> 'SENT' AND (
    EXISTS (SELECT 1 FROM close_engine_deliveries WHERE message_id IS NULL AND provider_id = NEW.provider_id)
    OR EXISTS (SELECT 1 FROM close_engine_deliveries WHERE message_id IS NULL AND send_key = NEW.send_key))
BEGIN
    DELETE FROM close_engine_deliveries
    WHERE message_id IS NULL AND (provider_id = NEW.provider_id OR send_key = NEW.send_key) AND id <> (
        SELECT id FROM close_engine_deliveries
        WHERE message_id IS NULL AND (provider_id = NEW.provider_id OR send_key = NEW.send_key)
        ORDER BY CASE status WHEN 'read' THEN 5 WHEN 'delivered' THEN 4 WHEN 'undelivered' THEN 3 WHEN 'sent' THEN 2
            ELSE 1 END DESC, id LIMIT 1);
    UPDATE close_engine_deliveries
    SET message_id = NEW.id, provider_id = coalesce(provider_id, NEW.provider_id), send_key = NEW.send_key
    WHERE message_id IS NULL AND (provider_id = NEW.provider_id OR send_key = NEW.send_key);
END;

-- That a message is undelivered is an event, once for each sending, whoever writes it. One that tells of another message is
-- none, because nobody might ever be told.
DROP TRIGGER IF EXISTS close_engine_undelivered_insert;
CREATE TRIGGER close_engine_undelivered_insert
AFTER INSERT ON close_engine_deliveries
WHEN NEW.status = 'undelivered' AND NEW.message_id IS NOT NULL
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    SELECT 'message:undelivered', '', o.conversation_id, NEW.id, json_object('message_id', o.id, 'topic', o.topic,
        'error', NEW.error, 'provider_id', NEW.provider_id)
    FROM close_engine_outbox o
    WHERE o.id = NEW.message_id AND coalesce(o."key", '') NOT LIKE 'close_engine:effect:%:message:%';
END;

DROP TRIGGER IF EXISTS close_engine_undelivered_update;
CREATE TRIGGER close_engine_undelivered_update
AFTER UPDATE ON close_engine_deliveries
WHEN NEW.status = 'undelivered' AND NEW.message_id IS NOT NULL
    AND (OLD.status, OLD.message_id) IS NOT (NEW.status, NEW.message_id)
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    SELECT 'message:undelivered', '', o.conversation_id, NEW.id, json_object('message_id', o.id, 'topic', o.topic,
        'error', NEW.error, 'provider_id', NEW.provider_id)
    FROM close_engine_outbox o
    WHERE o.id = NEW.message_id AND coalesce(o."key", '') NOT LIKE 'close_engine:effect:%:message:%';
END;

CREATE TABLE IF NOT EXISTS close_engine_inbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    "key" TEXT NOT NULL,
    lead_id TEXT,
    conversation_id TEXT,
    body TEXT,
    no_reply_reason TEXT,
    no_reply_by TEXT,
    amount INTEGER,
    currency TEXT,
    issue TEXT,
    sentence TEXT,
    resolved_by TEXT,
    resolved_at TEXT,
    resolution TEXT,
    metadata TEXT,
    result TEXT,
    received_at TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_inbox_key_key ON close_engine_inbox (kind, "key");
-- What a draft knew is compared with the last text of its conversation.
CREATE INDEX IF NOT EXISTS close_engine_inbox_text_idx ON close_engine_inbox (conversation_id, id) WHERE kind = 'text';
-- What a lead wrote before it had a conversation, and its keywords.
CREATE INDEX IF NOT EXISTS close_engine_inbox_lead_id_idx ON close_engine_inbox (lead_id, id)
    WHERE kind = 'text' AND conversation_id IS NULL;
-- A conversation has at most one payment that nobody need look at: the one that completes it.
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_inbox_payment_key
    ON close_engine_inbox (conversation_id) WHERE kind = 'payment' AND issue IS NULL;
CREATE INDEX IF NOT EXISTS close_engine_inbox_conversation_id_idx ON close_engine_inbox (conversation_id) WHERE kind <> 'text';
CREATE INDEX IF NOT EXISTS close_engine_inbox_issue_idx ON close_engine_inbox (id) WHERE issue IS NOT NULL AND resolved_at IS NULL;

-- The last text of the lead when an action was put in, as long as the action waits.
CREATE TABLE IF NOT EXISTS close_engine_drafts (
    action_id TEXT NOT NULL PRIMARY KEY,
    after_text INTEGER NOT NULL
);

CREATE TABLE IF NOT EXISTS close_engine_takeovers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id TEXT NOT NULL,
    taken_by TEXT NOT NULL,
    reason TEXT,
    taken_at TEXT NOT NULL,
    until TEXT,
    handed_back_by TEXT,
    handed_back_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_takeovers_conversation_id_key
    ON close_engine_takeovers (conversation_id) WHERE handed_back_at IS NULL;
CREATE INDEX IF NOT EXISTS close_engine_takeovers_all_idx ON close_engine_takeovers (conversation_id, id);

-- Texts that others sent, or that the CRM's own table had: they are part of what was said, and nothing else asks for them.
CREATE TABLE IF NOT EXISTS close_engine_texts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    lead_id TEXT NOT NULL,
    "key" TEXT NOT NULL,
    direction TEXT NOT NULL,
    author TEXT NOT NULL,
    body TEXT NOT NULL,
    metadata TEXT,
    at TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS close_engine_texts_key_key ON close_engine_texts ("key");
CREATE INDEX IF NOT EXISTS close_engine_texts_lead_id_idx ON close_engine_texts (lead_id, id);

-- Which workers run: each says so again and again, for people to see. Nothing depends on it.
CREATE TABLE IF NOT EXISTS close_engine_workers (
    name TEXT NOT NULL PRIMARY KEY,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started_at TEXT NOT NULL,
    seen_at TEXT NOT NULL,
    concurrency INTEGER NOT NULL,
    topics TEXT,
    sending INTEGER NOT NULL
);

-- Effects: what is subscribed to an event is put into the outbox.
DROP TRIGGER IF EXISTS close_engine_entered;
CREATE TRIGGER close_engine_entered
AFTER INSERT ON close_engine_history
WHEN NEW."trigger" <> 'adopted' AND EXISTS (
    SELECT 1 FROM close_engine_transitions WHERE machine = 'conversation' AND dest = NEW.dest AND subscribed)
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    VALUES ('stage:entered', NEW.dest, NEW.conversation_id, NEW.id, json_object(
        'change_id', NEW.id, 'from', NEW.source, 'to', NEW.dest, 'trigger', NEW."trigger"));
END;

-- Keep the mark at the stages that are subscribed to.
DROP TRIGGER IF EXISTS close_engine_subscribed_insert;
CREATE TRIGGER close_engine_subscribed_insert
AFTER INSERT ON close_engine_subscriptions
BEGIN
    UPDATE close_engine_transitions SET subscribed = NOT subscribed
    WHERE machine = 'conversation' AND subscribed <> EXISTS (
        SELECT 1 FROM close_engine_subscriptions s WHERE s.event = 'stage:entered' AND s.stage = dest);
END;

DROP TRIGGER IF EXISTS close_engine_subscribed_update;
CREATE TRIGGER close_engine_subscribed_update
AFTER UPDATE ON close_engine_subscriptions
BEGIN
    UPDATE close_engine_transitions SET subscribed = NOT subscribed
    WHERE machine = 'conversation' AND subscribed <> EXISTS (
        SELECT 1 FROM close_engine_subscriptions s WHERE s.event = 'stage:entered' AND s.stage = dest);
END;

DROP TRIGGER IF EXISTS close_engine_subscribed_delete;
CREATE TRIGGER close_engine_subscribed_delete
AFTER DELETE ON close_engine_subscriptions
BEGIN
    UPDATE close_engine_transitions SET subscribed = NOT subscribed
    WHERE machine = 'conversation' AND subscribed <> EXISTS (
        SELECT 1 FROM close_engine_subscriptions s WHERE s.event = 'stage:entered' AND s.stage = dest);
END;

-- A message that is dead may be requeued and die again: that is another event. One that tells of a dead message and dies
-- itself is none, because nobody might ever be told.
DROP TRIGGER IF EXISTS close_engine_dead;
CREATE TRIGGER close_engine_dead
AFTER UPDATE ON close_engine_outbox
WHEN NEW.status = 'DEAD' AND OLD.status <> 'DEAD'
    AND coalesce(NEW."key", '') NOT LIKE 'close_engine:effect:%:message:dead:%'
BEGIN
    INSERT INTO close_engine_events (event, stage, conversation_id, fact, facts)
    VALUES ('message:dead', '', NEW.conversation_id, NEW.id || ':' || NEW.claims, json_object(
        'message_id', NEW.id, 'topic', NEW.topic, 'error', NEW.last_error));
END;

-- Whatever happened while there were no triggers.
UPDATE close_engine_transitions SET subscribed = NOT subscribed
WHERE machine = 'conversation' AND subscribed <> EXISTS (
    SELECT 1 FROM close_engine_subscriptions s WHERE s.event = 'stage:entered' AND s.stage = dest);
