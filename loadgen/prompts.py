"""Makes the bodies of requests.

A body is a pure function of (config, level, phase, index): two runs with the same seed send the
same requests, whatever their order or the number of processes, and no two requests of a run share a
prompt, so that the server's prefix cache has no chance hits.

Knows: the JSON of /completions and /chat/completions. Knows nothing of how bodies are sent.
"""

import msgspec
import numpy as np

from loadgen.records import PromptKind, RunConfig

_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work night point "
    "home water room mother area money story fact month lot right study book eye job word business "
    "issue side kind head house service friend father power hour game line end member law car city"
)
_WORDS = _TEXT.split()


def endpoint(config: RunConfig) -> str:
    """Return the URL to which the bodies of `request_body` are sent."""
    chat = config.prompt_kind is PromptKind.CHAT
    return config.base_url + ("/chat/completions" if chat else "/completions")


def request_body(config: RunConfig, level: int, warmup: bool, index: int) -> bytes:
    """Return the JSON body of request `index` at the `level`-th concurrency.

    warmup: whether the request belongs to the warm-up, or else to the measurement.
    """
    rng = np.random.default_rng([config.seed, level, int(warmup), index])
    low, high = config.token_range if config.prompt_kind is PromptKind.TOKENS else (0, len(_WORDS))
    ids: list[int] = rng.integers(low, high, config.input_tokens).tolist()
    body: dict[str, object] = {
        "model": config.model,
        "max_tokens": config.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    if config.return_token_ids:
        body["return_token_ids"] = True
    if config.prompt_kind is PromptKind.TOKENS:
        body["prompt"] = ids
    else:
        text = " ".join(_WORDS[i] for i in ids)
        if config.prompt_kind is PromptKind.TEXT:
            body["prompt"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
    return msgspec.json.encode(body)
