"""The database: what the models are bound to, and one file for each kind, with what is different there."""
