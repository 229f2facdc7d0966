"""Senders for workers run from the command line, as `tests.senders:name`."""

from __future__ import annotations

import logging
import os
import signal
import threading

from close_engine import CannotBeSent, OutboxMessage


def send(message: OutboxMessage) -> str:
    return f"SM-{message.id}"


def refuse(message: OutboxMessage) -> str:
    raise CannotBeSent("no such\nnumber")


def stop_the_worker(message: OutboxMessage) -> str:
    """Sends the message, and tells its worker to stop meanwhile."""
    handler = signal.getsignal(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    while signal.getsignal(signal.SIGTERM) is handler:  # the main thread handles it
        threading.Event().wait(0.01)
    return f"SM-{message.id}"


def return_a_wrong_id(message: OutboxMessage) -> str:
    return "the same for all"


def never_end(message: OutboxMessage) -> str:
    """Prints when it starts and when its worker was told to stop, but never returns."""
    print("sending", flush=True)
    while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        threading.Event().wait(0.01)
    print("told to stop", flush=True)
    while True:
        threading.Event().wait()


def log_something(message: OutboxMessage) -> str:
    logging.getLogger("somebody").info("not asked for")
    return f"SM-{message.id}"


def fail(message: OutboxMessage) -> str:
    """Fails with words of the message, as a provider's client may."""
    raise RuntimeError(f"{message.topic}: {message.body} {message.payload}")
