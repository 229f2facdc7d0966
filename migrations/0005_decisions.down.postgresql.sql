DROP TRIGGER IF EXISTS zz_close_engine_closing ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_emptied ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_gone ON public.close_engine_conversations;
DROP TRIGGER IF EXISTS zz_close_engine_decision ON public.pending_actions;
DROP TRIGGER IF EXISTS zz_close_engine_guard ON public.pending_actions;
DROP TRIGGER IF EXISTS zz_close_engine_truncation ON public.pending_actions;
DROP TRIGGER IF EXISTS aa_close_engine_draft ON public.pending_actions;
DROP TRIGGER IF EXISTS close_engine_takeover ON close_engine.takeovers;
DROP FUNCTION IF EXISTS
    close_engine.withdraw_waiting(), close_engine.follow_decision(), close_engine.guard_action(),
    close_engine.follow_draft(), close_engine.follow_takeover(),
    close_engine.if_lead_writes(text, jsonb), close_engine.last_text(text), close_engine.moment_in(text, jsonb, text),
    close_engine.resumes_to(text, timestamp);
DELETE FROM close_engine.drafts;
DELETE FROM close_engine.deadlines WHERE trigger = 'expire';
DELETE FROM close_engine.transitions WHERE machine = 'action';
