"""Providers, each in a file that imports its SDK: nothing else imports these files.

`close_engine.integrations.twilio` sends and receives texts, `close_engine.integrations.stripe` takes payments, and
`close_engine.integrations.anthropic` drafts replies. `close_engine.integrations.celery` sends and sweeps where Celery
runs. Each is an extra of the same name.
"""
