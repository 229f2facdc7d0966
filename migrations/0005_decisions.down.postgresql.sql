DROP TRIGGER IF EXISTS zz_close_engine_closing ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_gone ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_decision ON public.pending_actions;
DROP TRIGGER IF EXISTS zz_close_engine_guard ON public.pending_actions;
DROP FUNCTION IF EXISTS
    close_engine.withdraw_waiting(), close_engine.follow_decision(), close_engine.guard_action();
DROP INDEX IF EXISTS public.pending_actions_close_engine_expiry;
DROP INDEX IF EXISTS public.pending_actions_close_engine_queue;
DROP INDEX IF EXISTS public.close_engine_conversations_stalled;
DELETE FROM close_engine.transitions WHERE machine = 'action';
