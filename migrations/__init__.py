"""The migrations, for `close_engine.migrate()`, and as they are for plain `pwmigrate`.

Each script runs SQL files that stand beside it, one for each database: what stands in a file is what runs. Two names
in a file stand for what differs between deployments, and a script replaces only these: `public.` by the schema of the
CRM's tables, and in 0001 `"leads"` and `"users"` by the CRM's names for them.

The scripts never import close_engine, nor each other, and are frozen once released.
"""
