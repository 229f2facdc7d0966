-- The approval queue, exactly as `prisma db push` creates it: without a foreign key.

CREATE TABLE public.pending_actions (
    id text NOT NULL,
    conversation_id text NOT NULL,
    lead_id text NOT NULL,
    type text NOT NULL,
    draft_message text NOT NULL,
    metadata jsonb,
    status text NOT NULL DEFAULT 'PENDING',
    approved_by text,
    approved_at timestamp(3) without time zone,
    expires_at timestamp(3) without time zone,
    created_at timestamp(3) without time zone NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CONSTRAINT pending_actions_pkey PRIMARY KEY (id)
);

CREATE INDEX pending_actions_status_idx ON public.pending_actions (status);
CREATE INDEX pending_actions_lead_id_idx ON public.pending_actions (lead_id);
CREATE INDEX pending_actions_conversation_id_idx ON public.pending_actions (conversation_id);
