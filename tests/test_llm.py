"""`LLM`, the engine in process: the behaviour that scripts rely on."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minisrv
from minisrv import LLM, SamplingParams, StructuredOutputsParams
from minisrv.config import EngineConfig
from minisrv.errors import ConfigError, ContextLengthError, EngineDeadError, RequestError
from minisrv.request import SEED_MAX, SEED_MIN, FinishReason
from tests.checkpoints import make_checkpoint

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128}
LIMITS["dtype"] = "float32"  # Half precision rounds differently in another batch.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def llm(checkpoint) -> LLM:
    return LLM(checkpoint, **LIMITS)


def greedy(**given) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **given})


def test_answers_come_in_the_order_of_the_prompts(llm):
    prompts = [[i + 3] * (i + 1) for i in range(11)]
    together = llm.generate(prompts, greedy())
    assert [output.prompt_token_ids for output in together] == prompts
    for prompt, output in zip(prompts, together, strict=True):
        [alone] = llm.generate(prompt, greedy())
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_one_prompt_may_stand_alone(llm):
    ids = llm._tokenizer.encode("hello")
    answers = [
        llm.generate(prompt, greedy())[0].outputs[0].text
        for prompt in ("hello", ["hello"], ids, tuple(ids), [ids], np.array(ids))
    ]
    assert len(set(answers)) == 1
    assert llm.generate([], greedy()) == []


def test_each_prompt_may_have_its_own_parameters(llm):
    outputs = llm.generate([[5], [6]], [greedy(max_tokens=2), greedy(max_tokens=5)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5]
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        llm.generate([[5], [6]], [greedy()])


@pytest.mark.parametrize("one", [True, False])
def test_a_stop_string_cuts_the_text_and_keeps_the_provenance(llm, one):
    whole = llm.generate([[9, 9]], greedy(max_tokens=30))[0].outputs[0]
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 2]
    cut = llm.generate([[9, 9]], greedy(max_tokens=30, stop=stop if one else (stop,)))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert sum(cut.graph_steps.values()) == len(cut.token_ids) < len(whole.token_ids)
    assert sum(whole.graph_steps.values()) == 30
    assert not llm.engine.has_work


def test_what_is_asked_of_a_stop_string(llm):
    whole = llm.generate([[9, 9]], greedy(max_tokens=30))[0].outputs[0]
    stop = whole.text[4:6]
    end = whole.text.index(stop) + 2

    def text(**given) -> str:
        return llm.generate([[9, 9]], greedy(max_tokens=30, stop=stop, **given))[0].outputs[0].text

    assert text(include_stop_str_in_output=True) == whole.text[:end]
    assert text(min_tokens=30) == whole.text


def test_a_prompt_can_be_scored_by_itself(llm):
    [output] = llm.generate([[4, 5, 6]], greedy(max_tokens=0, prompt_logprobs=1))
    assert output.prompt_logprobs[0] is None
    assert [entry.token_id for entry in output.prompt_logprobs[1:]] == [5, 6]
    assert output.outputs[0].token_ids == []
    assert output.outputs[0].finish_reason is FinishReason.LENGTH
    assert llm.generate([[4, 5, 6]], greedy())[0].prompt_logprobs is None


def test_logprobs_are_those_of_the_chosen_tokens(llm):
    completion = llm.generate([[4]], greedy(logprobs=3))[0].outputs[0]
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    for entry in completion.logprobs:
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert len(entry.top) == 3
    assert llm.generate([[4]], greedy())[0].outputs[0].logprobs is None
    plain = llm.generate([[4]], greedy(logprobs=0))[0].outputs[0]
    assert [entry.top for entry in plain.logprobs] == [[]] * 8


def test_chat_follows_the_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    [answer] = llm.chat(messages, greedy())
    assert answer.prompt_token_ids == llm._tokenizer.apply_chat_template(messages)
    assert len(llm.chat([messages, messages], greedy())) == 2


def test_a_bad_request_runs_none_of_its_batch(llm):
    before = llm.engine.stats().prompt_tokens
    for bad, error in (
        ([[]], RequestError),
        ([[10**6]], RequestError),
        ([[-1]], RequestError),
        ([[2**70]], RequestError),
        ([[1] * 200], ContextLengthError),
    ):
        with pytest.raises(error):
            llm.generate([[1], *bad], greedy())
    assert llm.engine.stats().prompt_tokens == before


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": -1},
        {"max_tokens": 2.5},
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"temperature": True},
        {"top_p": 0},
        {"top_k": -2},
        {"top_k": 1.0},
        {"min_p": 1.1},
        {"seed": 2**63},
        {"stop": ("",)},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": list(range(65))},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"n": 0},
        {"n": 1.0},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"logit_bias": [1]},
        {"ignore_eos": 1},
        {"structured_outputs": {"choice": ["a"]}},
        {"best_of": 2},
    ],
)
def test_parameters_out_of_bounds_are_named(field):
    [name] = field
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**field)
    assert caught.value.param == name


@pytest.mark.parametrize("amount", [101, "1", True, float("nan")])
def test_a_bias_out_of_bounds_names_its_token(amount):
    with pytest.raises(RequestError, match=r"logit_bias.7=.* a number in \[-100, 100\]") as caught:
        SamplingParams(logit_bias={5: 1, 7: amount})
    assert caught.value.param == "logit_bias.7"


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.usefixtures("raising_sigint")
def test_ctrl_c_ends_what_runs_between_two_steps(checkpoint, monkeypatch, presses):
    """torch makes a RuntimeError of a KeyboardInterrupt that is raised below it, as compiled code
    would meet it. Another Ctrl-C does not wait for the step."""
    llm = LLM(checkpoint, enforce_eager=True, **LIMITS)
    launch = llm.engine.runner.execute_model
    step_ended = []

    def pressed(*arguments):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        launch(*arguments)
        step_ended.append(True)

    monkeypatch.setattr(llm.engine.runner, "execute_model", pressed)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], greedy())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(llm.engine.runner, "execute_model", launch)
    assert len(step_ended) == 2 - presses
    assert not llm.engine.has_work
    if presses == 1:
        assert len(llm.generate([[1]], greedy())[0].outputs[0].token_ids) == 8


@pytest.mark.parametrize("part", ["execute_model", "sample_tokens"])
@pytest.mark.parametrize("steps_ahead", [False, True])
def test_an_interrupted_step_ends_the_engine_and_does_not_hang(
    checkpoint, steps_ahead, part, monkeypatch
):
    llm = LLM(checkpoint, enforce_eager=True, async_scheduling=steps_ahead, **LIMITS)
    launch, calls = getattr(llm.engine.runner, part), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return launch(*arguments)

    monkeypatch.setattr(llm.engine.runner, part, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], greedy())
    with pytest.raises(EngineDeadError, match="interrupted"):
        llm.generate([[1]], greedy())


def test_the_mode_may_be_given_as_text(checkpoint):
    llm = LLM(checkpoint, cudagraph_mode="FULL_DECODE_ONLY", **LIMITS)
    assert llm.engine.info.cudagraph_mode == "full-decode-only"
    with pytest.raises(ConfigError, match="full-and-piecewise"):
        LLM(checkpoint, cudagraph_mode="fast", **LIMITS)


# ---- options -------------------------------------------------------------------------------------


def test_options_are_the_engine_configs_fields():
    """LLM's options have the types and defaults of EngineConfig's fields. The test fails if a field
    is added to EngineConfig and not to LLM."""
    options = inspect.signature(LLM).parameters
    assert next(iter(options)) == "model"
    wider = {"cudagraph_mode": "CUDAGraphMode | str | None"}
    wider["cudagraph_capture_sizes"] = "Sequence[int] | None"
    wider["compilation_mode"] = "CompilationMode | str | int | None"
    wider["chat_template"] = "Path | str | None"
    for field in fields(EngineConfig):
        option = options[field.name]
        assert option.default == field.default, field.name
        assert option.annotation == wider.get(field.name, field.type), field.name
    assert [*options.values()][-1].kind is inspect.Parameter.VAR_KEYWORD
    assert len(options) == len(fields(EngineConfig)) + 1


def test_every_option_reaches_the_engine(monkeypatch):
    """Each option is given a value of its own that its type allows, and the engine's configuration
    must have it."""
    values: dict[str, Any] = {
        "str": "auto",
        "str | None": "a name",
        "Path | None": "a/file",
        "int": 64,
        "int | None": 65,
        "float": 0.5,
        "bool | None": False,
    }
    of_their_own: dict[str, Any] = {"quantization": "int8", "cudagraph_mode": "piecewise"}
    of_their_own |= {"compilation_mode": 1, "optimization_level": 3}
    of_their_own |= {"cudagraph_capture_sizes": [1, 64], "cudagraph_capture": "whole"}
    of_their_own |= {"cudagraph_refit": "propose"}
    configs = []

    def stop(config):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("minisrv.llm.open_checkpoint", stop)
    for field in fields(EngineConfig):
        value = not field.default if field.type == "bool" else values.get(field.type)
        value = of_their_own.get(field.name, value)
        with pytest.raises(KeyboardInterrupt):
            LLM(**{field.name: value})
        told = getattr(configs.pop(), field.name)
        if isinstance(value, str):
            told = getattr(told, "value", str(told))
        assert told == (tuple(value) if isinstance(value, list) else value), field.name


def test_an_option_that_does_not_exist_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no option max_num_seq; did you mean max_num_seqs\?"):
        LLM(max_num_seq=4)
    with pytest.raises(ConfigError, match="no option qqq; there are: async_scheduling, block"):
        LLM(qqq=4)
    with pytest.raises(ConfigError, match="max_num_seqs='4' .* an integer"):
        LLM(max_num_seqs="4")


def test_a_parameter_that_does_not_exist_names_the_nearest():
    with pytest.raises(RequestError, match=r"no max_token; did you mean max_tokens\?") as caught:
        SamplingParams(max_token=4)
    assert caught.value.param == "max_token"
    with pytest.raises(RequestError, match=r"no regexp; did you mean regex\?"):
        StructuredOutputsParams(regexp="a")


def test_parameters_that_are_none_are_not_given():
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()


def test_the_package_lists_what_it_has():
    assert set(minisrv.__all__) <= set(dir(minisrv))
    for name in minisrv.__all__:
        assert getattr(minisrv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = minisrv.LMM


# ---- prompts and what comes back -----------------------------------------------------------------


def test_prompts_may_be_dicts(llm):
    ids = llm._tokenizer.encode("hello")
    text, tokens = {"prompt": "hello"}, {"prompt_token_ids": ids}
    [expected] = llm.generate("hello", greedy())
    for prompts in (text, [text], [tokens], [{**tokens, "prompt": "named"}]):
        [output] = llm.generate(prompts, greedy())
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.finished
    [named, plain] = llm.generate([{**tokens, "prompt": "named"}, tokens], greedy())
    assert (named.prompt, plain.prompt, expected.prompt) == ("named", None, "hello")
    assert llm.generate(prompts=["hello"], sampling_params=greedy())[0].prompt == "hello"


def test_prompts_of_another_salt_share_no_cache(llm):
    ids = list(range(40, 75))
    found = [
        llm.generate({"prompt_token_ids": ids, "cache_salt": salt}, greedy())[0].num_cached_tokens
        for salt in ("a", "a", "b")
    ]
    assert found == [0, 32, 0]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "None is no prompt"),
        (5, "5 is no prompt"),
        ([None], r"prompts\[0\] must be text, token ids"),
        (["a", [1.5]], r"prompts\[1\] must be text, token ids"),
        (["\ud800"], r"prompts\[0\] must be valid Unicode"),
        ([{}], r"prompts\[0\] must be text, token ids"),
        ([{"prompt": 5}], "must be text"),
        ([{"prompt": "a", "multi_modal_data": {}}], "has multi_modal_data"),
        ([{"promt": "a"}], r"has promt; did you mean prompt\?"),
    ],
)
def test_what_is_no_prompt_is_said(llm, prompts, words):
    with pytest.raises(RequestError, match=words) as caught:
        llm.generate(prompts, greedy())
    assert caught.value.param == "prompts"


def test_what_are_no_parameters_is_said(llm):
    with pytest.raises(RequestError, match="sampling_params must be a SamplingParams or a list"):
        llm.generate([[1]], {"temperature": 0})
    with pytest.raises(RequestError, match="2 priority for 1 prompts"):
        llm.generate([[1]], greedy(), priority=[1, 2])


def test_n_completions_of_each_prompt(llm):
    """The completions of a seeded request are those that its seed and the seeds after it give
    alone, as on the server."""
    params = SamplingParams(n=3, seed=SEED_MAX - 1, max_tokens=6, prompt_logprobs=0, logprobs=0)
    outputs = llm.generate([[5, 6], [7]], [params, greedy()])
    assert [len(output.outputs) for output in outputs] == [3, 1]
    assert [completion.index for completion in outputs[0].outputs] == [0, 1, 2]
    assert len(outputs[0].prompt_logprobs) == 2
    for seed, completion in zip(
        (SEED_MAX - 1, SEED_MAX, SEED_MIN), outputs[0].outputs, strict=True
    ):
        [alone] = llm.generate([[5, 6]], SamplingParams(seed=seed, max_tokens=6))
        assert completion.token_ids == alone.outputs[0].token_ids
    assert len({tuple(completion.token_ids) for completion in outputs[0].outputs}) == 3
    unseeded = llm.generate([[5, 6]], SamplingParams(n=2, max_tokens=6))[0].outputs
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_what_ended_a_completion_and_how_likely_it_was(llm):
    whole = llm.generate([[9, 9]], greedy(max_tokens=30, logprobs=0))[0].outputs[0]
    total = sum(entry.logprob for entry in whole.logprobs)
    assert whole.cumulative_logprob == pytest.approx(total)
    assert (whole.stop_reason, whole.finished()) == (None, True)
    assert llm.generate([[9, 9]], greedy())[0].outputs[0].cumulative_logprob is None
    stop = whole.text[4:6]
    cut = llm.generate([[9, 9]], greedy(max_tokens=30, stop=["\x00", stop]))[0].outputs[0]
    assert cut.stop_reason == stop
    token = whole.token_ids[3]
    cut = llm.generate([[9, 9]], greedy(max_tokens=30, stop_token_ids=[token]))[0].outputs[0]
    assert (cut.finish_reason, cut.stop_reason) == (FinishReason.STOP, token)


def test_progress_is_shown_by_whom_is_asked(llm, capsys):
    made = []

    class Bar:
        def __init__(self, **options):
            self.options, self.done = options, 0
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.done += count

    llm.generate([[1], [2]], greedy(n=2), use_tqdm=Bar)
    assert [(bar.options["total"], bar.done) for bar in made] == [(4, 4)]
    llm.generate([[1]], greedy(), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_structured_outputs(llm):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    forms = [{"json": schema}, {"choice": ["yes", "no"]}, {"regex": "[ab]{3}"}]
    params = [
        SamplingParams(
            n=2, seed=1, max_tokens=40, structured_outputs=StructuredOutputsParams(**form)
        )
        for form in forms
    ]
    answers = [
        [completion.text for completion in output.outputs]
        for output in llm.generate([[5]] * 3, params)
    ]
    assert all(json.loads(text)["a"] in (1, 2) for text in answers[0])
    assert set(answers[1]) <= {"yes", "no"}
    assert all(len(text) == 3 and set(text) <= set("ab") for text in answers[2])
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(RequestError, match="regular expression"):
        llm.generate([[5], [6]], [greedy(), bad])
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "form",
    [{}, {"regex": "a", "choice": ["a"]}, {"choice": [1]}, {"choice": "ab"}, {"regex": 5}],
)
def test_a_structured_output_is_exactly_one(form):
    with pytest.raises(RequestError, match="structured_outputs") as caught:
        StructuredOutputsParams(**form)
    assert caught.value.param == "structured_outputs"


def test_a_schema_that_is_no_json_is_said(llm):
    form = StructuredOutputsParams(json={"const": object()})
    with pytest.raises(RequestError, match="json is no JSON schema"):
        llm.generate([[5]], SamplingParams(structured_outputs=form))


# ---- chats ---------------------------------------------------------------------------------------

HELLO = {"role": "user", "content": "hello"}


def test_a_chat_is_read_as_the_server_reads_it(llm):
    """Content in parts and the role developer reach the template as the server would give them, and
    add_generation_prompt decides whether the prompt begins an answer."""
    parts = [{"type": "text", "text": "hello"}]
    spelled = [
        llm.chat([{"role": role, "content": content}, HELLO], greedy())[0].prompt
        for role, content in (("system", "hello"), ("developer", "hello"), ("system", parts))
    ]
    assert len(set(spelled)) == 1
    begun = [HELLO, {"role": "assistant", "content": "hi"}]
    [open_ended] = llm.chat(begun, greedy(), add_generation_prompt=False)
    [answer] = llm.chat(begun, greedy(), use_tqdm=False)
    assert answer.prompt.startswith(open_ended.prompt)
    assert len(answer.prompt) > len(open_ended.prompt)
    inside = {"add_generation_prompt": False, "continue_final_message": True}
    [continued] = llm.chat(begun, greedy(), **inside)
    assert continued.prompt.endswith("hi")
    assert open_ended.prompt.startswith(continued.prompt)


def test_bad_words_and_allowed_tokens(llm):
    """Words that the completion had before do not come any more; allowed tokens are all that
    come."""
    [before] = llm.generate("hello", greedy(max_tokens=12))
    tokenizer = llm.get_tokenizer()
    words = [text for i in before.outputs[0].token_ids if (text := tokenizer.decode([i])).strip()]
    [after] = llm.generate("hello", greedy(max_tokens=12, bad_words=words[:1]))
    assert words
    assert words[0].strip() in before.outputs[0].text
    assert words[0].strip() not in after.outputs[0].text
    [limited] = llm.generate("hello", greedy(max_tokens=12, allowed_token_ids=[5, 6]))
    assert set(limited.outputs[0].token_ids) <= {5, 6}


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([{"role": "", "content": "a"}], {}, "messages[0].role"),
        ([HELLO], {"continue_final_message": True}, "continue_final_message"),
        (
            [HELLO],
            {"continue_final_message": True, "add_generation_prompt": False},
            "continue_final_message",
        ),
        ([HELLO, {"role": "user"}], {}, "messages[1]"),
        ([HELLO], {"tools": [{"type": "function"}]}, "tools[0].function"),
        ([HELLO], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ([HELLO], {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_a_chat_cannot_say_is_said(llm, messages, options, param):
    """The last case's tool is valid, but this checkpoint's template would leave it out."""
    with pytest.raises(RequestError) as caught:
        llm.chat(messages, greedy(), **options)
    assert caught.value.param == param


def test_tools_and_variables_reach_the_template(checkpoint, tmp_path):
    """Tools and template variables reach the template, and a call's arguments in JSON become an
    object for it, as on the server."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (directory / "chat_template.jinja").write_text(
        "{{ tools[0].function.name }} {{ style }}"
        "{% for m in messages %}{% for call in m.tool_calls %}"
        " {{ call.function.arguments.x }}{% endfor %}{% endfor %}"
    )
    llm = LLM(str(directory), enforce_eager=True, **LIMITS)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 42}'}}
    [output] = llm.chat(
        [HELLO, {"role": "assistant", "tool_calls": [call]}],
        greedy(),
        tools=[{"type": "function", "function": {"name": "add"}}],
        chat_template_kwargs={"style": "plain"},
    )
    assert output.prompt == "add plain 42"


# ---- what belongs to the checkpoint --------------------------------------------------------------


def test_the_tokenizer_is_transformers_own(llm):
    tokenizer = llm.get_tokenizer()
    assert tokenizer is llm.get_tokenizer()
    assert tokenizer.encode("hello") == llm._tokenizer.encode("hello")
    text = tokenizer.apply_chat_template([HELLO], tokenize=False, add_generation_prompt=True)
    assert llm.chat([HELLO], greedy())[0].prompt == text


def test_without_parameters_the_checkpoints_defaults_count(checkpoint, llm, tmp_path):
    assert llm.get_default_sampling_params() == SamplingParams()
    directory = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    path = directory / "generation_config.json"
    told = json.loads(path.read_text())
    said = {"temperature": 0.5, "top_k": 1, "repetition_penalty": 1.5, "min_new_tokens": 20}
    path.write_text(json.dumps({**told, **said}))
    mine = LLM(str(directory), enforce_eager=True, **LIMITS)
    assert mine.get_default_sampling_params() == SamplingParams(
        temperature=0.5, top_k=1, repetition_penalty=1.5, min_tokens=16
    )
    [output] = mine.generate([[5]])
    assert output.outputs[0].token_ids == mine.generate([[5]])[0].outputs[0].token_ids
    # The checkpoint's min_tokens need not fit into the context that a prompt leaves free.
    near = [5] * (LIMITS["max_model_len"] - 3)
    assert len(mine.generate([near])[0].outputs[0].token_ids) == 3
    with pytest.raises(ContextLengthError):
        mine.generate([[*near, 5, 5, 5]])
    path.write_text(json.dumps({**told, "top_p": 7}))
    with pytest.raises(ConfigError, match="generation_config.json: top_p=7"):
        LLM(str(directory), **LIMITS)
