"""The kinds of devices, and the settings as each of them resolves them.

Knows: which defaults a kind of device has, and which settings it cannot serve. Knows nothing of
torch, nor of the devices that this machine has (`engine.platforms`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from minisrv.compile.modes import MIN_TOKENS, CompilationMode
from minisrv.config import QUANTIZATIONS, EngineConfig
from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode


@dataclass(frozen=True)
class ResolvedConfig(EngineConfig):
    """The settings with which an engine serves. Every default that depends on the kind of device
    has been replaced by a value.

    cudagraph_mode: which batches run as which graphs; NONE with `enforce_eager`.
    compilation_mode: how the model is compiled; NONE with `enforce_eager`. None until the model is
        known, if it is left to that (`choose_compilation`).
    async_scheduling: whether a step is scheduled before the tokens of the previous one are known.
    max_num_batched_tokens: the maximum number of tokens in a step.
    itl_target_ms: the target for the time between two tokens; 0 for none. None until a decode step
        has been measured, if it follows from that.
    """

    max_num_batched_tokens: int = 512
    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.NONE
    async_scheduling: bool = False

    @property
    def kind(self) -> DeviceKind:
        """The kind of the device."""
        return KINDS[self.device]


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    name: its name in the settings and in torch.
    max_num_batched_tokens: the default maximum number of tokens in a step.
    max_default_mixed: the largest default capture size of the mixed ladder, in tokens. The time to
        capture and certify a graph grows with them.
    itl_target_ms: the default target for the time between two tokens; None if it follows from the
        measured time of a decode step.
    cudagraph_mode: the default mode.
    async_scheduling: whether steps are scheduled ahead by default.
    captures_mixed: whether a graph may contain the attention of mixed batches, which requires
        attention kernels that read no lengths on the host.
    has_clock: whether the device measures the time of its own work, apart from the host's.
    chooses_tiles: whether `kernels.tiles` chooses the kernels of the projections.
    captures_compiled: whether a graph may contain the kernels of code that is compiled as a whole,
        which requires a graph that is recorded below torch.
    long_context: a number of tokens behind which the attention of a chunk takes much of a step's
        time, and that are soon computed.
    quantizations: the quantizations of weights that its kernels can multiply by.
    """

    name: str
    max_num_batched_tokens: int
    max_default_mixed: int
    itl_target_ms: float | None
    cudagraph_mode: CUDAGraphMode
    async_scheduling: bool
    captures_mixed: bool
    has_clock: bool
    chooses_tiles: bool
    captures_compiled: bool
    long_context: int
    quantizations: tuple[str, ...] = ()

    def resolve(self, config: EngineConfig) -> ResolvedConfig:
        """Return the settings with which an engine on such a device serves. Resolving them again
        changes nothing.

        Raises ConfigError for settings that this kind of device cannot serve.
        """
        compilation, mode = self._modes(config)
        ahead, most = config.async_scheduling, config.max_num_batched_tokens
        most = self.max_num_batched_tokens if most is None else most
        target_ms = config.itl_target_ms
        if why := self.why_not(compilation or CompilationMode.NONE, mode):
            raise ConfigError(why)
        if compilation is not None and compilation.whole:
            _check_whole(config, most, compilation)
        if config.quantization is not None and config.quantization not in self.quantizations:
            raise ConfigError(
                f"quantization={config.quantization} is for CPUs; leave it out, or use --device "
                "cpu."
            )
        settings = {field.name: getattr(config, field.name) for field in fields(EngineConfig)}
        settings |= {
            "device": self.name,
            "max_num_batched_tokens": most,
            "itl_target_ms": self.itl_target_ms if target_ms is None else target_ms,
            "cudagraph_mode": mode,
            "compilation_mode": compilation,
            "async_scheduling": self.async_scheduling if ahead is None else ahead,
        }
        return ResolvedConfig(**settings)

    def _modes(self, config: EngineConfig) -> tuple[CompilationMode | None, CUDAGraphMode]:
        """Return the modes that settings ask for, or else those of their level, or else the
        defaults; the model decides about a compilation mode that is None."""
        if config.enforce_eager:
            return CompilationMode.NONE, CUDAGraphMode.NONE
        compilation, mode = config.compilation_mode, config.cudagraph_mode
        if config.optimization_level is not None:
            of_level = _LEVELS[config.optimization_level]
            compilation = of_level[0] if compilation is None else compilation
            mode = mode or of_level[1]
        if mode is None and compilation is not None and compilation.whole:
            mode = self.cudagraph_mode if self.captures_compiled else CUDAGraphMode.NONE
        return compilation, mode or self.cudagraph_mode

    def why_not(self, compilation: CompilationMode, mode: CUDAGraphMode) -> str | None:
        """Return why the two modes are not served together on this kind of device, and what to do,
        as a sentence; None if they are."""
        if mode is CUDAGraphMode.FULL and not self.captures_mixed:
            return (
                "cudagraph_mode=full captures mixed batches in one graph, and on "
                f"device={self.name} the attention kernels take the lengths of a mixed batch from "
                "the host; use full-and-piecewise (the default here) or full-decode-only, or a GPU."
            )
        if compilation.whole and mode is not CUDAGraphMode.NONE and not self.captures_compiled:
            return (
                f"compilation_mode={compilation.name} compiles the model as a whole, and a graph "
                f"on device={self.name} records torch's operations, so that it would not see the "
                "compiled ones; use cudagraph_mode=none with it, or another compilation_mode."
            )
        return None


CPU = DeviceKind(
    "cpu",
    512,
    2048,
    0.0,
    CUDAGraphMode.FULL_AND_PIECEWISE,
    async_scheduling=False,
    captures_mixed=False,
    has_clock=False,
    chooses_tiles=False,
    captures_compiled=False,
    long_context=2048,
    quantizations=QUANTIZATIONS,
)
CUDA = DeviceKind(
    "cuda",
    8192,
    8192,
    None,
    CUDAGraphMode.FULL,
    async_scheduling=True,
    captures_mixed=True,
    has_clock=True,
    chooses_tiles=True,
    captures_compiled=True,
    long_context=16384,
)
KINDS = {kind.name: kind for kind in (CPU, CUDA)}
"""Every kind of device by its name."""

_LEVELS: tuple[tuple[CompilationMode, CUDAGraphMode | None], ...] = (
    (CompilationMode.NONE, CUDAGraphMode.NONE),
    (CompilationMode.MINISRV_COMPILE, CUDAGraphMode.PIECEWISE),
    (CompilationMode.MINISRV_COMPILE, None),
    (CompilationMode.MINISRV_COMPILE, None),
)
"""The modes that each optimization level stands for, as in vLLM, where level 3 adds nothing to 2
either. None is the device's default."""


def expected_kind(config: EngineConfig) -> DeviceKind:
    """Return the kind of device on which an engine will probably serve, for those who cannot look
    at the machine's devices because they do without torch. For the device "auto" it is the CPU,
    unless only a GPU can serve the mode."""
    needs_gpu = config.cudagraph_mode is CUDAGraphMode.FULL and config.quantization is None
    return KINDS.get(config.device, CUDA if needs_gpu else CPU)


def choose_compilation(
    config: ResolvedConfig, implementation: str, *, missing: str | None
) -> tuple[CompilationMode, str]:
    """Return the compilation mode with which a model is served, and the reason, for the log.

    implementation: whose code computes the model, as in `ModelConfig`.
    missing: what the machine lacks to compile a model in pieces, in words (`machine`). A CPU needs
        it to compile a whole model too.

    Raises ConfigError if the mode that is asked for needs a compiler, and there is none.
    """
    mode = config.compilation_mode
    if config.enforce_eager:
        return CompilationMode.NONE, "enforce_eager"
    if mode is not None:
        if mode.whole and config.kind is CPU and missing:
            raise ConfigError(
                f"compilation_mode={mode.name} compiles C++ here, and there is no {missing}; "
                "install g++, name a compiler in CXX, or use compilation_mode=NONE."
            )
        return mode, "as asked for"
    if implementation != "transformers":
        return CompilationMode.NONE, "this code of minisrv's is fused by hand"
    if missing:
        return CompilationMode.NONE, f"there is no {missing}"
    return CompilationMode.MINISRV_COMPILE, "the default for transformers' code"


def _check_whole(config: EngineConfig, max_num_batched_tokens: int, mode: CompilationMode) -> None:
    """Raise ConfigError for settings with which no model can be compiled as a whole."""
    if max_num_batched_tokens < MIN_TOKENS:
        raise ConfigError(
            f"compilation_mode={mode.name} needs steps of {MIN_TOKENS} tokens; raise "
            f"max_num_batched_tokens={max_num_batched_tokens} to that."
        )
    if config.simulate_launch_us:
        raise ConfigError(
            f"simulate_launch_us adds to the time of torch's operations, and compilation_mode="
            f"{mode.name} leaves none to be seen; leave one of the two out."
        )
