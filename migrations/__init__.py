"""The migrations. `close_engine.migrate()` runs them, and so does Peewee's own `pwmigrate`.

Each script runs the SQL file beside it, one file for each database, so you can read what will run. A script replaces
only the names that differ: `public.` with the schema of the CRM's tables, and `"leads"` and, in 0001, `"users"` with
the CRM's own names for these tables.

The scripts import neither close_engine nor each other. Once released, they do not change.
"""
