"""Where there is no C compiler, torch's operations are used: they are certified like any other
kernels and give the same tokens."""

from __future__ import annotations

import sys

from minisrv import LLM, SamplingParams
from minisrv.kernels import attention, elementwise
from tests.checkpoints import make_checkpoint

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 128, "block_size": 4}


def test_the_same_tokens(tmp_path, monkeypatch):
    checkpoint = str(make_checkpoint(tmp_path, "qwen3", head_dim=16))
    prompts = [[3 * i + n for i in range(5 + 6 * n)] for n in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
    answers = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(elementwise, "_compiled", lambda *_: None)
            monkeypatch.setattr(sys.modules[attention.__module__], "_compiled", lambda *_: None)
        llm = LLM(checkpoint, dtype="float32", **LIMITS)
        outputs = [request.outputs[0] for request in llm.generate(prompts, params)]
        answers.append([output.token_ids for output in outputs])
        assert outputs[0].graph_steps["FULL/pure_decode"] > 5
    assert answers[0] == answers[1]
