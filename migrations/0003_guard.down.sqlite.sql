DROP TRIGGER IF EXISTS close_engine_guard_insert;
DROP TRIGGER IF EXISTS close_engine_guard_id;
DROP TRIGGER IF EXISTS close_engine_guard_update;
DROP TRIGGER IF EXISTS close_engine_opening;
DROP TRIGGER IF EXISTS close_engine_record;
DROP TRIGGER IF EXISTS close_engine_version;
DROP TRIGGER IF EXISTS close_engine_stalled;
DROP TRIGGER IF EXISTS close_engine_deletion;
