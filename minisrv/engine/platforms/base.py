"""The interface between an engine and the device that it runs on.

Knows: the questions that an engine asks. Knows nothing of the answers, which are in `cpu` and
`cuda`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from minisrv.arena import Arena
from minisrv.config import EngineConfig
from minisrv.device_kind import DeviceKind
from minisrv.engine.kernel_process import KernelProcess
from minisrv.engine.kernels import KernelJob
from minisrv.engine.memory import KVCacheShape, MemoryPlan, mebibytes
from minisrv.errors import ConfigError
from minisrv.graph.backend import GraphBackend
from minisrv.model_config import ModelConfig
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.model_runner import ModelRunner

Progress = Callable[[str, int, int], None]
"""Function that is called with a phase of the start-up, how much of it is done, and the total."""


class Platform(ABC):
    """One kind of device, and the device of this kind that an engine uses.

    kind: the kind of device.
    times_graphs: whether graphs are timed at start-up, so that a cheaper graph can replace the one
        that a batch would otherwise use.
    """

    kind: DeviceKind
    times_graphs: bool

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    @abstractmethod
    def device_name(self) -> str:
        """The name that its maker gives the device."""

    @abstractmethod
    def make_backend(self) -> GraphBackend:
        """Return the backend that records and replays graphs."""

    @abstractmethod
    def release(self) -> None:
        """Return memory that this process keeps, and nobody uses, to the device."""

    @abstractmethod
    def make_arena(self) -> Arena:
        """Return an arena for tensors on the device."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Return the number of bytes of the device's memory that are in use: by this process on a
        CPU, by any process on a GPU, which does not tell them apart."""

    @abstractmethod
    def compiled_kernels(
        self, job: KernelJob, progress: Progress, early: KernelProcess | None
    ) -> AbstractContextManager[None]:
        """Return the context behind which kernels are compiled: those of `job`, or all of the
        device. What can be done beside the block is done beside it.

        early: a process that was started before the job was known, if there is one.
        """

    @abstractmethod
    def choose_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        """Return the dtype in which `--dtype auto` serves a checkpoint of that dtype, and the
        reason, for the log."""

    # ---- memory ------------------------------------------------------------------------------

    @abstractmethod
    def available_bytes(self, config: EngineConfig) -> int:
        """Return the number of bytes that weights and KV cache may take together, before either is
        allocated."""

    @abstractmethod
    def cache_share(self, available: int) -> int:
        """Return how many of the `available` bytes, which the weights leave, the KV cache may
        take."""

    def weight_bytes(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        """Return the number of bytes that the weights will take. Quantization leaves the embedding
        and the experts of a mixture as they are."""
        kept = model.vocab_size * model.hidden_size + model.expert_parameters
        projections = model.num_parameters - kept
        return projections * self.weight_itemsize(config, dtype) + kept * dtype.itemsize

    def weight_itemsize(self, config: EngineConfig, dtype: torch.dtype) -> int:
        """Return the number of bytes of an element of a projection's weight."""
        return 1 if config.quantization == "int8" else dtype.itemsize

    def cache_before_loading(
        self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype
    ) -> int:
        """Return the maximum number of bytes that the KV cache may take, as far as it can be known
        before weights are read.

        Raises ConfigError if the weights alone do not fit.
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
        """Raise ConfigError if this machine cannot provide what the settings ask for, before any of
        it is allocated.

        num_blocks: the number of blocks in the KV cache.
        """

    @abstractmethod
    def plan_memory(
        self,
        config: EngineConfig,
        shape: KVCacheShape,
        make_runner: Callable[[int], ModelRunner],
        before_loading: int,
        generations: int,
        job: KernelJob,
    ) -> MemoryPlan:
        """Return how large the KV cache may be, now that the weights are loaded.

        make_runner: makes a runner with the loaded model and that many blocks.
        before_loading: the result of `cache_before_loading`.
        generations: the number of generations that exist at the same time, if there are several
            because code is compiled.
        job: what decides which kernels the engine launches.
        """

    @abstractmethod
    def check_plan(
        self, config: EngineConfig, plan: MemoryPlan, shape: KVCacheShape, runner: ModelRunner
    ) -> None:
        """Raise ConfigError if more memory is used than allowed. It is called when graphs have been
        captured and steps have run; a plan that has held until then serves the next start too."""

    @abstractmethod
    def has_room(self, config: EngineConfig, plan: MemoryPlan, nbytes: int) -> bool:
        """Whether one more graph may take that many bytes while the engine serves."""
