-- The conversations. Prisma does not manage this database, so only names and nullability are the same as on PostgreSQL.
--
-- The script replaces the two quoted names with the CRM's own names for its tables of leads and users.

CREATE TABLE close_engine_conversations (
    "id" TEXT NOT NULL PRIMARY KEY,
    "lead_id" TEXT NOT NULL,
    "rep_id" TEXT,
    "entry_point" TEXT NOT NULL,
    "stage" TEXT NOT NULL DEFAULT 'INITIATED',
    "autonomy_level" TEXT NOT NULL DEFAULT 'FULL_AUTO',
    "questions_asked" TEXT,
    "collected_data" TEXT,
    "edit_rounds" INTEGER NOT NULL DEFAULT 0,
    "payment_link_url" TEXT,
    "payment_link_sent_at" TEXT,
    "stalled_at" TEXT,
    "completed_at" TEXT,
    "closed_lost_at" TEXT,
    "closed_lost_reason" TEXT,
    "created_at" TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updated_at" TEXT NOT NULL,
    CONSTRAINT close_engine_conversations_lead_id_fkey
        FOREIGN KEY (lead_id) REFERENCES "leads" (id) ON DELETE CASCADE ON UPDATE CASCADE,
    CONSTRAINT close_engine_conversations_rep_id_fkey
        FOREIGN KEY (rep_id) REFERENCES "users" (id) ON DELETE SET NULL ON UPDATE CASCADE
);

CREATE UNIQUE INDEX close_engine_conversations_lead_id_key ON close_engine_conversations (lead_id);
CREATE INDEX close_engine_conversations_entry_point_idx ON close_engine_conversations (entry_point);
CREATE INDEX close_engine_conversations_stage_idx ON close_engine_conversations (stage);
CREATE INDEX close_engine_conversations_created_at_idx ON close_engine_conversations (created_at);
