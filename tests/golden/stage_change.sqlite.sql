-- start_qualifying
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at";

-- collect_info
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at";

-- start_building
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at";

-- send_preview
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at";

-- request_edits
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?, "edit_rounds" = "edit_rounds" + 1
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at", "edit_rounds";

-- request_approval
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at";

-- withdraw_approval
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at";

-- send_payment_link
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?, "payment_link_url" = ?, "payment_link_sent_at" = (SELECT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')))
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at", "payment_link_url", "payment_link_sent_at";

-- complete
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?, "completed_at" = (SELECT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')))
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at", "completed_at";

-- stall
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?, "stalled_at" = (SELECT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now')))
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at", "stalled_at";

-- resume
UPDATE "close_engine_conversations"
SET "stage" = (SELECT r.stage FROM close_engine_resumes_to r WHERE r.conversation_id = close_engine_conversations.id), "updated_at" = ?, "payment_link_sent_at" = CASE WHEN payment_link_sent_at IS NULL AND (SELECT r.stage FROM close_engine_resumes_to r WHERE r.conversation_id = close_engine_conversations.id) = 'PAYMENT_SENT' THEN (SELECT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))) ELSE payment_link_sent_at END, "stalled_at" = NULL
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at", "payment_link_sent_at", "stalled_at";

-- close_lost
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?, "closed_lost_at" = (SELECT coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))), "closed_lost_reason" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at", "closed_lost_at", "closed_lost_reason";

-- reopen
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?, "closed_lost_at" = NULL, "closed_lost_reason" = NULL
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
RETURNING "stage", "updated_at", "closed_lost_at", "closed_lost_reason";

-- collect_info with a key
UPDATE "close_engine_conversations"
SET "stage" = ?, "updated_at" = ?
WHERE "id" = ?
AND "stage" || '' = ?
AND "updated_at" = ?
AND NOT EXISTS (SELECT 1 FROM close_engine_history WHERE conversation_id = ? AND key = ?)
RETURNING "stage", "updated_at";
