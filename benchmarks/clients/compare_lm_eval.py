"""Compares the numbers of lm-eval's `hf` model with those of its `local-completions` and a server.

    python benchmarks/clients/compare_lm_eval.py --server graphs=http://127.0.0.1:8000 \\
        --server eager=http://127.0.0.1:8001 --json out.json

Runs in an environment with `lm-eval[api,hf]`. The servers must serve the same checkpoint in
float32, in which transformers computes the reference. Each server is evaluated twice, with prompts
of token ids and with texts, which it tokenizes itself. Exits with 1 if a log-likelihood or a score
differs by more than --tolerance, or if an answer differs.

Knows: lm-eval's command line and the files it writes. Knows nothing of what it computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval_cases
from needs import needs

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "models" / "minisrv-default"
TASKS = ("minisrv_choice", "minisrv_rolling", "minisrv_generate")
PACKAGES = ("lm-eval", "transformers", "torch", "aiohttp")

Answers = dict[tuple[str, int], list[Any]]
"""Answers by task and document: log-likelihoods (for a choice together with whether it is greedy),
or texts."""


def lm_eval(folder: Path, name: str, *model: str) -> tuple[dict[str, float], Answers]:
    """Run lm-eval once, and return the scores and the answers.

    folder: the directory in which it runs, which holds the files of the tasks.
    name: the name of the run, and of its directory of results.
    model: the command-line options for the model.
    Raises CalledProcessError if lm-eval fails.
    """
    out = folder / name
    command = [sys.executable, "-m", "lm_eval", "run", *model, "--tasks", *TASKS]
    command += ["--include_path", str(HERE / "lm_eval_tasks"), "--log_samples"]
    subprocess.run([*command, "--output_path", str(out)], cwd=folder, check=True)
    [results] = out.rglob("results_*.json")
    scores = {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, row in json.loads(results.read_text())["results"].items()
        for metric, value in row.items()
        if metric.endswith(",none") and "stderr" not in metric
    }
    answers: Answers = {}
    for task in TASKS:
        [samples] = out.rglob(f"samples_{task}_*.jsonl")
        for sample in map(json.loads, samples.read_text().splitlines()):
            answers[task, sample["doc_id"]] = [reply for [reply] in sample["resps"]]
    return scores, answers


def compare(reference: Answers, answers: Answers) -> dict[str, float | int]:
    """Return how far the answers differ from those of the reference, which are for the same
    documents."""
    assert reference.keys() == answers.keys()
    found: dict[str, float | int] = {
        "log_likelihoods": 0,
        "largest_difference": 0.0,
        "largest_relative_difference": 0.0,
        "greedy_flags_that_differ": 0,
        "texts": 0,
        "texts_that_differ": 0,
    }
    for key, expected in reference.items():
        for a, b in zip(expected, answers[key], strict=True):
            if key[0] == "minisrv_generate":
                found["texts"] += 1
                found["texts_that_differ"] += a != b
                continue
            (x, greedy_x), (y, greedy_y) = (pair(a), pair(b))
            found["log_likelihoods"] += 1
            found["largest_difference"] = max(found["largest_difference"], abs(x - y))
            found["largest_relative_difference"] = max(
                found["largest_relative_difference"], abs(x - y) / abs(x)
            )
            found["greedy_flags_that_differ"] += greedy_x != greedy_y
    return found


def pair(reply: Any) -> tuple[float, str | None]:
    """Return a log-likelihood, and whether it is greedy, or None where lm-eval does not say. Its
    files hold both as strings."""
    if isinstance(reply, list):
        return float(reply[0]), str(reply[1])
    return float(reply), None


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare local-completions with hf.")
    parser.add_argument("--server", action="append", required=True, metavar="LABEL=URL")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--cases-per-task", type=int, default=20)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nats")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with needs("pip install 'lm-eval[api,hf]'"):
        versions = {name: version(name) for name in PACKAGES}
    report: dict[str, Any] = {"versions": versions, "runs": {}}
    with TemporaryDirectory() as name:
        folder = Path(name)
        lm_eval_cases.write(folder, args.cases_per_task, args.texts, args.seed)
        hf = ("--model", "hf", "--device", "cpu", "--batch_size", "1", "--model_args")
        scores, reference = lm_eval(folder, "hf", *hf, f"pretrained={args.model},dtype=float32")
        report["hf"] = {"scores": scores}
        for server in args.server:
            label, url = server.split("=", 1)
            for form, tokenized in (("token ids", True), ("texts", False)):
                run = f"{label}, {form}"
                options = (
                    f"model={args.model.name},tokenizer={args.model},tokenizer_backend=huggingface,"
                    f"base_url={url}/v1/completions,num_concurrent={args.concurrency},"
                    f"max_length=2048,tokenized_requests={tokenized}"
                )
                found = lm_eval(
                    folder, run, "--model", "local-completions", "--model_args", options
                )
                report["runs"][run] = {"scores": found[0], **compare(reference, found[1])}
    wrong = [
        run
        for run, found in report["runs"].items()
        if found["largest_difference"] > args.tolerance
        or found["greedy_flags_that_differ"]
        or found["texts_that_differ"]
        or any(abs(found["scores"][k] - v) > args.tolerance for k, v in scores.items())
    ]
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for run in wrong:
        print(f"{run}: differs from hf", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
