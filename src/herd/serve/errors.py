"""Errors as clients of OpenAI's API expect them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from herd.engine.backend import EngineClosed
from herd.errors import ContextLengthExceeded, HerdError, ResourceError, UsageError


class ApiError(HerdError):
    """A request that is not answered. `param` names the field at fault; `retry_after` says when to try again, in s."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        challenge: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.challenge = challenge

    @property
    def type(self) -> str:
        """The kind of error, in OpenAI's words."""
        return {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
            503: "overloaded_error",
        }.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field that cannot be used as it is."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


SHORTEN = "shorten the prompt"


def too_long(error: ContextLengthExceeded, param: str | None, advice: str = SHORTEN, parts: str = "") -> ApiError:
    """More tokens than the context has, for which the field `param` is to blame; `parts`: what they are for."""
    message = f"This model's context is {error.allowed_tokens} tokens; the request needs {error.needed}{parts}"
    return ApiError(400, f"{message}. {advice.capitalize()}.", param=param, code="context_length_exceeded")


def no_room(
    error: ContextLengthExceeded, max_tokens: int | None, *, prompt_in: str, limit_in: str, advice: str
) -> ApiError:
    """A prompt that leaves no room for an answer of `max_tokens`, which is the field `limit_in`, or else of one."""
    answer = max_tokens or 1
    prompt = error.needed - answer
    left = error.allowed_tokens - prompt
    parts = f", {prompt} of them for the prompt and {answer} for the answer"
    if left < 1:
        return too_long(error, prompt_in, advice, parts)
    lower = f"lower {limit_in} to {left} at most"
    if answer < error.allowed_tokens:
        lower += f", or {advice}"
    return too_long(error, limit_in, lower, parts)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about any error. What is inside an unexpected one stays in the server's log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineClosed):
        return ApiError(503, "the model is not loaded any more", code="unloaded", retry_after=1)
    if isinstance(error, ContextLengthExceeded):
        return too_long(error, None)
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, ResourceError):
        return ApiError(503, str(error), code="out_of_resources", retry_after=5)
    if isinstance(error, HerdError):
        return ApiError(500, str(error), code="model_error")
    return ApiError(500, "the server failed; its log says how", code="internal_error")


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON of an error, in a response as well as in a stream. Anthropic's clients look for its own type."""
    told = {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}
    return {"type": "error", **told} if path.startswith("/v1/messages") else told


def error_response(error: ApiError, path: str) -> Response:
    """The response that tells it to who asked for `path`."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if error.challenge is not None:
        headers["www-authenticate"] = error.challenge
    return Response(orjson.dumps(error_body(error, path)), error.status, headers, "application/json")
