DROP TABLE close_engine.deadlines;
DROP TABLE close_engine.history;
DROP TABLE close_engine.transitions;
