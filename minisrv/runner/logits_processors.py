"""The changes to logits between lm_head and the sampler: logit bias, min_tokens and penalties.

Knows: which slots ask for such changes, and, in a row of device tables for each of them, the tokens
whose logits are increased or decreased and how often the request has had each token. The counts are
updated from the sampled tokens on the device, so that a step which is launched before the last
step's tokens are known finds them. For a request that starts, or resumes after a preemption, they
are computed from the tokens known then. Knows nothing of graphs: it runs after those that end at
the logits, in the same way in every mode.

The semantics are vLLM's, in its order: additions (logit bias, and -inf for tokens that would end
the request too early), the repetition penalty (over prompt and output), the frequency and the
presence penalty (over the output). Log-probabilities are computed from the unchanged logits.
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
"""Bit in a count, besides the number itself: the token is in the prompt."""

_FOREVER = 2**62


@dataclass(frozen=True)
class _Rows:
    """The rows of a step whose logits are changed.

    at: [N] int64, the indices of the rows in the step.
    table: [N] int64, the row of the tables that belongs to each.
    """

    at: Tensor
    table: Tensor


class LogitsProcessors:
    """Changes logits, `vocab_size` in each row. The tables have P rows; P doubles whenever more are
    needed at once.

    counts: [P, vocab] int32, how often each token is in the output, and a bit for whether it is in
        the prompt. This table is the main cost: 600 KB a row with 152k tokens, 156 MB if 256
        requests ask at once.
    added_ids: [P, E] int64, the tokens whose logits are changed by addition; shorter lists end with
        zeros, as in the next two.
    added: [P, E] float32, the number that is added to the logit of each.
    until: [P, E] int64, the position from which on it is not added any more.
    factors: [P, 3] float32: repetition, frequency and presence penalty.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._table_of: dict[int, int] = {}
        self._free: list[int] = []
        self._rows: _Rows | None = None
        self._batch_id: int | None = None
        """Id of the batch to which `_rows` belong."""
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.added_ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.added = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self.until = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.factors = torch.zeros(0, 3, dtype=torch.float32, device=device)

    def start(self, output: SchedulerOutput) -> None:
        """Register the slots that get a new request with a step, and forget those that were freed.
        This must be called before the step."""
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
        # -inf is not an integer, so the added numbers are sent as their bits.
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
        """Make room for one more row, and for that many entries in all rows."""
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
        """Return the logits to sample from.

        logits: [R, vocab] of any float type; not changed.
        positions: [R] int32, the positions of the tokens to be sampled.

        Returns [R, vocab]: `logits` itself if no row asks for a change.
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
        """Return the changed logits of some rows, [N, vocab] float32.

        values: [N, vocab] float32; they are overwritten.
        table: [N] int64, the row of the tables that belongs to each.
        positions: [N] int32, the positions of the tokens to be sampled.
        """
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
        """Add the tokens that a step has sampled to the counts.

        tokens: [R] int64, the sampled tokens.
        """
        found = self._of(step)
        if found is not None:
            at = found.table * self.counts.shape[1] + tokens[found.at]
            self.counts.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def _of(self, step: SchedulerOutput) -> _Rows | None:
        """Return the rows of the step whose logits are changed, or None. They are looked up once
        for a batch: its rows are the same in each of its steps, and no other request gets their
        slots meanwhile."""
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
    """Return a table of that size which begins with this one and is zero elsewhere."""
    grown = table.new_zeros(rows, width)
    grown[: table.shape[0], : table.shape[1]] = table
    return grown
