-- start_qualifying
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", close_engine.recorded();

-- collect_info
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", close_engine.recorded();

-- start_building
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", close_engine.recorded();

-- send_preview
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", close_engine.recorded();

-- request_edits
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s, "edit_rounds" = "edit_rounds" + 1
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "edit_rounds", close_engine.recorded();

-- request_approval
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", close_engine.recorded();

-- withdraw_approval
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", close_engine.recorded();

-- send_payment_link
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s, "payment_link_url" = %s, "payment_link_sent_at" = (SELECT close_engine.moment())
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "payment_link_url", "payment_link_sent_at", close_engine.recorded();

-- complete
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s, "completed_at" = (SELECT close_engine.moment())
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "completed_at", close_engine.recorded();

-- stall
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s, "stalled_at" = (SELECT close_engine.moment())
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "stalled_at", close_engine.recorded();

-- resume
UPDATE "close_engine_conversations"
SET "stage" = close_engine.resumes_to(close_engine_conversations.id::text, close_engine_conversations.payment_link_sent_at::timestamp), "updated_at" = %s, "payment_link_sent_at" = CASE WHEN payment_link_sent_at IS NULL AND close_engine.resumes_to(close_engine_conversations.id::text, close_engine_conversations.payment_link_sent_at::timestamp) = 'PAYMENT_SENT' THEN (SELECT close_engine.moment()) ELSE payment_link_sent_at END, "stalled_at" = NULL
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "payment_link_sent_at", "stalled_at", close_engine.recorded();

-- close_lost
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s, "closed_lost_at" = (SELECT close_engine.moment()), "closed_lost_reason" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "closed_lost_at", "closed_lost_reason", close_engine.recorded();

-- reopen
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s, "closed_lost_at" = NULL, "closed_lost_reason" = NULL
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "closed_lost_at", "closed_lost_reason", close_engine.recorded();

-- collect_info with a key
UPDATE "close_engine_conversations"
SET "stage" = %s, "updated_at" = %s
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND NOT EXISTS (SELECT 1 FROM close_engine.history WHERE conversation_id = %s AND key = %s)
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", close_engine.recorded();
