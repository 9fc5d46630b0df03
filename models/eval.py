"""The project's accuracy instrument: held-out tasks with one right answer, decoded greedily.

Knows: which cases are asked and how answers are scored. Asks an OpenAI URL, minisrv in process, or
transformers in process; does not know how any of them works. The cases depend on the seed and the
number of cases alone, so two runs can be compared answer by answer.

    python models/eval.py --url http://127.0.0.1:8000/v1 --concurrency 16
    python models/eval.py --model models/minisrv-default --enforce-eager
    python models/eval.py --model models/minisrv-default --backend transformers

Flags this program does not know go to minisrv's LLM as keyword arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.chat import Message, evaluation
from recipe.tasks import MAX_ANSWER_TOKENS, TASKS, Case
from recipe.tokenizer import written_calls
from recipe.tool_chat import TOOL_TASKS, tool_evaluation
from recipe.tools import Tool
from tqdm import tqdm

DEFAULT_MODEL = Path(__file__).resolve().parent / "minisrv-default"
ALL_TASKS = (*TASKS, *TOOL_TASKS)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The messages of a chat and the tools that it offers."""

    messages: list[Message]
    tools: list[Tool]


def held_out_cases(cases_per_task: int, seed: int) -> list[tuple[Prompt, Case]]:
    """So many different held-out cases of every task."""
    chosen: list[tuple[Prompt, Case]] = []
    for task in ALL_TASKS:
        rng = random.Random(f"{seed}/{task}")
        seen: set[str] = set()
        while len(seen) < cases_per_task:
            if task in TOOL_TASKS:
                messages, tools, case = tool_evaluation(rng, task)
            else:
                (messages, case), tools = evaluation(rng, task), []
            if case.prompt not in seen:
                seen.add(case.prompt)
                chosen.append((Prompt(messages, tools), case))
    return chosen


async def ask_url(
    url: str, model: str | None, prompts: list[Prompt], concurrency: int
) -> list[str]:
    """Answers of an OpenAI-compatible server."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600.0) as client:
        name = model or (await client.models.list()).data[0].id
        gate = asyncio.Semaphore(concurrency)
        progress = tqdm(total=len(prompts), unit="case")

        async def ask(prompt: Prompt) -> str:
            async with gate:
                reply = await client.chat.completions.create(
                    model=name,
                    messages=prompt.messages,  # type: ignore[arg-type]
                    temperature=0.0,
                    max_tokens=MAX_ANSWER_TOKENS,
                    **({"tools": prompt.tools} if prompt.tools else {}),  # type: ignore[arg-type]
                )
            progress.update()
            message = reply.choices[0].message
            calls = [call.model_dump() for call in message.tool_calls or ()]
            return (message.content or "") + written_calls(calls)

        answers = await asyncio.gather(*map(ask, prompts))
        progress.close()
        return list(answers)


def rendered(tokenizer: Any, prompts: list[Prompt]) -> list[str]:
    """The texts that the chat template of transformers' tokenizer makes of the prompts."""
    return [
        tokenizer.apply_chat_template(
            p.messages, tools=p.tools or None, tokenize=False, add_generation_prompt=True
        )
        for p in prompts
    ]


def ask_minisrv(model: str | None, prompts: list[Prompt], options: dict[str, Any]) -> list[str]:
    """Answers of minisrv's engine in this process."""
    from minisrv import LLM, SamplingParams

    llm = LLM(model=model, **options)
    texts = rendered(llm.get_tokenizer(), prompts)
    outputs = llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS))
    return [output.outputs[0].text for output in outputs]


def ask_transformers(model: str, prompts: list[Prompt], batch_size: int = 64) -> list[str]:
    """Answers of transformers in float32, the reference."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model).float().to(device).eval()
    texts = rendered(tokenizer, prompts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    for start in tqdm(range(0, len(order), batch_size), unit="batch"):
        indices = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in indices], return_tensors="pt", padding=True)
        batch = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            made = network.generate(**batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        width = batch["input_ids"].shape[1]
        for i, ids in zip(indices, made[:, width:], strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return answers


def score(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Exact matches by task, and in all under "total"."""
    table: dict[str, dict[str, float]] = {}
    for name in (*ALL_TASKS, "total"):
        right = [
            answer.strip() == case.answer
            for case, answer in zip(cases, answers, strict=True)
            if name in (case.task, "total")
        ]
        table[name] = {"exact": sum(right), "n": len(right), "accuracy": sum(right) / len(right)}
    return table


def engine_options(flags: list[str]) -> dict[str, Any]:
    """`--some-flag VALUE`, `--some-flag=VALUE` and bare `--some-flag` as keyword arguments."""
    options: dict[str, Any] = {}
    name = ""
    for part in (p for flag in flags for p in flag.split("=", 1)):
        if part.startswith("--"):
            name = part[2:].replace("-", "_")
            options[name] = True
        elif not name:
            raise SystemExit(f"unexpected argument {part}")
        else:
            try:
                options[name] = json.loads(part)
            except json.JSONDecodeError:
                options[name] = part
    return options


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Exact-match accuracy on held-out tasks.",
        epilog="Other flags go to minisrv's LLM, for instance --enforce-eager.",
    )
    parser.add_argument("--url", help="base URL of an OpenAI-compatible server, with /v1")
    parser.add_argument("--model", help="model folder; with --url the served model's name")
    parser.add_argument("--backend", choices=("minisrv", "transformers"), default="minisrv")
    parser.add_argument("--concurrency", type=int, default=16, help="open requests, with --url")
    parser.add_argument("--cases-per-task", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table and every answer here")
    parser.add_argument("--min-accuracy", type=float, help="exit 1 below this total accuracy")
    args, rest = parser.parse_known_args()
    options = engine_options(rest)
    if options and (args.url or args.backend != "minisrv"):
        parser.error(f"only minisrv in process takes {', '.join(options)}")

    prompts, cases = zip(*held_out_cases(args.cases_per_task, args.seed), strict=True)
    begin = time.perf_counter()
    if args.url:
        answers = asyncio.run(ask_url(args.url, args.model, list(prompts), args.concurrency))
    elif args.backend == "transformers":
        answers = ask_transformers(args.model or str(DEFAULT_MODEL), list(prompts))
    else:
        answers = ask_minisrv(args.model or str(DEFAULT_MODEL), list(prompts), options)
    seconds = time.perf_counter() - begin

    table = score(cases, answers)
    print(f"{'task':<14}{'exact':>7}{'n':>7}{'accuracy':>10}")
    for name, row in table.items():
        print(f"{name:<14}{row['exact']:>7}{row['n']:>7}{row['accuracy']:>10.1%}")
    print(f"{seconds:.1f} s")
    if args.json:
        report = {
            "seed": args.seed,
            "cases_per_task": args.cases_per_task,
            "seconds": round(seconds, 1),
            "table": table,
            "answers": [
                {"task": c.task, "expected": c.answer, "answer": a}
                for c, a in zip(cases, answers, strict=True)
            ],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.min_accuracy is not None and table["total"]["accuracy"] < args.min_accuracy:
        print(f"accuracy is below {args.min_accuracy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
