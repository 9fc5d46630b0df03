"""Log-probabilities of sampled tokens, for the requests that ask.

Of the unmodified distribution: before temperature and filters, as the OpenAI API and vLLM report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minisrv.request import TokenLogprobs


def report_logprobs(
    logits: Tensor, token_ids: Tensor, wanted: Sequence[int | None]
) -> list[TokenLogprobs | None] | None:
    """For each row that wants any, its token's log-probability and the best alternatives. None if
    no row does.

    logits: [R, V]. token_ids: [R]. wanted: by row, the number of alternatives or None.
    """
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return None
    logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
    most = max(count or 0 for count in wanted)
    best, ids = (tensor.tolist() for tensor in logprobs.topk(min(most, logits.shape[1]), dim=-1))
    chosen = logprobs.gather(1, token_ids[rows][:, None]).squeeze(1).tolist()
    report: list[TokenLogprobs | None] = [None] * len(wanted)
    for index, row in enumerate(rows):
        count = wanted[row] or 0
        top = list(zip(ids[index][:count], best[index][:count], strict=True))
        report[row] = TokenLogprobs(int(token_ids[row]), chosen[index], top)
    return report
