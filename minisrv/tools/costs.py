"""Tables of what steps cost, for `minisrv plan --measure` with a target for ITL: predicted beside
measured times, and the number of prompt tokens that steps take.

Knows: the cost model and the budget of an engine, and how tables are printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from statistics import median

from rich.table import Table

from minisrv.core.budget import Chunk, PrefillBudget
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.modes import BudgetReason

BUDGET_REASONS = {
    BudgetReason.ALL_WAITING: "all prompt tokens that wait are in the step",
    BudgetReason.STEP_LIMIT: "the step has --max-num-batched-tokens",
    BudgetReason.ITL_TARGET: "a larger step would take longer than --itl-target-ms",
    BudgetReason.FAST_ENOUGH: "a larger step would compute hardly more tokens per millisecond",
    BudgetReason.OVER_ITL_TARGET: "any step would take longer than --itl-target-ms, so this is "
    "hardly longer than the shortest",
}
"""Explanations of the reasons for the number of prompt tokens, for the readers of the plan."""

COST_WORDS = {
    "reads": "tokens whose keys and values decode rows read",
    "pairs": "thousands of pairs of a query and a key in the attention of prompts",
    "keys": "keys of the query that has most of them in the attention of prompts",
    "fitted": "the time by the model that was fitted to these steps, in milliseconds",
}
"""Explanations of the words in the table of costs."""


def cost_table(model: CostModel, samples: Sequence[StepSample]) -> Table:
    """Return a table of timed steps with the times that the model has for them."""
    table = Table("batch", "size", "mode", "reads", "pairs", "keys", "ms", "fitted", "error")
    for column in table.columns[3:]:
        column.justify = "right"
    for (mode, key), work, ms in samples:
        predicted = model.predict((mode, key), work)
        table.add_row(
            "decode" if key.uniform_decode else "mixed",
            str(key.num_tokens),
            mode.name,
            str(work.decode_context),
            f"{work.prefill_pairs / 1000:.0f}",
            str(work.longest_prefill),
            f"{ms:.2f}",
            f"{predicted:.2f}",
            f"{100 * (predicted / ms - 1):+.1f}%",
        )
    return table


def fit_summary(model: CostModel, samples: Sequence[StepSample]) -> str:
    """Return a sentence on how well the model predicts the steps to which it was fitted."""
    errors = [abs(model.predict(key, work) / ms - 1) for key, work, ms in samples]
    return (
        f"The predictions differ from the measured times by {100 * median(errors):.1f}% (median) "
        f"and at most {100 * max(errors):.1f}%."
    )


def budget_table(budget: PrefillBudget, max_num_seqs: int, max_model_len: int) -> Table:
    """Return a table of the number of prompt tokens that steps take, by the number of requests that
    decode and their contexts, where more prompts wait than a step can take."""
    table = Table("decoding", "context of each", "prompt tokens", "predicted ms", "reason")
    for column in table.columns[:4]:
        column.justify = "right"
    endless = list(repeat(Chunk(0, max_model_len), 1 + budget.max_num_batched_tokens))
    decodes = sorted({1, 8, 32, max_num_seqs - 1})
    for num_decodes in (0, *(number for number in decodes if 0 < number < max_num_seqs)):
        contexts = sorted({min(length, max_model_len) for length in (128, 2048, 16384)})
        for context in contexts if num_decodes else (0,):
            chosen = budget.choose(num_decodes, num_decodes * context, endless)
            table.add_row(
                str(num_decodes),
                str(context) if num_decodes else "",
                str(chosen.tokens),
                f"{chosen.ms:.2f}",
                chosen.reason.value,
            )
    return table


def budget_words() -> Mapping[str, str]:
    """Return the reasons of the table of budgets with their explanations."""
    return {reason.value: meaning for reason, meaning in BUDGET_REASONS.items()}
