"""A stand-in for Claude: a loopback server that answers Anthropic's own SDK as a function of yours says.

def brain(request):
    return [calls("reply", text="Hello! What does your business do?")]

with AnthropicStandIn(brain) as claude:
    drafter = ClaudeDrafter(claude.client(), persona="You are Mia.")
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import anthropic

from close_engine.testing.stand_ins import Call, Reply, StandIn

__all__ = ["AnthropicStandIn", "Brain", "ModelError", "calls", "says"]

Brain = Callable[[dict[str, Any]], Sequence[Mapping[str, Any]]]
"""A function of the request's JSON that returns the content of the answer: see `calls` and `says`."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class ModelError(Exception):
    """Raise it in a brain to answer with an error.

    Attributes:
        status: int, the HTTP status.
        retry_after: str, the header Retry-After; None for none.
    """

    def __init__(self, status: int, retry_after: str | None = None) -> None:
        self.status = status
        self.retry_after = retry_after
        super().__init__(f"the model answers {status}")


def says(text: str) -> dict[str, Any]:
    """Return a block of text."""
    return {"type": "text", "text": text}


def calls(name: str, /, **arguments: Any) -> dict[str, Any]:
    """Return a block that calls a tool. The stand-in gives it an id."""
    return {"type": "tool_use", "name": name, "input": arguments}


class AnthropicStandIn(StandIn):
    """Answer `POST /v1/messages` as a function says. Use it as a context manager.

    It refuses what the real one would: no key, a first turn that is not the user's, a tool call without its result, a
    turn of the model's that ends with a thought, a question's id with a space. A token is four characters.

    Args:
        brain: the function. An exception of it other than `ModelError` is answered with 500.

    Attributes:
        requests: list of dict, what it was asked, in order.
        tokens: int, how many tokens it has counted.
    """

    def __init__(self, brain: Brain) -> None:
        super().__init__()
        self.brain = brain
        self.requests: list[dict[str, Any]] = []
        self.tokens = 0
        self._ids = itertools.count(1)
        self._clients: list[anthropic.Anthropic] = []

    def client(self) -> anthropic.Anthropic:
        """Return a client of the real SDK that asks this stand-in. It is closed when the stand-in stops."""
        client = anthropic.Anthropic(base_url=self.url, api_key="a key that no server knows")
        self._clients.append(client)
        return client

    def stop(self) -> None:
        """Stop listening, and close the clients."""
        for client in self._clients:
            client.close()
        super().stop()

    def answer(self, call: Call) -> Reply:
        """Answer a request, or refuse it as the real one would."""
        if (call.method, call.path) != ("POST", "/v1/messages"):
            return _error(404, f"there is no {call.method} {call.path}")
        if not call.headers.keys() & {"x-api-key", "authorization"}:
            return _error(401, "there is no key")
        request = json.loads(call.body)
        if problem := _problem(request):
            return _error(400, problem)
        with self.lock:
            self.requests.append(request)
        try:
            content = [dict(block) for block in self.brain(request)]
        except ModelError as error:
            return _error(error.status, str(error), error.retry_after)
        except Exception as error:
            return _error(500, f"the brain failed: {type(error).__name__}: {error}")
        return self._message(request, call.body, content)

    def _message(self, request: Mapping[str, Any], body: bytes, content: list[dict[str, Any]]) -> Reply:
        with self.lock:
            number = next(self._ids)
            for block in content:
                if block["type"] == "tool_use":
                    block.setdefault("id", f"toolu_{next(self._ids):06}")
            answer = json.dumps(content)
            asked, answered = len(body) // 4 + 1, len(answer) // 4 + 1
            self.tokens += asked + answered
        uses_tools = any(block["type"] == "tool_use" for block in content)
        too_long = answered > request["max_tokens"]
        message = {
            "id": f"msg_{number:06}",
            "type": "message",
            "role": "assistant",
            "model": request["model"],
            "content": content,
            "stop_reason": "max_tokens" if too_long else "tool_use" if uses_tools else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": asked, "output_tokens": answered},
        }
        return Reply(200, json.dumps(message).encode())


def _problem(request: Mapping[str, Any]) -> str | None:
    """Return what the real server would not accept."""
    messages = request.get("messages") or []
    for name in ("model", "max_tokens", "messages"):
        if not request.get(name):
            return f"{name}: field required"
    for tool in request.get("tools", ()):
        if wrong := next((name for name in _names(tool.get("input_schema", {})) if not _NAME.fullmatch(name)), None):
            return f"tools: property keys should match pattern '{_NAME.pattern}', and {wrong!r} does not"
    if messages[0]["role"] != "user" or messages[-1]["role"] != "user":
        return "messages: the first and the last must use the user role"
    open_calls: set[str] = set()
    for message in messages:
        blocks = message["content"] if isinstance(message["content"], list) else [says(message["content"])]
        if not blocks or any(block["type"] == "text" and not block["text"].strip() for block in blocks):
            return "messages: text content blocks must be non-empty"
        if message["role"] == "assistant" and blocks[-1]["type"] in ("thinking", "redacted_thinking"):
            return "messages: the final block in an assistant message cannot be `thinking`"
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        if results != open_calls:
            return "messages: each tool_use block must have a tool_result block in the next message, and no other"
        open_calls = {block["id"] for block in blocks if block["type"] == "tool_use"}
    return None


def _names(schema: Mapping[str, Any]) -> Iterator[str]:
    """Return the names of all properties of a schema."""
    for name, inner in schema.get("properties", {}).items():
        yield name
        yield from _names(inner)


def _error(status: int, text: str, retry_after: str | None = None) -> Reply:
    kind = _KINDS.get(status, "api_error")
    body = json.dumps({"type": "error", "error": {"type": kind, "message": text}})
    return Reply(status, body.encode(), {} if retry_after is None else {"Retry-After": retry_after})
