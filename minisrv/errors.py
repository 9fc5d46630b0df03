"""The one tree of exceptions, and the HTTP status and error body fields of each branch.

    MinisrvError
    |- ConfigError            a setting is wrong: the process exits 1 and prints the message
    |  |- CoverageError       the capture sizes leave a decode batch without a graph
    |  `- UnsupportedSettingError  the decoder in `nn` does not compute a model that is set so
    |- ModelError             a checkpoint cannot be served
    |  |- UnknownArchitectureError
    |  `- WeightsError        missing, unexpected or misshapen weights
    |- CompilationError       a model cannot be compiled, or what was compiled cannot be used
    |  `- CrashError          engines have ended while they tried what was compiled
    |- GraphError             a graph cannot be used
    |  |- GraphCaptureError   the captured code did something that a graph cannot record
    |  `- CertificationError  a captured graph differs from eager
    |- RequestError           the client is at fault; ends that request only
    |  |- ContextLengthError
    |  |- ModelNotFoundError
    |  |- ResponseNotFoundError
    |  |- PreviousResponseNotFoundError
    |  |- AuthenticationError
    |  |- TraceOffError       the server keeps no steps to be read
    |  |- MisdirectedError    it asks for a host that this server is not
    |  `- QueueFullError      not a fault of the request: try again later
    |     |- KeyLimitError    its API key has too many choices open
    |     `- GrammarBudgetError  its API key has had too many grammars compiled
    `- EngineError            the server is at fault; the client may retry
       |- DeadlineError       the request took longer than it may
       |- GrammarUnavailableError  it could not be found out whether its grammar compiles
       |- GrammarFullError    requests with the same grammar have used up the room for its states
       |- TraceFullError      too many clients read the trace of steps
       |- GraphQuarantinedError  a graph that it may have run by was found to be wrong
       |- BodiesFullError     too many large bodies arrive at the moment
       |- EngineNotReadyError loading or draining
       |- EngineAsleepError   asleep, or about to be
       |- SleepError          it cannot fall asleep, or not wake up
       `- EngineDeadError     the engine process is gone

Every message says what was wrong, what is allowed and, where there is a remedy, what to do.
Knows: HTTP status numbers and OpenAI's error `type` and `code` words. Knows nothing of FastAPI.
"""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Iterable
from typing import Any


class MinisrvError(Exception):
    """Base class of every exception that minisrv raises on purpose."""

    http_status = 500
    type = "internal_error"
    code: str | None = None
    retry_after: int | None = None
    """Seconds after which a client may send the same request again (the Retry-After header); None
    if nothing will have changed by then."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


def name_hint(name: str, allowed: Iterable[str]) -> str:
    """Return the hint for a name that does not exist: the allowed name that is most like it, or a
    list of all."""
    names = sorted(allowed)
    found = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {found[0]}?" if found else f"there are: {', '.join(names)}."


MAX_SHOWN = 128
"""Maximum number of characters that a message repeats of a text that somebody else has written."""


class _Repr(reprlib.Repr):
    """A `reprlib.Repr` that sorts no more keys of a dict than the few that it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = MAX_SHOWN

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        first = {name: value[name] for name in itertools.islice(value, self.maxdict)}
        text = super().repr_dict(first, level)
        return text if len(first) == len(value) or level <= 0 else f"{text[:-1]}, ...}}"


_repr = _Repr()


def shown(value: object) -> str:
    """Return the repr, for a message, of a value that somebody else has written: cut if it is long,
    and with the first parts only of a value that is deeply nested or holds much."""
    return truncated(_repr.repr(value), 2 * MAX_SHOWN)


def truncated(text: str, max_characters: int = MAX_SHOWN) -> str:
    """Return the beginning of a text that somebody else has written, for a message that repeats it
    without quotes. Characters that would steer a terminal are escaped; lines stay as they are.

    max_characters: the number of characters above which the text is cut.
    """
    rest = "..." if len(text) > max_characters else ""
    kept = text[:max_characters]
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in kept) + rest


class ConfigError(MinisrvError):
    """A setting, or a combination of settings, that cannot be served."""


class CoverageError(ConfigError):
    """The capture sizes leave some decode batch without a graph."""


class UnsupportedSettingError(ConfigError):
    """A setting of a checkpoint that changes the computation, and that the decoder in `nn` does not
    implement; transformers' code may."""


class ModelError(MinisrvError):
    """A checkpoint that cannot be loaded."""


class UnknownArchitectureError(ModelError):
    """The `architectures` of the checkpoint's config.json name none that is implemented."""


class WeightsError(ModelError):
    """A weight is missing, unexpected, or has another shape than the config says."""


class GraphError(MinisrvError):
    """A captured graph cannot be used."""


class GraphCaptureError(GraphError):
    """The code under capture did something that a graph cannot record."""


class CertificationError(GraphError):
    """A captured graph gave other results than the eager run of the same padded shape.

    difference: the largest absolute difference of a number that was found; 0 if something else was
        wrong.
    """

    def __init__(self, message: str, *, difference: float = 0.0) -> None:
        super().__init__(message)
        self.difference = difference


class CompilationError(MinisrvError):
    """A model's forward cannot be compiled, or what was compiled cannot be used."""


class CrashError(CompilationError):
    """Engines have ended while they tried what was compiled, so it is not tried again."""


class RequestError(MinisrvError):
    """The request is at fault; `param` names the field of its body."""

    http_status = 400
    type = "invalid_request_error"


class ContextLengthError(RequestError):
    """Prompt and completion together do not fit the model's context, or the whole KV cache."""

    code = "context_length_exceeded"


class ModelNotFoundError(RequestError):
    """The request names a model that is not served."""

    http_status = 404
    code = "model_not_found"


class TraceOffError(RequestError):
    """The server was started without a trace of its steps."""

    http_status = 404
    code = "step_trace_off"


class ResponseNotFoundError(RequestError):
    """The request asks for a response, or an item of one, that is not stored."""

    http_status = 404
    code = "response_not_found"


class PreviousResponseNotFoundError(RequestError):
    """The request carries on a response that is not stored."""

    code = "previous_response_not_found"


class AuthenticationError(RequestError):
    """The request has no API key, or none that is accepted."""

    http_status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class MisdirectedError(RequestError):
    """The request's Host header is not a name that the server answers to."""

    http_status = 421
    code = "host_not_allowed"


class QueueFullError(RequestError):
    """Too many requests are waiting."""

    http_status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after: int

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class KeyLimitError(QueueFullError):
    """With this request its API key would have more choices open than one key may have."""

    code = "concurrency_limit"


class GrammarBudgetError(QueueFullError):
    """The compilation of new grammars for the request's API key has taken all of the processor time
    that one key may use."""

    code = "grammar_limit"


class EngineError(MinisrvError):
    """The server failed; the request is not at fault."""

    http_status = 500


class DeadlineError(EngineError):
    """The request has not ended within the time that the server allows."""

    http_status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class GrammarUnavailableError(EngineError):
    """The process that tries to compile grammars has failed, or had no time for this one."""

    http_status = 503
    type = "service_unavailable"
    code = "grammar_not_tried"
    retry_after = 2


class GrammarFullError(EngineError):
    """The requests with one grammar have together used up the states that are kept of it."""

    http_status = 503
    type = "service_unavailable"
    code = "grammar_full"
    retry_after = 1


class TraceFullError(EngineError):
    """As many clients as may read the trace of steps at the same time do so."""

    http_status = 503
    type = "service_unavailable"
    code = "too_many_readers"
    retry_after = 5


class GraphQuarantinedError(EngineError):
    """A graph by which the request may have run, or which may have written to what it reads, has
    been found to be wrong and is out of service."""

    code = "graph_quarantined"
    retry_after = 1


class BodiesFullError(EngineError):
    """A request's body is large, and so many are being received that there is no room for it."""

    http_status = 503
    type = "service_unavailable"
    code = "too_many_bodies"
    retry_after = 2


class EngineNotReadyError(EngineError):
    """The engine is still loading, or is draining its open requests before it ends."""

    http_status = 503
    type = "service_unavailable"
    code = "not_ready"
    retry_after = 2


class EngineAsleepError(EngineError):
    """The engine sleeps, or is about to, and serves again when somebody wakes it up."""

    http_status = 503
    type = "service_unavailable"
    code = "asleep"
    retry_after = 5


class SleepError(EngineError):
    """The engine cannot fall asleep, or not wake up, because something is missing for it. It stays
    as it is."""

    http_status = 503
    type = "service_unavailable"
    code = "sleep_failed"


def asleep_error() -> EngineAsleepError:
    """Return the error for requests that an engine has or gets when it sleeps, or is about to."""
    return EngineAsleepError("The model has been put to sleep; send the request again later.")


def shutting_down_error() -> EngineNotReadyError:
    """Return the error for requests that are still open when a shutdown has no more time for
    them."""
    return EngineNotReadyError("The server is shutting down; send the request again later.")


class EngineDeadError(EngineError):
    """The engine process has ended; no request can be served until a restart."""

    http_status = 503
    type = "service_unavailable"
    code = "engine_dead"
