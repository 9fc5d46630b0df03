"""The exceptions a user of loadgen can meet, all under `LoadgenError`.

A request that fails is not an exception: it is measured, as a `records.Failure`. These end a run.

    LoadgenError
    +-- ConfigError   an option, a URL or an output path that cannot work
    +-- ServerError   the server cannot be reached, lacks the model, refuses every request, or has
    |                 ended though it was started here
    +-- WorkerError   a client process died or stopped answering
"""


class LoadgenError(Exception):
    """Base of everything loadgen raises for its user; the text is one clear line, and behind it
    the end of the log of a server that was started here."""


class ConfigError(LoadgenError):
    """An option, a URL or an output path that cannot work."""


class ServerError(LoadgenError):
    """The server cannot be reached, lacks the model, refuses every request, or has ended."""


class WorkerError(LoadgenError):
    """A client process died or stopped answering."""
