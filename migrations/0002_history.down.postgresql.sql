DROP TABLE close_engine.deadlines;
DROP TABLE IF EXISTS close_engine.subscriptions;
DROP TABLE close_engine.history;
DROP TABLE close_engine.transitions;
