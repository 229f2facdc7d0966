"""Providers, each in a file that imports its SDK: nothing else imports these files.

`close_engine.integrations.twilio` sends and receives texts, `close_engine.integrations.stripe` takes payments, and
`close_engine.integrations.anthropic` drafts replies. Each is an extra of the same name.
"""
