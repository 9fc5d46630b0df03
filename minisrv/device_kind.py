"""The kinds of devices, and the settings as each of them resolves them.

Knows: which defaults a kind of device has, and which settings it cannot serve. Knows nothing of
torch, nor of the devices that this machine has (`engine.platforms`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from minisrv.config import QUANTIZATIONS, EngineConfig
from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode


@dataclass(frozen=True)
class ResolvedConfig(EngineConfig):
    """The settings with which an engine serves. Every default that depends on the kind of device
    has been replaced by a value.

    cudagraph_mode: which batches run as which graphs; NONE with `enforce_eager`.
    async_scheduling: whether a step is scheduled before the tokens of the previous one are known.
    """

    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.NONE
    async_scheduling: bool = False

    @property
    def kind(self) -> DeviceKind:
        """The kind of the device."""
        return _KINDS[self.device]


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    name: its name in the settings and in torch.
    cudagraph_mode: the default mode.
    async_scheduling: whether steps are scheduled ahead by default.
    captures_mixed: whether a graph may contain the attention of mixed batches, which requires
        attention kernels that read no lengths on the host.
    has_clock: whether the device measures the time of its own work, apart from the host's.
    chooses_tiles: whether `kernels.tiles` chooses the kernels of the projections.
    quantizations: the quantizations of weights that its kernels can multiply by.
    """

    name: str
    cudagraph_mode: CUDAGraphMode
    async_scheduling: bool
    captures_mixed: bool
    has_clock: bool
    chooses_tiles: bool
    quantizations: tuple[str, ...] = ()

    def resolve(self, config: EngineConfig) -> ResolvedConfig:
        """Return the settings with which an engine on such a device serves. Resolving them again
        changes nothing.

        Raises ConfigError for settings that this kind of device cannot serve.
        """
        mode = self.cudagraph_mode if config.cudagraph_mode is None else config.cudagraph_mode
        ahead = config.async_scheduling
        if config.enforce_eager:
            mode = CUDAGraphMode.NONE
        if mode is CUDAGraphMode.FULL and not self.captures_mixed:
            raise ConfigError(
                "cudagraph_mode=full captures mixed batches in one graph, and on "
                f"device={self.name} the attention kernels take the lengths of a mixed batch from "
                "the host; use full-and-piecewise (the default here) or full-decode-only, or a GPU."
            )
        if config.quantization is not None and config.quantization not in self.quantizations:
            raise ConfigError(
                f"quantization={config.quantization} is for CPUs; leave it out, or use --device "
                "cpu."
            )
        settings = {field.name: getattr(config, field.name) for field in fields(EngineConfig)}
        settings |= {
            "device": self.name,
            "cudagraph_mode": mode,
            "async_scheduling": self.async_scheduling if ahead is None else ahead,
        }
        return ResolvedConfig(**settings)


CPU = DeviceKind(
    "cpu",
    CUDAGraphMode.FULL_AND_PIECEWISE,
    async_scheduling=False,
    captures_mixed=False,
    has_clock=False,
    chooses_tiles=False,
    quantizations=QUANTIZATIONS,
)
CUDA = DeviceKind(
    "cuda",
    CUDAGraphMode.FULL,
    async_scheduling=True,
    captures_mixed=True,
    has_clock=True,
    chooses_tiles=True,
)
_KINDS = {kind.name: kind for kind in (CPU, CUDA)}


def expected_kind(config: EngineConfig) -> DeviceKind:
    """Return the kind of device on which an engine will probably serve, for those who cannot look
    at the machine's devices because they do without torch. For the device "auto" it is the CPU,
    unless only a GPU can serve the mode."""
    needs_gpu = config.cudagraph_mode is CUDAGraphMode.FULL and config.quantization is None
    return _KINDS.get(config.device, CUDA if needs_gpu else CPU)
