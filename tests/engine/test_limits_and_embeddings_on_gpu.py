"""The default model on a GPU, with graphs and a step launched ahead: completions keep to
their limits on tokens, and embeddings have the direction of those of transformers in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minisrv.checkpoint import resolve_checkpoint
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest, Pooling, SamplingParams

pytestmark = pytest.mark.gpu

ALLOWED = tuple(range(300, 330))
BAD = ((301,), (302, 303), (304, 304, 304), (305, 306, 307, 308))
LENGTHS = (1, 20, 77, 150)


def prompt_of(length: int) -> list[int]:
    return [300 + (7 * i * i + length) % 900 for i in range(length)]


def test_limits_and_embeddings() -> None:
    config = EngineConfig(
        device="cuda",
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        async_scheduling=True,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
        num_kv_blocks=120,
    )
    engine = EngineCore(build_engine(config))
    for index in range(6):
        params = SamplingParams(
            max_tokens=60,
            seed=index,
            temperature=1.5,
            ignore_eos=True,
            allowed_token_ids=ALLOWED if index % 2 else (),
            bad_words_token_ids=BAD if index < 4 else (),
            logit_bias=dict.fromkeys(range(301, 309), 12.0),
        )
        engine.add(
            EngineRequest(request_id=f"{index}", prompt_token_ids=prompt_of(9), params=params)
        )
    for length in LENGTHS:
        for pooling in Pooling:
            params = SamplingParams(max_tokens=0, pooling=pooling)
            name, prompt = f"{pooling} {length}", prompt_of(length)
            engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    tokens: dict[str, list[int]] = {}
    sums: dict[str, np.ndarray] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.hidden_sum:
                found = np.frombuffer(output.hidden_sum, np.float32)
                sums[output.request_id] = sums.get(output.request_id, 0) + found
    for index in range(6):
        found = tuple(tokens[str(index)])
        assert len(found) == 60
        if index % 2:
            assert set(found) <= set(ALLOWED)
        held = any(found[i : i + len(word)] == word for word in BAD for i in range(60))
        assert held == (index >= 4), "the bias makes them likely where nothing rules them out"
    model = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(None), dtype=torch.float32)
    for name, found in sums.items():
        pooling, length = name.split()
        with torch.no_grad():
            states = model.model(torch.tensor([prompt_of(int(length))])).last_hidden_state[0]
        wanted = (states[-1] if pooling == "last" else states.sum(0)).numpy()
        cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
        assert cosine > 0.999, name
    assert len(sums) == 2 * len(LENGTHS)
