"""Random requests to random engines with small caches: is each answer that of the request alone?

    python benchmarks/random_requests.py --engines 200 --requests 500 --processes 2 --json F

Each engine is drawn from `--seed` and its number: a tiny random checkpoint of one of the supported
kinds, limits, a cache that holds little more than the longest request, ladders, graph mode, prefix
cache, decode runs, and whether steps are one ahead. It is given questions (benchmarks/questions.py)
as the server is, body by body and answered streamed or not, in waves between none and twice as many
as fit a batch. Some clients go away in the middle. Whenever nobody asks, every block and request
index must be free.

Each answer is compared with the *lone* one: the same question in an engine that runs eagerly, one
choice at a time, each prompt in one step, without a prefix cache. Everything is float32. Questions
come again, and are asked alone once.

Kernels round differently for batches of different sizes, so two tokens that are nearly as good as
each other may change places. An answer that parts from the lone one is a *near tie*, and counted
apart with its margin, only if the lone logits at that place, moved by at most NEAR_TIE each, give
the other token: filters such as top_p have edges too. Any other difference is a fault, printed with
the command that repeats it. Grammars are compiled in a thread, so that a request with one may join
another step when it is repeated.

The JSON is written after each engine. Ctrl-C or SIGTERM ends the run, of several processes when the
engines that have begun are through. With the same `--json` it goes on: engines that the file holds
are not run again. The exit status is 1 if an answer differed, a request failed, or something was
not free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs
from benchmarks.questions import CHAT, Answer, Question, Questions, parse
from minisrv.checkpoint import Checkpoint, open_checkpoint
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.kernels import sample_op
from minisrv.kernels.sampling import scores
from minisrv.metrics import Metrics
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineOutput, EngineRequest, StructuredOutput
from minisrv.server.choices import Generation
from minisrv.server.errors import JSON
from minisrv.server.preprocessing import Prepared
from minisrv.server.request_schemas import ChatCompletionRequest, CompletionRequest
from minisrv.server.response_builders import ChatResponseBuilder, CompletionResponseBuilder
from minisrv.server.serving import Serving
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from minisrv.tools.environment import environment

with needs("pip install -e '.[test]'"):
    from tests.checkpoints import VARIANTS, VOCAB_SIZE, make_checkpoint

CONTEXT, CONTEXT_WITH_TOOLS = 320, 704
"""Tokens of the longest question, and somewhat more."""
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that tells of tools in few words, which the small tokenizer makes long."""
TOOLS = 0.15
"""Of the engines are asked for calls of tools, and have to have room for these."""
MAX_TOKENS = ((1, 2, 6, 12, 16, 24), (8, 32, 64))
"""Of the questions of an engine. Those that take many are preempted most."""
LONG = 0.15
DISTINCT = 0.1
"""Questions of an engine for each of its requests."""
FRESH_GRAMMARS = 0.02
LEAVING = 0.05
WAVE_STEPS = 60
CHECKED_EVERY = 50
"""Steps from one look at all blocks and request indices to the next."""
NEAR_TIE = 1e-4
"""Of logits, which are up to ten here; float32 has 24 bits, and sums of 100 products lose some."""
PERTURBATIONS = 256
KEPT_FAULTS = 20
"""Of each engine."""

LONE: dict[str, Any] = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": CONTEXT_WITH_TOOLS,
    "num_kv_blocks": CONTEXT_WITH_TOOLS // 16 + 1,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "async_scheduling": False,
}
"""The settings of an engine that leaves nothing to chance."""

COUNTS = ("compared", "faults", "aborted", "ended", "errors", "times_at_rest")

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

PLAIN = {"model", "prompt", "messages", "temperature", "max_tokens", "return_token_ids"}
"""Fields that every request has, or that are counted otherwise."""

Finished = Callable[[], object]
"""Is called for each request that has ended."""


class Task(NamedTuple):
    """One engine's part.

    just: the one of its requests that is compared; None for all.
    crowd: what becomes of them.
    """

    seed: int
    number: int
    requests: int
    just: int | None
    crowd: type[Crowd]

    def repeats(self, request: int | None) -> str:
        """The command that compares that request of this engine, in the same company; or all."""
        return (
            f"python benchmarks/{self.crowd.script} --seed {self.seed} "
            f"--first-engine {self.number} --engines 1 --requests {self.requests}"
        ) + ("" if request is None else f" --just {request}")


class Settings(NamedTuple):
    """Of one engine. model: a kind of checkpoint, see `tests.checkpoints`; layers: how many it has.
    tools, max_tokens: of its questions."""

    model: str
    layers: int
    tools: bool
    max_tokens: tuple[int, ...]
    decode_runs: bool
    engine: dict[str, Any]


def draw_settings(rng: random.Random) -> Settings:
    """Limits that bind, and any mode that a CPU has."""
    tools = rng.random() < TOOLS
    context = CONTEXT_WITH_TOOLS if tools else CONTEXT
    seqs = rng.choice((1, 3, 6, 8, 8, 12, 12, 16, 16, 16, 24, 24))
    tokens = max(seqs, rng.choice((16, 32, 64, 64, 160)))
    block_size = rng.choice((1, 1, 2, 2, 4, 8, 16, 32))
    blocks = context // block_size
    modes = ("none", "piecewise", "full-decode-only", "full-and-piecewise", "full-and-piecewise")
    sizes = None
    if rng.random() < 0.5:
        drawn = rng.sample(range(1, tokens + 1), rng.randint(1, min(tokens, 5)))
        sizes = tuple(sorted({*drawn, seqs}))
    return Settings(
        model=rng.choice([*VARIANTS]),
        layers=rng.choice((1, 1, 2)),
        tools=tools,
        max_tokens=MAX_TOKENS[rng.random() < LONG],
        decode_runs=rng.random() < 0.75,
        engine={
            "max_model_len": context,
            "max_num_seqs": seqs,
            "max_num_batched_tokens": tokens,
            "block_size": block_size,
            "num_kv_blocks": blocks + 1 + rng.randint(0, blocks // 4),
            "cudagraph_mode": rng.choice(modes),
            "cudagraph_capture_sizes": sizes,
            "enforce_eager": rng.random() < 0.1,
            "enable_prefix_caching": rng.random() < 0.75,
            "async_scheduling": rng.random() < 0.5,
        },
    )


# ---- an engine, asked as the server asks ---------------------------------------------------------


class Asking:
    """A question on its way through an engine.

    tokens: of each choice, as far as they have come; they are not part of every answer.
    error, kind: what ended it otherwise, in words and as the name of a class.
    """

    def __init__(self, number: int, generation: Generation, builder: Any, stream: bool) -> None:
        self.number = number
        self.generation = generation
        self.tokens: list[list[int]] = [[] for _ in generation.requests]
        self.error: str | None = None
        self.kind: str | None = None
        self._builder = builder
        self._stream = stream
        self._events = bytearray()

    def read(self, output: EngineOutput) -> None:
        """Add what an engine has said."""
        if output.error is not None:
            self.error, self.kind = output.error.message, output.error.kind
            return
        for delta in self.generation.read([output]):
            self.tokens[delta.index] += delta.token_ids
            if self._stream:
                self._events += self._builder.events(delta)
            else:
                self._builder.add(delta)

    @property
    def has_ended(self) -> bool:
        return self.error is not None or self.generation.has_ended

    def outcome(self) -> Outcome:
        """Comes after the end."""
        if self.error is not None:
            return Outcome(Answer(self.error, []), self.tokens)
        if self._stream:
            text = bytes(self._events) + self._builder.last_events()
        else:
            text = JSON(self._builder.response()).body
        return Outcome(parse(text, self._stream), self.tokens)


class Outcome(NamedTuple):
    """What came of a question. tokens: of each choice."""

    answer: Answer
    tokens: list[list[int]]

    def same_as(self, other: Outcome) -> bool:
        return self.tokens == other.tokens and self.answer.same_as(other.answer)


class Untried:
    """In the place of a `GrammarValidator`: the grammars of the questions compile."""

    def __init__(self, backend: GrammarBackend) -> None:
        self._backend = backend

    async def validate(self, spec: StructuredOutput, owner: str) -> StructuredOutput:
        """In llguidance's words."""
        return self._backend.lower(spec)


class Engine:
    """One in this process, in the place of an `EngineClient`: the server's own parts make requests
    of bodies for it, and answers of its outputs."""

    def __init__(self, core: EngineCore, checkpoint: Checkpoint) -> None:
        self.core = core
        self.info = core.info
        tokenizer = Tokenizer.from_description(checkpoint.tokenizer)
        self.serving = Serving(
            self, tokenizer, ("model",), checkpoint.generation, Metrics(), root="model"
        )
        end = checkpoint.generation.eos_token_ids
        backend = GrammarBackend(tokenizer, self.info.vocab_size, end)
        vars(self.serving)["_validator"] = Untried(backend)
        self.open: dict[int, Asking] = {}
        self._of_request: dict[str, Asking] = {}
        self._aborted: list[EngineOutput] = []

    def check_serving(self) -> None:
        """Return, as an engine in this process always serves."""

    async def prepare(self, questions: list[Question]) -> list[Prepared]:
        """Prompts and grammars, which every engine of the checkpoint takes. How many tokens are
        asked for has no part in them, and could be too many yet."""
        asked = [each.body | {"max_tokens": 1, "min_tokens": 0} for each in questions]
        bodies = [
            body_of(Question(each.path, body)) for each, body in zip(questions, asked, strict=True)
        ]
        return [await self.serving.prepare(body, "local") for body in bodies]

    def ask(self, number: int, question: Question, prepared: Prepared, stream: bool) -> None:
        """Queue a question, which `step` then works on."""
        body = body_of(question, stream)
        kind = ChatResponseBuilder if question.path == CHAT else CompletionResponseBuilder
        builder = kind(body, "model", self.serving.tokenizer)
        choices = self.serving.choices(body, prepared, builder.id, None, time.perf_counter())
        builder.begin(prepared)
        asking = self.open[number] = Asking(number, Generation(choices), builder, stream)
        for request in asking.generation.requests:
            self._of_request[request.request_id] = asking
        self.submit(asking.generation.requests)

    def submit(self, requests: list[EngineRequest]) -> None:
        """Hand requests with one question to the engine."""
        for request in requests:
            self.core.add(request)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do."""
        return self.core.has_work

    def run_step(self) -> list[EngineOutput]:
        """Returns what came of it."""
        return self.core.step()

    def drop(self, request_id: str) -> EngineOutput | None:
        """End a request, if it has not ended. Returns its last output, unless that comes later."""
        return self.core.abort(request_id)

    def step(self) -> list[Asking]:
        """Returns those that have ended."""
        outputs = self.run_step()
        ended = []
        while outputs:
            for output in outputs:
                asking = self._of_request.get(output.request_id)
                if asking is None:
                    continue  # it has ended, or nobody waits for it
                asking.read(output)
                if asking.has_ended:
                    self.leave(asking)
                    ended.append(asking)
            outputs, self._aborted = self._aborted, []
        return ended

    def abort(self, request_id: str) -> None:
        """What a choice calls that has found a stop string."""
        if last := self.drop(request_id):
            self._aborted.append(last)

    def leave(self, asking: Asking) -> None:
        """Wait for it no more."""
        self.forget(asking)
        for request in asking.generation.requests:
            self.drop(request.request_id)

    def forget(self, asking: Asking) -> None:
        """Know nothing of it any more."""
        del self.open[asking.number]
        for request in asking.generation.requests:
            del self._of_request[request.request_id]

    def run_alone(self, question: Question, prepared: Prepared, choice: int) -> None:
        """One choice of a question, from beginning to end."""
        body = body_of(question)
        choices = self.serving.choices(body, prepared, "again", None, 0.0)
        self.core.add(choices[choice].request)
        while self.core.has_work:
            self.core.step()

    def left_behind(self) -> dict[str, int]:
        """What is held of an engine that has nothing to do."""
        stats = self.core.stats()
        held = {
            "running": stats.running,
            "waiting": stats.waiting,
            "blocks": stats.kv_blocks_used,
            "request indices": self.core.scheduler.req_indices.num_used,
        }
        return {name: number for name, number in held.items() if number}


def make_engine(checkpoint: Checkpoint, **settings: Any) -> Engine:
    """One that serves float32 on a CPU."""
    mode = CUDAGraphMode.parse(settings.pop("cudagraph_mode", "full-and-piecewise"))
    config = EngineConfig(
        model=str(checkpoint.directory),
        dtype="float32",
        device="cpu",
        cudagraph_mode=mode,
        **settings,
    )
    parts = build_engine(config, checkpoint=checkpoint, check_addresses=True)
    return Engine(EngineCore(parts), checkpoint)


def body_of(question: Question, stream: bool = False) -> CompletionRequest | ChatCompletionRequest:
    """As the server reads it."""
    kind = ChatCompletionRequest if question.path == CHAT else CompletionRequest
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return kind.model_validate(question.body | streamed)


# ---- lone answers --------------------------------------------------------------------------------


class SampledFrom(TorchDispatchMode):
    """Keeps what tokens were sampled from, where nothing is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is sample_op:
            self.calls.append(tuple(arg.clone() for arg in args))
        return func(*args, **(kwargs or {}))


class Alone:
    """The engine that answers one choice at a time, and the questions that it has answered."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[int, Outcome] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def core(self) -> EngineCore:
        """That of the engine."""
        return self._engine.core

    def outcome(self, index: int, question: Question, prepared: Prepared) -> Outcome:
        """Of question `index`, asked once."""
        if index not in self._known:
            self._engine.ask(index, question, prepared, stream=False)
            ended: list[Asking] = []
            while not ended:
                ended = self._engine.step()
            self._known[index] = ended[0].outcome()
        return self._known[index]

    def margin(
        self, question: Question, prepared: Prepared, choice: int, place: int, token: int
    ) -> float | None:
        """By how much the logits of a choice's token `place` must move for `token` to be sampled
        there: a power of ten. None above NEAR_TIE."""
        with SampledFrom() as sampled:
            self._engine.run_alone(question, prepared, choice)
        logits, indices, _, temperature, top_k, top_p, min_p, seed, _ = sampled.calls[place]
        parameters = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed
        }  # fmt: skip
        rows = {name: values[indices].expand(PERTURBATIONS) for name, values in parameters.items()}
        positions = sampled.calls[place][2].expand(PERTURBATIONS)
        noise = torch.rand(
            PERTURBATIONS, logits.shape[1], generator=torch.Generator().manual_seed(0)
        )
        for power in range(-7, 0):
            if (size := 10.0**power) > NEAR_TIE:
                break
            moved = logits + size * (2 * noise - 1)
            if token in scores(moved, positions, **rows).argmax(dim=-1).tolist():
                return size
        return None


def near_tie(
    alone: Alone, question: Question, prepared: Prepared, lone: Outcome, found: Outcome
) -> float | None:
    """The largest margin of the places where the choices part, if each is a near tie and nothing
    else differs; None otherwise."""
    if isinstance(lone.answer.exact, str) or isinstance(found.answer.exact, str):
        return None  # one of them is an error
    margins = []
    for choice, (was, now) in enumerate(zip(lone.tokens, found.tokens, strict=True)):
        if was == now:
            if lone.answer.exact[0][choice] != found.answer.exact[0][choice]:
                return None
            continue
        place = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), None)
        if place is None:
            return None  # one goes on where the other ends
        margins.append(alone.margin(question, prepared, choice, place, now[place]))
    return max(margins) if margins and None not in margins else None  # type: ignore[type-var]


# ---- one engine and its crowd --------------------------------------------------------------------


class Asked(NamedTuple):
    """A request. leaves: steps after which its client goes away; None for one that stays."""

    question: int
    stream: bool
    leaves: int | None


class Crowd:
    """One engine's part: the questions, in which order they come, and what has come of them."""

    script = "random_requests.py"

    def __init__(self, task: Task) -> None:
        rng = random.Random(f"{task.seed} {task.number}")
        self.task = task
        self.settings = draw_settings(rng)
        self._waves = random.Random(rng.getrandbits(32))
        draws = Questions(
            rng.getrandbits(32),
            token_ids=(3, VOCAB_SIZE),
            max_tokens=self.settings.max_tokens,
            tools=self.settings.tools,
        )
        self.questions = [
            draws.fresh_grammar(number)[0] if rng.random() < FRESH_GRAMMARS else draws.draw()
            for number in range(max(1, round(DISTINCT * task.requests)))
        ]
        self.asked = [self._ask(rng) for _ in range(task.requests)]
        self.counts: Counter[str] = Counter()
        self.features: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        """What has happened to the engine besides."""
        self.near_ties: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []

    def _ask(self, rng: random.Random) -> Asked:
        index = rng.randrange(len(self.questions))
        stream = self.questions[index].may_stream and rng.random() < 0.5
        leaves = rng.choice((0, 1, rng.randint(2, 60))) if rng.random() < LEAVING else None
        return Asked(index, stream, leaves)

    def run(self, checkpoint: Checkpoint, finished: Finished) -> dict[str, Any]:
        """All of it. finished: is told of each request that has ended."""
        began = time.monotonic()
        engine = self.make_engine(checkpoint)
        if not self.settings.decode_runs:  # each step is thought of anew
            engine.core.scheduler._continue_run = lambda: None  # type: ignore[method-assign]
        alone = Alone(make_engine(checkpoint, **LONE))
        prepared = asyncio.run(engine.prepare(self.questions))
        self._shorten(prepared)
        try:
            for asking in self._serve(engine, prepared):
                finished()
                if asking is not None and self.task.just in (None, asking.number):
                    self._judge(asking, alone, prepared)
                    if self.task.just is not None:
                        break
        except Exception as error:  # the other engines have their turn
            self._fault(None, raised="".join(traceback.format_exception(error)[-4:]))
        stats = engine.core.stats()
        return {
            "engine": self.task.number,
            "settings": self.settings._asdict(),
            "counts": dict(self.counts),
            "lone_answers": len(alone),
            "features": dict(self.features),
            "events": dict(self.events),
            "preemptions": stats.preemptions,
            "prompt_tokens": stats.prompt_tokens,
            "prefix_hit_tokens": stats.prefix_cache_hits,
            "generated_tokens": stats.generated_tokens,
            "steps": {f"{each.mode}/{each.reason}": each.steps for each in stats.steps},
            "near_ties": self.near_ties,
            "faults": self.faults,
            "seconds": round(time.monotonic() - began, 1),
        }

    def make_engine(self, checkpoint: Checkpoint) -> Engine:
        """The engine that is asked."""
        return make_engine(checkpoint, **self.settings.engine)

    def _shorten(self, prepared: list[Prepared]) -> None:
        """Let those questions that would not fit the context ask for less."""
        context = self.settings.engine["max_model_len"]
        for question, found in zip(self.questions, prepared, strict=True):
            room = context - max(map(len, found.prompts))
            for name in {"max_tokens", "min_tokens"} & question.body.keys():
                question.body[name] = min(question.body[name], room)

    def _serve(self, engine: Engine, prepared: list[Prepared]) -> Iterator[Asking | None]:
        """Each request when it has ended; None for one whose client has gone."""
        most = 2 * self.settings.engine["max_num_seqs"] + 1
        leaving: dict[int, int] = {}
        begun = step = wanted = 0
        resting = True
        while self.happens(engine, begun == len(self.asked)) or engine.has_work:
            if step % WAVE_STEPS == 0:
                wanted = self._waves.choice((0, self._waves.randint(1, most), most, most))
            while begun < len(self.asked) and len(engine.open) < wanted and self.comes(begun):
                asked = self.asked[begun]
                question = self.questions[asked.question]
                engine.ask(begun, question, prepared[asked.question], asked.stream)
                self.features.update(features(question, asked.stream))
                if asked.leaves is not None:
                    leaving[begun] = step + asked.leaves
                begun += 1
            for number in [each for each, when in leaving.items() if when <= step]:
                del leaving[number]
                if asking := engine.open.get(number):
                    engine.leave(asking)
                    self.counts["aborted"] += 1
                    yield None
            yield from engine.step()
            step += 1
            if step % CHECKED_EVERY == 0:
                self.look(engine)
            rested, resting = resting, not engine.has_work
            if resting:
                self.counts["times_at_rest"] += not rested
                left = engine.left_behind()
                assert not left, f"left behind: {left}"
                assert not engine.open, "nobody is forgotten"

    def happens(self, engine: Engine, all_asked: bool) -> bool:
        """Let something happen to the engine before a step, and return whether more will.

        all_asked: whether no request is left to come.
        """
        return not all_asked

    def comes(self, number: int) -> bool:
        """Whether the next request comes now."""
        return True

    def look(self, engine: Engine) -> None:
        """Look at all blocks and request indices."""
        engine.core.scheduler.check_integrity()

    def _judge(self, asking: Asking, alone: Alone, prepared: list[Prepared]) -> None:
        """Compare what came with the lone answer."""
        index = self.asked[asking.number].question
        question = self.questions[index]
        self.counts["compared"] += 1
        lone, found = alone.outcome(index, question, prepared[index]), asking.outcome()
        self.counts["errors"] += isinstance(lone.answer.exact, str)
        if found.same_as(lone):
            return
        margin = near_tie(alone, question, prepared[index], lone, found)
        if margin is not None:
            self.near_ties.append({"request": asking.number, "margin": margin})
            return
        was, is_now = lone.answer.apart(found.answer)
        if was == is_now:
            was, is_now = lone.tokens, found.tokens
        stream = self.asked[asking.number].stream
        asked = {"path": question.path, "body": question.body, "stream": stream}
        self._fault(asking.number, **asked, lone=was, answer=is_now)

    def _fault(self, request: int | None, **told: Any) -> None:
        """Keep one, of a request or of the engine, and say how it is repeated."""
        self.counts["faults"] += 1
        command = self.task.repeats(request)
        tqdm.write(f"DIFFERS: {command}\n{json.dumps(told)}", file=sys.stderr)
        if len(self.faults) < KEPT_FAULTS:
            self.faults.append({"request": request, "repeat": command, **told})


def features(question: Question, stream: bool) -> set[str]:
    """What a request asks for, by the names of its fields, and how."""
    body = question.body
    found = {name for name, value in body.items() if value is not False} - PLAIN
    found |= {"streamed"} if stream else set()
    found |= {question.path, "greedy" if body["temperature"] == 0 else "sampled"}
    if isinstance(body.get("prompt"), list):
        texts = isinstance(body["prompt"][0], str)
        found.add("several prompts" if texts else "prompt of token ids")
    form = body.get("structured_outputs") or body.get("response_format")
    if form is not None:
        found.add(f"form: {form.get('type') or next(iter(form))}")
    return found


def run(task: Task, finished: Finished) -> dict[str, Any]:
    """One engine, with a checkpoint of its own."""
    crowd = task.crowd(task)
    with TemporaryDirectory(prefix="random-requests-") as place:
        template = Path(place, "template.jinja")
        template.write_text(TEMPLATE)
        directory = make_checkpoint(
            Path(place, "model"),
            crowd.settings.model,
            num_hidden_layers=crowd.settings.layers,
            max_position_embeddings=CONTEXT_WITH_TOOLS,
        )
        model_impl = crowd.settings.engine.get("model_impl", "auto")
        config = EngineConfig(
            model=str(directory), device="cpu", chat_template=template, model_impl=model_impl
        )
        return crowd.run(open_checkpoint(config), finished)


# ---- several processes, and the report -----------------------------------------------------------

_counter: Any = None


def _begin_process(counter: Any) -> None:
    """In a process that runs engines: Ctrl-C is its parent's."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= ENVIRONMENT


def _count_one() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _run_counted(task: Task) -> dict[str, Any]:
    return run(task, _count_one)


def run_all(tasks: list[Task], processes: int, bar: tqdm[Any]) -> Iterator[dict[str, Any]]:
    """Each engine's part when it is done. Behind Ctrl-C those that have begun."""
    if processes == 1:
        for task in tasks:
            yield run(task, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q")
    with ProcessPoolExecutor(processes, context, _begin_process, (counter,)) as pool:
        running = {pool.submit(_run_counted, task) for task in tasks}
        try:
            while running:
                try:
                    done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    running = {future for future in running if not future.cancel()}
                    continue
                bar.update(counter.value - bar.n)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # or an error here would wait for all engines


def report(options: argparse.Namespace, engines: list[dict[str, Any]]) -> dict[str, Any]:
    """All that was found so far."""
    summed = {
        name: sum((Counter(engine[name]) for engine in engines), Counter())
        for name in ("counts", "features", "events", "steps")
    }
    margins = Counter(f"{tie['margin']:g}" for engine in engines for tie in engine["near_ties"])
    totals = ("lone_answers", "preemptions", "prompt_tokens", "prefix_hit_tokens")
    return {
        "environment": msgspec.to_builtins(options.environment),
        "seed": options.seed,
        "requests_of_an_engine": options.requests,
        "engines": len(engines),
        "commits": sorted({engine["commit"] for engine in engines}),
        "seconds": round(time.monotonic() - options.began),
        "requests": sum(summed["counts"][name] for name in ("compared", "aborted", "ended")),
        **{name: summed["counts"][name] for name in COUNTS},
        "near_ties": margins.total(),
        "near_ties_by_margin": dict(sorted(margins.items())),
        **{name: sum(engine[name] for engine in engines) for name in (*totals, "generated_tokens")},
        "steps": dict(summed["steps"].most_common()),
        "features": dict(summed["features"].most_common()),
        "events": dict(summed["events"].most_common()),
        "of_each_engine": sorted(engines, key=itemgetter("engine")),
    }


def earlier(options: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """The engines that the file holds already, and how long they took. Raises SystemExit for a file
    of other requests."""
    if options.json is None or not options.json.exists():
        return [], 0.0
    found = json.loads(options.json.read_text())
    if (found["seed"], found["requests_of_an_engine"]) != (options.seed, options.requests):
        raise SystemExit(f"{options.json} is of another --seed or --requests; name another file")
    return found["of_each_engine"], found["seconds"]


def write(path: Path | None, found: dict[str, Any]) -> None:
    """Replace the file, if one is wanted, as a whole."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(path)


def show(found: dict[str, Any]) -> None:
    """The table."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    table = Table("what", "how many", box=None)
    for name in ("engines", "seconds", *COUNTS, "near_ties", "lone_answers", "preemptions"):
        table.add_row(name.replace("_", " "), f"{found[name]:,}")
    for name in ("prompt_tokens", "prefix_hit_tokens", "generated_tokens"):
        table.add_row(name.replace("_", " "), f"{found[name]:,}")
    for name, steps in found["steps"].items():
        table.add_row(f"steps {name}", f"{steps:,}")
    for name, times in found["events"].items():
        table.add_row(name, f"{times:,}")
    console.print(table)


def commit() -> str:
    """That of this clone, and whether it is what runs; empty where this is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    told = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True, check=False)
    return told.stdout.strip()


def main(argv: list[str] | None = None, crowd: type[Crowd] = Crowd) -> int:
    """Run, print, and write the JSON."""
    about = sys.modules[crowd.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--engines", type=int, default=2, help="(2)")
    parser.add_argument("--requests", type=int, default=500, help="of each engine (500)")
    parser.add_argument("--processes", type=int, default=1, help="that run engines (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-engine", type=int, default=0, metavar="NUMBER", help="(0)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--just", type=int, metavar="REQUEST", help="compare this one; all others are its company"
    )
    what.add_argument("--json", type=Path, metavar="FILE", help="one that is there goes on")
    options = parser.parse_args(argv)
    options.environment, running = environment("llguidance", "tokenizers"), commit()
    engines, seconds = earlier(options)
    options.began = time.monotonic() - seconds
    os.environ |= ENVIRONMENT
    known = {engine["engine"] for engine in engines}
    numbers = range(options.first_engine, options.first_engine + options.engines)
    tasks = [
        Task(options.seed, number, options.requests, options.just, crowd)
        for number in numbers
        if number not in known
    ]
    total = len(tasks) * options.requests
    with tqdm(total=total, unit="request") as bar, suppress(KeyboardInterrupt):
        for engine in run_all(tasks, options.processes, bar):
            engines.append({"commit": running} | engine)
            write(options.json, report(options, engines))
    found = report(options, engines)
    show(found)
    return int(found["faults"] > 0)


def may_be_interrupted() -> None:
    """Let SIGINT and SIGTERM end the run; a shell's background ignores the first."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)


if __name__ == "__main__":
    may_be_interrupted()
    sys.exit(main())
