"""Claude drafts: the drafter of `close_engine.drafting`, with Anthropic's own SDK.

    import anthropic

    drafter = ClaudeDrafter(anthropic.Anthropic(), persona="You are Mia, of …", questions=[Question(…)])
    Worker(drafter, topics=[DRAFT]).run()

It needs the extra `anthropic`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anthropic

from close_engine.conversations import CloseEngineConversation
from close_engine.drafting import Drafter, Limits, ModelReply, Question, Tool, ToolCall, Turn
from close_engine.errors import Snooze
from close_engine.integrations.retry_after import retry_after

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ClaudeDrafter"]

#: The model, unless you name another.
MODEL = "claude-sonnet-5-5"

#: When to ask again if Claude does not say.
LATER = timedelta(seconds=30)

#: The longest that Retry-After is believed.
LONGEST_WAIT = timedelta(days=1)

#: Answers that will be others later, besides those from 500 on: a timeout, a lock, and too many requests.
_LATER = (408, 409, 429)


class ClaudeDrafter(Drafter):
    """A drafter that asks Claude.

    Args:
        client: anthropic.Anthropic.
        model: str, the model's name.
        persona, questions, payment_link: as for `Drafter`.
        timeout: timedelta, how long to wait for one answer.
        max_output: int, the most tokens of one answer, with those that Claude thinks in.
        options: mapping of whatever else `messages.create()` is given, such as `thinking` or `output_config`.
        limits: the other arguments of `Drafter`.

    Raises:
        InvalidValue: as for `Drafter`.
    """

    def __init__(
        self,
        client: anthropic.Anthropic,
        *,
        persona: str,
        model: str = MODEL,
        questions: Sequence[Question] = (),
        payment_link: Callable[[CloseEngineConversation], str] | None = None,
        timeout: timedelta = timedelta(minutes=2),
        max_output: int = 8192,
        options: Mapping[str, Any] | None = None,
        **limits: Unpack[Limits],
    ) -> None:
        super().__init__(persona=persona, questions=questions, payment_link=payment_link, **limits)
        # The outbox tries again, and knows for how long. The SDK would keep the sender waiting meanwhile.
        self._client = client.with_options(max_retries=0, timeout=timeout.total_seconds())
        self.model = model
        self.max_output = max_output
        self.options = dict(options or {})

    def ask(self, system: str, turns: Sequence[Turn], tools: Sequence[Tool]) -> ModelReply:
        """Ask Claude once.

        Raises:
            Snooze: Claude cannot be reached, or wants to be asked later.
            anthropic.APIStatusError: Claude refuses the request.
        """
        request: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_output,
            # The same for every conversation, with the tools before it: the next one reads it from the cache.
            "system": [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}],
            "tools": [{"name": t.name, "description": t.description, "input_schema": t.schema} for t in tools],
            # Models that think refuse to be forced to a tool. Without one, the drafter asks again.
            "tool_choice": {"type": "auto"},
            "messages": [{"role": turn.role, "content": _content(turn)} for turn in turns],
        }
        try:
            answer: anthropic.types.Message = self._client.messages.create(**request, **self.options)
        except anthropic.APIConnectionError as error:
            raise Snooze(LATER) from error
        except anthropic.APIStatusError as error:
            if error.status_code in _LATER or error.status_code >= 500:
                raise Snooze(
                    retry_after(error.response.headers.get("retry-after"), most=LONGEST_WAIT) or LATER
                ) from error
            raise
        usage = answer.usage
        return ModelReply(
            calls=tuple(
                ToolCall(block.id, block.name, block.input) for block in answer.content if block.type == "tool_use"
            ),
            text="".join(block.text for block in answer.content if block.type == "text").strip(),
            tokens=usage.input_tokens
            + usage.output_tokens
            + (usage.cache_creation_input_tokens or 0)
            + (usage.cache_read_input_tokens or 0),
            is_cut_off=answer.stop_reason == "max_tokens",
            raw=_echo(answer),
        )


def _echo(answer: anthropic.types.Message) -> list[Any]:
    """Return an answer in the form in which Claude takes it back: it does not take everything that it gives."""
    blocks = [block.to_dict() for block in answer.content if block.type != "text" or block.text.strip()]
    while blocks and blocks[-1]["type"] in ("thinking", "redacted_thinking"):  # cut off, or nothing followed
        blocks.pop()
    whole = json.dumps(blocks, ensure_ascii=False).encode(errors="replace")  # half of a surrogate pair cannot be sent
    echo: list[Any] = json.loads(whole)
    return echo


def _content(turn: Turn) -> Any:
    """Return the content of a turn. Claude's own goes back as it came, with what it thought."""
    if turn.raw:
        return turn.raw
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": result.call_id, "content": result.text, "is_error": result.is_error}
        for result in turn.results
    ]
    return [*results, *([{"type": "text", "text": turn.text}] if turn.text else [])]
