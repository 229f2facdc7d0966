DROP TRIGGER IF EXISTS aa_close_engine_opening ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_deletion ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_guard ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_truncation ON public.close_engine_conversations;
DROP FUNCTION IF EXISTS
    close_engine.guard_conversation(), close_engine.record_opening(), close_engine.forget_deadlines(),
    close_engine.sweep(text[], text), close_engine.sweeps_at_once(), close_engine.recorded(), close_engine.context(), close_engine.actor(), close_engine.writer(),
    close_engine.refuse_table(oid, text),
    close_engine.require_readable(text, jsonb), close_engine.require_time(text, timestamp, timestamp),
    close_engine.require_word(text, text, text[]), close_engine.moment();
DROP TABLE IF EXISTS close_engine.sweeping;
