"""Your own functions, called when a conversation leaves or enters a stage.

>>> from close_engine import Stage, on_enter
>>> @on_enter(Stage.BUILDING)
... def order_site(conversation, change):
...     '''Runs in the transaction of the stage change: if it raises, the change never happened.'''
>>> order_site.remove()

Hooks are registered per process, like Peewee's signals: register them where your worker starts. They do not see what
other processes, the CRM's screen and the database's triggers do: for what must always follow, `subscribe`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import TYPE_CHECKING, Any

from close_engine.machine import Transition
from close_engine.stages import Stage

if TYPE_CHECKING:
    from close_engine.conversations import CloseEngineConversation
    from close_engine.models import StageChange

__all__ = ["Hook", "after_commit", "crosses_a_hook", "has_entry_hook", "on_enter", "on_exit", "runs_in_transaction"]


class Hook:
    """A registered function: call it as before, or `remove()` it."""

    def __init__(self, registry: dict[Stage, list[Hook]], stages: tuple[Stage, ...], function: Callable[..., Any]):
        self._registry = registry
        self._stages = stages
        self.function = function
        update_wrapper(self, function)
        for stage in stages:
            registry.setdefault(stage, []).append(self)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def remove(self) -> None:
        """Stop running the function. Calling this again is harmless."""
        for stage in self._stages:
            left = [hook for hook in self._registry.pop(stage, ()) if hook is not self]
            if left:
                self._registry[stage] = left


_on_exit: dict[Stage, list[Hook]] = {}
_on_enter: dict[Stage, list[Hook]] = {}
_after_commit: dict[Stage, list[Hook]] = {}


def on_exit(*stages: Stage) -> Callable[[Callable[[CloseEngineConversation, Transition], object]], Hook]:
    """Run the function before a conversation leaves one of these stages, in the same transaction.

    It is called with the conversation and the Transition that is about to be made. If it raises, the stage stays. It
    does not see what other processes and the database's triggers do.

    Args:
        stages: at least one Stage.

    Returns:
        a decorator, which returns the registered function as a Hook.

    Raises:
        TypeError: no stage was named.
    """
    return _registrar(_on_exit, stages)


def on_enter(*stages: Stage) -> Callable[[Callable[[CloseEngineConversation, StageChange], object]], Hook]:
    """Run the function after a conversation has entered one of these stages, in the same transaction.

    It is called with the conversation and the StageChange just written. If it raises, the stage change is undone. It
    does not see what other processes and the database's triggers do: for what must always follow, `subscribe`.

    Args:
        stages: at least one Stage.

    Returns:
        a decorator, which returns the registered function as a Hook.

    Raises:
        TypeError: no stage was named.
    """
    return _registrar(_on_enter, stages)


def after_commit(*stages: Stage) -> Callable[[Callable[[CloseEngineConversation, StageChange], object]], Hook]:
    """Run the function once a change to one of these stages is committed, and never if it is rolled back.

    It is called with the conversation and the StageChange. A crash right after the commit loses the call: for work that
    must not be lost, `subscribe`. It does not see what other processes and the database's triggers do.

    Args:
        stages: at least one Stage.

    Returns:
        a decorator, which returns the registered function as a Hook.

    Raises:
        TypeError: no stage was named.
    """
    return _registrar(_after_commit, stages)


def runs_in_transaction(source: Stage | None, dests: tuple[Stage, ...]) -> bool:
    """Return whether a registered function runs in the transaction of such a change."""
    return bool(_on_exit or _on_enter) and (source in _on_exit or any(dest in _on_enter for dest in dests))


def has_entry_hook(dest: Stage) -> bool:
    """Return whether a registered function runs when this stage is entered."""
    return dest in _on_enter or dest in _after_commit


def crosses_a_hook(transition: Transition) -> bool:
    """Return whether a function is registered for a stage that this transition leaves or enters."""
    return any(source in _on_exit for source in transition.sources) or any(map(has_entry_hook, transition.dests))


def run_on_exit(conversation: CloseEngineConversation, transition: Transition) -> None:
    for hook in tuple(_on_exit.get(conversation.stage, ())):
        hook(conversation, transition)


def run_on_enter(conversation: CloseEngineConversation, change: StageChange) -> None:
    for hook in tuple(_on_enter.get(change.dest, ())):
        hook(conversation, change)


def committed_hooks(dest: Stage) -> tuple[Hook, ...]:
    return tuple(_after_commit.get(dest, ()))


def _registrar(registry: dict[Stage, list[Hook]], stages: tuple[Stage, ...]) -> Callable[[Callable[..., Any]], Hook]:
    if not stages:
        raise TypeError("name at least one stage, as in @on_enter(Stage.BUILDING)")
    known = tuple(dict.fromkeys(Stage(stage) for stage in stages))
    return lambda function: Hook(registry, known, function)
