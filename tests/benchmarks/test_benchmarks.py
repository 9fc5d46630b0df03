"""The programs in benchmarks/: both sides of a comparison do the same work."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import (
    in_process,
    make_dummy,
    make_llama_15m,
    mixed_load,
    step_trace,
    transformers_generate,
    wire,
)
from minisrv.cli import engine_config
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.text.tiny_tokenizer import tokenizer_of


def test_the_15m_llama_is_what_it_says_and_loads(tmp_path):
    model = make_llama_15m.make(tmp_path)
    assert sum(weight.numel() for weight in model.parameters()) == 15_735_168
    prompt = tokenizer_of(tmp_path).encode("Once upon a time")
    engine = EngineCore(
        build_engine(EngineConfig(model=str(tmp_path), enforce_eager=True, max_num_seqs=1))
    )
    params = SamplingParams(max_tokens=1, temperature=0.0)
    engine.add(EngineRequest(request_id="a", prompt_token_ids=prompt, params=params))
    [output] = engine.step()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    assert output.token_ids == [int(logits.argmax())]
    assert 0.5 < float(logits.std()) < 2, "logits are as wide as a trained model's might be"


def test_a_dummy_has_text_for_every_token(tmp_path):
    checkpoint, dummy = make_checkpoint(tmp_path / "model", "qwen3"), tmp_path / "dummy"
    size = make_dummy.make(checkpoint, dummy)
    tokenizer = tokenizer_of(dummy)
    texts = [tokenizer.decode([token]) for token in range(size)]
    assert "" not in texts
    assert len(set(texts[256:])) == size - 256
    assert tokenizer.decode(tokenizer.encode("été, 1 2")) == "été, 1 2"
    engine = EngineCore(
        build_engine(EngineConfig(model=str(dummy), load_format="dummy", enforce_eager=True))
    )
    assert engine.info.vocab_size == size


def test_the_step_trace_is_measured_on_and_off(tmp_path, monkeypatch):
    checkpoint, out = make_checkpoint(tmp_path / "model", "qwen3"), tmp_path / "out.json"
    arguments = ["--model", str(checkpoint), "--streams", "2", "--rounds", "2", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["it.py", *arguments, "--engine-flags", "--device cpu"])
    step_trace.main()
    report = json.loads(out.read_text())
    assert (len(report["on_us"]), len(report["off_us"])) == (2, 2)
    assert report["answer_us"] > 0


@pytest.mark.parametrize("flags", ["", "--enforce-eager --simulate-launch-us 1"])
def test_both_sides_generate_the_same_tokens(tmp_path, monkeypatch, capsys, flags):
    checkpoint = make_checkpoint(tmp_path / "model", "llama")
    out = tmp_path / "out.json"
    size = ["--batch", "1,3", "--context", "9", "--tokens", "5", "--rounds", "2"]
    files = [str(checkpoint), "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["it.py", *files, *size, "--engine-flags", flags])
    threads = torch.get_num_threads()
    try:
        transformers_generate.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text())
    assert [result["batch"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        assert result["same_tokens"] == 1.0
        assert [len(times) for times in result["blocks_ms"].values()] == [4, 4]
    assert report["environment"]["versions"]["transformers"]
    assert report["engine"]["ladder"]["graphs"] == (0 if flags else 18)
    assert report["simulated_launch_us"] == bool(flags)
    assert ("SIMULATED" in capsys.readouterr().out) == bool(flags)


def test_engine_flags_are_those_of_serve():
    config = engine_config(["model", "--max-num-seqs", "3", "--cudagraph-mode", "piecewise"])
    assert config == EngineConfig(
        model="model", max_num_seqs=3, cudagraph_mode=CUDAGraphMode.PIECEWISE
    )
    with pytest.raises(SystemExit):
        engine_config(["--port", "1"])


def test_streams_decode_while_prompts_arrive_in_chunks(tmp_path, capsys):
    """Every step beside a prompt is mixed and runs in the mode that was asked for, and all runs are
    in the plot."""
    model = make_checkpoint(tmp_path / "model", "qwen3")
    load = ["--chunks", "16,32", "--streams", "2", "--prompts", "3", "--prompt-tokens", "60"]
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    mixed_load.main([str(model), *load, "--json", str(out), "--plot", str(plot)])
    runs = json.loads(out.read_text())["runs"]
    assert [(run["mode"], run["chunk"]) for run in runs] == [
        ("PIECEWISE", 16), ("eager", 16), ("PIECEWISE", 32), ("eager", 32)
    ]  # fmt: skip
    for run in runs:
        steps = -(-60 // (run["chunk"] - 2)) * 3
        name = {"PIECEWISE": "PIECEWISE/has_prefill", "eager": "NONE/no_mixed_graph"}[run["mode"]]
        assert {key: count for key, count in run["steps"].items() if count} == {name: steps}
    assert "PIECEWISE" in plot.read_text()
    assert "tok/s" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "more"), [("/v1/completions", 0), ("/v1/chat/completions", 2)])
def test_every_token_of_the_script_goes_over_the_wire(tmp_path, capsys, path, more):
    """Every token comes in an event of its own; for a chat the role and the end come in one more
    each."""
    load = ["--streams", "5", "--tokens", "7", "--steps-per-s", "300", "--rounds", "2"]
    out = tmp_path / "out.json"
    wire.main(["--api-workers", "1,2", "--path", path, *load, "--json", str(out)])
    report = json.loads(out.read_text())
    assert [run["api_workers"] for run in report["runs"]] == [1, 2]
    for run in report["runs"]:
        assert [each["events"] for each in run["rounds"]] == [5 * (7 + more)] * 2
        assert run["us_per_token"] > 0
    assert report["codec"]["bytes"] > 256
    assert "CPU us/token" in capsys.readouterr().out


def test_the_closed_loop_in_process_computes_every_prompt_and_token(tmp_path, capsys):
    checkpoint, out = make_checkpoint(tmp_path / "model", "llama"), tmp_path / "out.json"
    load = ["--concurrency", "1,3", "--requests", "7", "--input-tokens", "40"]
    in_process.main([str(checkpoint), *load, "--output-tokens", "5", "--json", str(out)])
    runs = json.loads(out.read_text())["runs"]
    assert [(run["concurrency"], run["requests"]) for run in runs] == [(1, 7), (3, 7)]
    assert all(run["tokens_per_s"] * run["seconds"] == pytest.approx(35) for run in runs)
    assert [run["cached_tokens"] for run in runs] == [0, 0]
    assert "GPU idle" in capsys.readouterr().out
