"""Which class implements an architecture. Knows names only."""

from __future__ import annotations

from minisrv.errors import UnknownArchitectureError
from minisrv.model_config import ARCHITECTURES, ModelConfig
from minisrv.nn.decoder import Decoder

_CLASSES: dict[str, type[Decoder]] = dict.fromkeys(ARCHITECTURES, Decoder)


def model_class(config: ModelConfig) -> type[Decoder]:
    """The class for `config.architecture`. Raises UnknownArchitectureError."""
    try:
        return _CLASSES[config.architecture]
    except KeyError:
        raise UnknownArchitectureError(
            f"architecture {config.architecture!r} is not implemented; "
            f"implemented are: {', '.join(sorted(_CLASSES))}."
        ) from None
