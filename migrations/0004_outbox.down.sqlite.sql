DROP TABLE close_engine_outbox;
DROP TABLE close_engine_inbox;
DROP TABLE close_engine_drafts;
DROP TABLE close_engine_takeovers;
DROP TABLE close_engine_numbers;
DROP TABLE close_engine_optouts;
