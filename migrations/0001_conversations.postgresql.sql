-- The conversations, exactly as `prisma db push` creates them, so that Prisma finds nothing to change.
--
-- The script replaces the two quoted names with the CRM's own names for its tables of leads and users, and `public`
-- with the current schema.

CREATE TABLE public.close_engine_conversations (
    id text NOT NULL,
    lead_id text NOT NULL,
    rep_id text,
    entry_point text NOT NULL,
    stage text NOT NULL DEFAULT 'INITIATED',
    autonomy_level text NOT NULL DEFAULT 'FULL_AUTO',
    questions_asked jsonb,
    collected_data jsonb,
    edit_rounds integer NOT NULL DEFAULT 0,
    payment_link_url text,
    payment_link_sent_at timestamp(3) without time zone,
    stalled_at timestamp(3) without time zone,
    completed_at timestamp(3) without time zone,
    closed_lost_at timestamp(3) without time zone,
    closed_lost_reason text,
    created_at timestamp(3) without time zone NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp(3) without time zone NOT NULL,
    CONSTRAINT close_engine_conversations_pkey PRIMARY KEY (id)
);

CREATE UNIQUE INDEX close_engine_conversations_lead_id_key ON public.close_engine_conversations (lead_id);
CREATE INDEX close_engine_conversations_entry_point_idx ON public.close_engine_conversations (entry_point);
CREATE INDEX close_engine_conversations_stage_idx ON public.close_engine_conversations (stage);
CREATE INDEX close_engine_conversations_created_at_idx ON public.close_engine_conversations (created_at);

ALTER TABLE public.close_engine_conversations ADD CONSTRAINT close_engine_conversations_lead_id_fkey
    FOREIGN KEY (lead_id) REFERENCES public."leads" (id) ON DELETE CASCADE ON UPDATE CASCADE;
ALTER TABLE public.close_engine_conversations ADD CONSTRAINT close_engine_conversations_rep_id_fkey
    FOREIGN KEY (rep_id) REFERENCES public."users" (id) ON DELETE SET NULL ON UPDATE CASCADE;
