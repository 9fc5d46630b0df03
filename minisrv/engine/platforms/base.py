"""What an engine asks of the device that it runs on.

Knows: the questions. Knows nothing of the answers, which `cpu` and `cuda` have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from minisrv.config import EngineConfig
from minisrv.engine.memory import KVCacheShape, MemoryPlan, mebibytes
from minisrv.errors import ConfigError
from minisrv.graph.backend import GraphBackend
from minisrv.model_config import ModelConfig
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.model_runner import ModelRunner

Progress = Callable[[str, int, int], None]
"""Called with a phase of the start-up, how much of it is done, and of how much."""


class Platform(ABC):
    """One kind of device, and the one of it that an engine has.

    default_lag: steps that are launched ahead of the one whose tokens are read, unless
        `async_scheduling` says otherwise.
    times_graphs: whether graphs are timed at the start, and a batch runs by the one that took the
        least time.
    """

    default_lag: int
    times_graphs: bool

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def make_backend(self) -> GraphBackend:
        """What records and replays graphs."""

    @abstractmethod
    def prepare_kernels(self, progress: Progress) -> bool:
        """Whether kernels were made ready before weights are loaded; False where each is compiled
        when it first runs."""

    @abstractmethod
    def choose_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        """What `--dtype auto` serves a checkpoint of that dtype in, and why, for the log."""

    # ---- memory ------------------------------------------------------------------------------

    @abstractmethod
    def available_bytes(self, config: EngineConfig) -> int:
        """Memory that weights and KV cache may take together, before either is there."""

    @abstractmethod
    def cache_share(self, available: int) -> int:
        """What of `available` bytes, which the weights leave, the KV cache may take."""

    def weight_bytes(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that the weights will take."""
        return model.num_parameters * self.weight_itemsize(config, dtype)

    def weight_itemsize(self, config: EngineConfig, dtype: torch.dtype) -> int:
        """Bytes of a parameter."""
        return 1 if config.quantization == "int8" else dtype.itemsize

    def cache_before_loading(
        self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype
    ) -> int:
        """Bytes that the KV cache may take at most, as far as can be known before weights are read.

        Raises ConfigError where the weights alone do not fit.
        """
        if config.kv_cache_memory is not None:
            return config.kv_cache_memory
        weights, available = self.weight_bytes(config, model, dtype), self.available_bytes(config)
        if weights >= available:
            raise ConfigError(
                f"the weights take {mebibytes(weights)}, and {mebibytes(max(0, available))} of "
                f"memory are to be had on {self.device}; serve a smaller model or dtype, or end "
                "what else uses it."
            )
        return self.cache_share(available - weights)

    @abstractmethod
    def check_sizes(
        self,
        config: EngineConfig,
        model: ModelConfig,
        dtype: torch.dtype,
        sizes: BufferSizes,
        num_blocks: int,
    ) -> None:
        """Raise ConfigError where what the settings ask for cannot be had on this machine, before
        any of it is allocated.

        num_blocks: of the KV cache.
        """

    @abstractmethod
    def plan_memory(
        self,
        config: EngineConfig,
        shape: KVCacheShape,
        make_runner: Callable[[int], ModelRunner],
        before_loading: int,
    ) -> MemoryPlan:
        """How large the KV cache may be, now that the weights are loaded.

        make_runner: makes a runner on the loaded model for so many blocks.
        before_loading: what `cache_before_loading` said.
        """

    @abstractmethod
    def check_plan(
        self, config: EngineConfig, plan: MemoryPlan, shape: KVCacheShape, runner: ModelRunner
    ) -> None:
        """Raise ConfigError if more memory is used than may be. Comes when graphs are captured."""
