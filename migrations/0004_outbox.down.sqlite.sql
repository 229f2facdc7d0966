DROP TABLE close_engine_outbox;
DROP TABLE close_engine_inbox;
