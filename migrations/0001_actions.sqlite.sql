-- The approval queue. It has no foreign key, because Prisma declares none.

CREATE TABLE pending_actions (
    "id" TEXT NOT NULL PRIMARY KEY,
    "conversation_id" TEXT NOT NULL,
    "lead_id" TEXT NOT NULL,
    "type" TEXT NOT NULL,
    "draft_message" TEXT NOT NULL,
    "metadata" TEXT,
    "status" TEXT NOT NULL DEFAULT 'PENDING',
    "approved_by" TEXT,
    "approved_at" TEXT,
    "expires_at" TEXT,
    "created_at" TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE INDEX pending_actions_status_idx ON pending_actions (status);
CREATE INDEX pending_actions_lead_id_idx ON pending_actions (lead_id);
CREATE INDEX pending_actions_conversation_id_idx ON pending_actions (conversation_id);
