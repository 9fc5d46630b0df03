"""The exceptions that loadgen raises for its user, all under `LoadgenError`. Each ends a run.

A request that fails raises none of them: it is recorded as a `records.Failure`.

    LoadgenError
    +-- ConfigError   an option, a URL or an output path that cannot work
    +-- ServerError   the server cannot be reached, lacks the model, or has ended though it was
    |   |             started here
    |   +-- RefusedError   it refuses every request
    +-- WorkerError   a client process died or stopped answering
"""


class LoadgenError(Exception):
    """Base class of everything that loadgen raises for its user. The text is one line, followed,
    for a server that was started here, by the end of its log."""


class ConfigError(LoadgenError):
    """An option, a URL or an output path that cannot work."""


class ServerError(LoadgenError):
    """The server cannot be reached, lacks the model, or has ended."""


class RefusedError(ServerError):
    """The server refuses every request; it may take others."""


class WorkerError(LoadgenError):
    """A client process died or stopped answering."""
