DROP TABLE close_engine.outbox;
DROP TABLE close_engine.inbox;
