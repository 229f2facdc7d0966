"""The command `close-engine`: one short function per command, in a file for each family of them. Nobody imports it."""

# Importing a family registers its commands; the help lists them in this order.
from close_engine.cli import schema, conversations, approvals, messages, board, demo  # noqa: F401, I001
from close_engine.cli.app import main

__all__ = ["main"]
