DROP TABLE close_engine_deadlines;
DROP VIEW IF EXISTS close_engine_events;
DROP VIEW IF EXISTS close_engine_bursts;
DROP TABLE IF EXISTS close_engine_subscriptions;
DROP TABLE close_engine_context;
DROP TABLE close_engine_history;
DROP TABLE close_engine_transitions;
DROP TABLE IF EXISTS close_engine_clock;
