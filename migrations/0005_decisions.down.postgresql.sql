DROP TRIGGER IF EXISTS zz_close_engine_closing ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_emptied ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_gone ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_decision ON public.pending_actions;
DROP TRIGGER IF EXISTS zz_close_engine_guard ON public.pending_actions;
DROP TRIGGER IF EXISTS zz_close_engine_truncation ON public.pending_actions;
DROP TRIGGER IF EXISTS aa_close_engine_expiry ON public.pending_actions;
DROP FUNCTION IF EXISTS
    close_engine.withdraw_waiting(), close_engine.follow_decision(), close_engine.guard_action(),
    close_engine.follow_expiry(), close_engine.send_after(text, jsonb);
DELETE FROM close_engine.deadlines WHERE trigger = 'expire';
DELETE FROM close_engine.transitions WHERE machine = 'action';
