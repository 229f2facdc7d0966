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
SET "stage" = COALESCE((SELECT CASE WHEN source NOT IN ('COMPLETED', 'CLOSED_LOST') THEN source END FROM close_engine.history WHERE conversation_id = close_engine_conversations.id AND dest = 'STALLED' ORDER BY id DESC LIMIT 1), 'QUALIFYING'), "updated_at" = %s, "stalled_at" = NULL
WHERE "id" = %s
AND "stage" || '' = %s
AND "updated_at" = %s
AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
RETURNING "stage", "updated_at", "stalled_at", close_engine.recorded();

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
