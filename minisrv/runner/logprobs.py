"""Log-probabilities of sampled tokens and of prompt tokens, and sums of the hidden states of prompt
tokens, for the requests that ask for them.

Log-probabilities are those of the unmodified distribution, before bias, penalties, temperature and
filters, as the OpenAI API and vLLM report them. Knows: logits and hidden states. Knows nothing of
which prompt tokens are due: the scheduler tells this for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from minisrv.core.step import ScheduledRow, SchedulerOutput
from minisrv.request import EngineOutput, TokenLogprobs
from minisrv.runner.input_buffers import to_device

LOGITS_AT_ONCE = 1 << 24
"""Maximum number of logits that are processed at a time where there may be many. It bounds the
memory for intermediate results, which on a GPU must be available besides the cache."""


@dataclass(frozen=True, slots=True)
class LogprobReport:
    """The log-probabilities that a step reports, by row.

    sampled: the report on the sampled token; None for a row that asks for none.
    prompt: the reports on the consecutive prompt tokens that the row has to score.
    hidden_sums: the sums of the hidden states that the row has to report, as float32.
    """

    sampled: list[TokenLogprobs | None]
    prompt: list[list[TokenLogprobs]]
    hidden_sums: list[bytes]

    def add_to(self, outputs: Iterable[EngineOutput], step: SchedulerOutput) -> None:
        """Add the log-probabilities of a step to its outputs."""
        rows = {row.request_id: index for index, row in enumerate(step.batch_rows)}
        for output in outputs:
            index = rows[output.request_id]
            sampled = self.sampled[index]
            if output.token_ids and sampled is not None:
                output.logprobs = [sampled]
            output.prompt_logprobs = self.prompt[index]
            output.hidden_sum = self.hidden_sums[index]


def report_results(
    rows: Sequence[ScheduledRow],
    logits: Tensor,
    token_ids: Tensor,
    hidden: Tensor,
    compute_logits: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> LogprobReport | None:
    """Return what the rows ask for besides their tokens, for which the host waits; None if they ask
    for nothing.

    logits: [R, V], the unchanged logits of the rows.
    token_ids: [R], the sampled tokens.
    hidden, compute_logits: see `score_prompts`.
    """
    sampled = [row.num_logprobs for row in rows]
    wanted = [row.prompt_logprobs for row in rows]
    if all(count is None for count in sampled) and not any(wanted):
        return None
    prompt: list[list[TokenLogprobs]] = [[] for _ in rows]
    sums = [b""] * len(rows)
    if any(of is not None and of.num_logprobs is not None for of in wanted):
        prompt = score_prompts(rows, hidden, compute_logits, vocab_size)
    if any(of is not None and of.num_logprobs is None for of in wanted):
        sums = sum_hidden_states(rows, hidden)
    return LogprobReport(report_logprobs(logits, token_ids, sampled), prompt, sums)


def sum_hidden_states(rows: Sequence[ScheduledRow], hidden: Tensor) -> list[bytes]:
    """Return for each row the sum of the hidden states that it has to report, as float32; empty for
    a row that has to report none.

    hidden: [T, hidden], the hidden states of the tokens of all rows.
    """
    ends = accumulate(row.num_tokens for row in rows)
    found: dict[int, Tensor] = {}
    for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
        wanted = row.prompt_logprobs
        if wanted is not None and wanted.num_logprobs is None:
            first = end - row.num_tokens + wanted.offset
            states = hidden[first : first + len(wanted.token_ids)]
            found[index] = states.float().sum(dim=0)
    sums = [b""] * len(rows)
    # All are copied together, as the host waits for each copy.
    for index, each in zip(found, torch.stack([*found.values()]).cpu().numpy(), strict=True):
        sums[index] = each.tobytes()
    return sums


def report_logprobs(
    logits: Tensor, token_ids: Tensor, wanted: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Return for each row that asks for it the log-probability of its token and the best
    alternatives, and None for the others.

    logits: [R, V], the logits of the rows.
    token_ids: [R], the sampled tokens.
    wanted: the number of alternatives for each row, or None.
    """
    report: list[TokenLogprobs | None] = [None] * len(wanted)
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if rows:
        found = _report(logits[rows], token_ids[rows], [wanted[row] or 0 for row in rows])
        for row, logprobs in zip(rows, found, strict=True):
            report[row] = logprobs
    return report


def score_prompts(
    rows: Sequence[ScheduledRow],
    hidden: Tensor,
    compute_logits: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> list[list[TokenLogprobs]]:
    """Return for each row the log-probabilities of the prompt tokens that it has to score.

    hidden: [T, hidden], the hidden states of the tokens of all rows.
    compute_logits: a function from [N, hidden] to [N, vocab_size].
    """
    places: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    ends = list(accumulate(row.num_tokens for row in rows))
    scored_by = [
        row.prompt_logprobs
        if row.prompt_logprobs is not None and row.prompt_logprobs.num_logprobs is not None
        else None
        for row in rows
    ]
    for row, wanted, end in zip(rows, scored_by, ends, strict=True):
        if wanted is not None:
            first, number = end - row.num_tokens + wanted.offset, len(wanted.token_ids)
            places += range(first, first + number)
            targets += wanted.token_ids
            counts += [wanted.num_logprobs or 0] * number
    found: list[TokenLogprobs] = []
    at, token_ids = to_device(np.array([places, targets], np.int64), hidden.device)
    at_once = max(1, LOGITS_AT_ONCE // vocab_size)
    for start in range(0, len(places), at_once):
        piece = slice(start, start + at_once)
        logits = compute_logits(hidden.index_select(0, at[piece]))
        found += _report(logits, token_ids[piece], counts[piece])
    scored = iter(found)
    return [[next(scored) for _ in wanted.token_ids] if wanted else [] for wanted in scored_by]


def _report(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Return the log-probabilities of N tokens.

    logits: [N, V], the logits at their positions.
    token_ids: [N] int64, the tokens.
    counts: the number of alternatives to report for each.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    most = min(max(counts), logits.shape[1])
    best, ids = (tensor.tolist() for tensor in logprobs.topk(most, dim=-1))
    own = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > own).sum(dim=1) + 1
    chosen = zip(token_ids.tolist(), own.squeeze(1).tolist(), ranks.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, list(zip(top_ids[:n], top[:n], strict=True)), rank)
        for (token, logprob, rank), top_ids, top, n in zip(chosen, ids, best, counts, strict=True)
    ]
