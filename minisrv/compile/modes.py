"""The modes of compilation.

Knows: their names and numbers, which are vLLM's but for the last name. Knows nothing of torch, nor
which mode a device serves (`device_kind`).
"""

from __future__ import annotations

import enum

from minisrv.errors import ConfigError

_VLLM_NAME = "VLLM_COMPILE"
"""vLLM's name of the last mode, which compiles by the server's own backend in both servers."""

MIN_TOKENS = 3
"""Minimum number of tokens in a step of a model that is compiled as a whole: a trace of 1 token, or
of as many as there are buffers for, holds for that number only."""


class CompilationMode(enum.IntEnum):
    """How the code of a model is compiled before it serves."""

    NONE = 0
    """The code runs as it is written."""
    STOCK_TORCH_COMPILE = 1
    """The whole model by `torch.compile(dynamic=True)`: its guards are checked at each step, and a
    step for which they fail compiles the model once more."""
    DYNAMO_TRACE_ONCE = 2
    """The whole model, traced once, without guards: nothing is compiled again."""
    MINISRV_COMPILE = 3
    """The model is traced once, split at attention, and compiled in pieces by a process of its
    own, so that the artifacts can be kept."""

    @classmethod
    def parse(cls, value: str | int) -> CompilationMode:
        """Return the mode of a number or of a name, in any case, also with hyphens. VLLM_COMPILE
        is MINISRV_COMPILE.

        Raises ConfigError if there is no such mode.
        """
        text = str(value).strip().upper().replace("-", "_")
        if text == _VLLM_NAME:
            return cls.MINISRV_COMPILE
        for mode in cls:
            if text in (mode.name, str(mode.value)):
                return mode
        allowed = ", ".join(f"{mode.value} ({mode.name})" for mode in cls)
        raise ConfigError(f"compilation_mode={value!r} is none of: {allowed}.")

    @property
    def whole(self) -> bool:
        """Whether the model is compiled as a whole, in the engine's process, before it is ready."""
        return self in (self.STOCK_TORCH_COMPILE, self.DYNAMO_TRACE_ONCE)
