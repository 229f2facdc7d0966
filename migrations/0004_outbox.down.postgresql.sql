DROP FUNCTION close_engine.claim(integer, double precision, text, text[], boolean);
DROP TABLE close_engine.outbox;
DROP FUNCTION close_engine.announce_message();
DROP TABLE close_engine.inbox;
DROP TABLE close_engine.drafts;
DROP TABLE close_engine.takeovers;
DROP TABLE close_engine.numbers;
DROP TABLE close_engine.optouts;
