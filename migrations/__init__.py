"""The migrations, for `close_engine.migrate()`, and as they are for plain `pwmigrate`.

They never import close_engine, and are frozen once released.
"""
