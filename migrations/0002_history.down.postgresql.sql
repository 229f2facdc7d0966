DROP TABLE close_engine.silence;
DROP TABLE close_engine.history;
DROP TABLE close_engine.transitions;
