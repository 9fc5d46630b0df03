"""The class that implements each architecture.

Knows names only.
"""

from __future__ import annotations

from minisrv.errors import UnknownArchitectureError
from minisrv.model_config import ARCHITECTURES, ModelConfig
from minisrv.nn.decoder import Decoder

_CLASSES: dict[str, type[Decoder]] = dict.fromkeys(ARCHITECTURES, Decoder)


def model_class(config: ModelConfig) -> type[Decoder]:
    """Return the class for `config.architecture`. Raises UnknownArchitectureError."""
    try:
        return _CLASSES[config.architecture]
    except KeyError:
        raise UnknownArchitectureError(
            f"architecture {config.architecture!r} is not implemented; "
            f"implemented are: {', '.join(sorted(_CLASSES))}."
        ) from None
