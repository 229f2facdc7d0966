DROP FUNCTION close_engine.claim(integer, double precision, text, text[], boolean);
DROP FUNCTION close_engine.mark_sent(bigint, text, integer, text);
UPDATE close_engine.transitions SET subscribed = false WHERE subscribed;
DROP TRIGGER IF EXISTS close_engine_subscribed ON close_engine.subscriptions;
DROP TABLE close_engine.outbox;
DROP FUNCTION close_engine.announce_message(), close_engine.follow_message();
DROP FUNCTION IF EXISTS
    close_engine.follow_subscriptions(), close_engine.publish(text, text, text, text, jsonb);
DROP TABLE close_engine.inbox;
DROP TABLE close_engine.drafts;
DROP TABLE close_engine.takeovers;
DROP TABLE close_engine.texts;
DROP TABLE close_engine.numbers;
DROP TABLE close_engine.optouts;
DROP TABLE close_engine.pauses;
DROP TABLE close_engine.workers;
DROP TABLE IF EXISTS close_engine.carried;
DROP TABLE close_engine.deliveries;
DROP FUNCTION
    close_engine.announce_resumption(), close_engine.follow_delivery(), close_engine.adopt_delivery(bigint, text, text);
