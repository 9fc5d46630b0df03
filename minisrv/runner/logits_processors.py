"""What changes logits between lm_head and the sampler: logit bias, min_tokens, penalties.

Knows: which slots ask for it, and of each, in a row of device tables, the tokens that get something
added and how often the request has had each token. The counts follow the sampled tokens on the
device, so that a step which is launched before the last one's tokens are known finds them; for a
request that starts, or comes back from a preemption, they are made anew of what is known then.
Knows nothing of graphs: it runs behind those that end at the logits, the same in every mode.

The semantics are vLLM's, in its order: what is added (logit bias, and -inf to tokens that would end
the request too early), the repetition penalty (over prompt and output), the frequency and the
presence penalty (over the output). Log-probabilities are of the logits before, which stay as
they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisrv.core.step import ProcessorStart, SchedulerOutput, SlotStart
from minisrv.runner.input_buffers import to_device
from minisrv.runner.logprobs import LOGITS_AT_ONCE

_IN_PROMPT = 1 << 30
"""In a count, beside it: the token is in the prompt."""

_FOREVER = 2**62


@dataclass(frozen=True)
class _Rows:
    """Rows of a step whose logits are changed. at: [N] int64, which rows. table: [N] int64, the row
    of the tables that each has."""

    at: Tensor
    table: Tensor


class LogitsProcessors:
    """Of `vocab_size` logits each. P rows of tables, as many as were wanted at once so far.

    counts: [P, vocab] int32, how often each token is in the output, and whether in the prompt. It
        is what this costs: 600 KB a row with 152k tokens, 156 MB if 256 requests ask at once.
    added_ids: [P, E] int64, added: [P, E] float32, until: [P, E] int64: tokens to whose logits is
        added, what, and the position up to which; shorter lists end with zeros.
    factors: [P, 3] float32: repetition, frequency and presence penalty.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._table_of: dict[int, int] = {}
        self._free: list[int] = []
        self._rows: _Rows | None = None
        self._batch_id: int | None = None
        """The batch that these rows are of."""
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.added_ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.added = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self.until = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.factors = torch.zeros(0, 3, dtype=torch.float32, device=device)

    def start(self, output: SchedulerOutput) -> None:
        """Take note of slots that change hands with a step; comes before it."""
        for slot in output.freed_slots:
            self._free.append(self._table_of.pop(slot))
        for start in output.new_slots:
            if start.processors is not None:
                self._begin(start, start.processors)

    def _begin(self, start: SlotStart, history: ProcessorStart) -> None:
        params = start.params
        first_stop = len(history.prompt) + params.min_tokens
        stops = history.stop_token_ids if params.min_tokens else ()
        entries = [(i, amount, _FOREVER) for i, amount in params.logit_bias.items()]
        entries += [(i, -np.inf, first_stop) for i in stops]
        self._reserve(len(entries))
        table = self._table_of[start.slot] = self._free.pop()
        # -inf is no integer: what is added goes by its bits.
        packed = np.zeros((3, self.added.shape[1]), np.int64)
        if entries:
            ids, added, until = zip(*entries, strict=True)
            packed[:, : len(ids)] = ids, np.array(added, np.float64).view(np.int64), until
        sent = to_device(packed, self._device)
        self.added_ids[table] = sent[0]
        self.added[table] = sent[1].view(torch.float64).float()
        self.until[table] = sent[2]
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        bits = np.array(penalties, np.float64).view(np.int64)
        self.factors[table] = to_device(bits, self._device).view(torch.float64).float()
        counts = self.counts[table].zero_()
        if params.has_penalties:
            known = to_device(np.array(history.prompt + history.output, np.int64), self._device)
            prompt, sampled = known.split([len(history.prompt), len(history.output)])
            counts.index_fill_(0, prompt, _IN_PROMPT)
            counts.scatter_add_(0, sampled, torch.ones_like(sampled, dtype=torch.int32))

    def _reserve(self, entries: int) -> None:
        """Make room for one more row, and in all rows for so many entries."""
        rows, width = self.added.shape
        more = 0 if self._free else max(rows, 1)
        if more or entries > width:
            width = max(width, entries)
            self.added_ids = _grown(self.added_ids, rows + more, width)
            self.added = _grown(self.added, rows + more, width)
            self.until = _grown(self.until, rows + more, width)
        if more:
            self.counts = _grown(self.counts, rows + more, self.counts.shape[1])
            self.factors = _grown(self.factors, rows + more, self.factors.shape[1])
            self._free += range(rows, rows + more)

    def process(self, step: SchedulerOutput, logits: Tensor, positions: Tensor) -> Tensor:
        """The logits to sample from.

        logits: [R, vocab] any float type; not changed. positions: [R] int32, of the tokens to be
            sampled. Returns [R, vocab], `logits` itself if no row asks for a change.
        """
        found = self._of(step)
        if found is None:
            return logits
        processed = logits.to(torch.float32, copy=True)
        at_once = max(1, LOGITS_AT_ONCE // logits.shape[1])
        for at, table in zip(found.at.split(at_once), found.table.split(at_once), strict=True):
            values = processed.index_select(0, at)
            processed.index_copy_(0, at, self._changed(values, table, positions[at]))
        return processed

    def _changed(self, values: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        """values: [N, vocab] float32, used up. table: [N] int64, positions: [N] int32."""
        applies = positions[:, None] < self.until[table]
        added = self.added[table].masked_fill(~applies, 0.0)
        values.scatter_add_(1, self.added_ids[table], added)
        counts = self.counts[table]
        repetition, frequency, presence = self.factors[table].split(1, dim=1)
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(counts > 0, repeated, values)
        counts &= _IN_PROMPT - 1
        changed: Tensor = values - frequency * counts - presence * (counts > 0)
        return changed

    def count(self, step: SchedulerOutput, tokens: Tensor) -> None:
        """Take note of what a step has sampled. tokens: [R] int64."""
        found = self._of(step)
        if found is not None:
            at = found.table * self.counts.shape[1] + tokens[found.at]
            self.counts.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def _of(self, step: SchedulerOutput) -> _Rows | None:
        """The rows of a batch are the same in each of its steps, and nobody else gets their slots
        meanwhile."""
        if step.batch_id != self._batch_id:
            table_of = self._table_of
            found = [
                (at, table_of[row.slot])
                for at, row in enumerate(step.batch_rows)
                if row.samples and row.slot in table_of
            ]
            self._rows = None
            if found:
                sent = to_device(np.array(found, np.int64).T.copy(), self._device)
                self._rows = _Rows(*sent.unbind())
            self._batch_id = step.batch_id
        return self._rows


def _grown(table: Tensor, rows: int, width: int) -> Tensor:
    """A table of that size which begins with this one; zeros elsewhere."""
    grown = table.new_zeros(rows, width)
    grown[: table.shape[0], : table.shape[1]] = table
    return grown
