"""The changes to logits between lm_head and the sampler: logit bias, min_tokens, penalties, and
tokens that a request must not get (`allowed_token_ids`, `bad_words`).

Knows: which requests ask for such changes, and, in a row of device tables for each of them, the
tokens whose logits are increased or decreased, how often the request has had each token, and its
last tokens, as far as words that it must not write are long. Both are updated from the sampled
tokens on the device, so that a step which is launched before the last step's tokens are known finds
them. For a request that starts, or resumes after a preemption, they are computed from the tokens
known then. Knows nothing of graphs: it runs after those that end at the logits, in the same way in
every mode.

The semantics are vLLM's, in its order: additions (logit bias, and -inf for tokens that would end
the request too early), the repetition penalty (over prompt and output), the frequency and the
presence penalty (over the output); -inf for tokens that are not allowed, or would complete a bad
word in the output. Log-probabilities are computed from the unchanged logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisrv.core.step import LogitsProcessorData, NewRequestData, SchedulerOutput
from minisrv.runner.input_buffers import to_device
from minisrv.runner.logprobs import LOGITS_AT_ONCE

_IN_PROMPT = 1 << 30
"""Bit in a count, besides the number itself: the token is in the prompt."""

_FORBIDDEN = 1 << 29
"""Bit in a count: the token is never sampled."""

_FOREVER = 2**62


@dataclass(frozen=True)
class _Rows:
    """The rows of a step whose logits are changed.

    row_indices: [N] int64, the indices of the rows in the step.
    table_rows: [N] int64, the row of the tables that belongs to each.
    """

    row_indices: Tensor
    table_rows: Tensor


class LogitsProcessors:
    """Changes logits, `vocab_size` in each row. The tables have P rows; P doubles whenever more are
    needed at once.

    counts: [P, vocab] int32, how often each token is in the output, and bits for whether it is in
        the prompt and whether it is never sampled. This table is the main cost: 600 KB a row with
        152k tokens, 156 MB if 256 requests ask at once.
    bias_token_ids: [P, E] int64, the tokens whose logits are changed by addition; shorter lists end
        with zeros, as in the next two.
    biases: [P, E] float32, the number that is added to the logit of each.
    bias_end_positions: [P, E] int64, the position from which on it is not added any more.
    penalties: [P, 3] float32: repetition, frequency and presence penalty.
    bad_words: [P, W, L] int64, the bad words of several tokens, each from its last token to its
        first. In this table and the next a token is its id plus one, and 0 stands for none.
    last_tokens: [P, L] int64, the last tokens of the output, the newest first.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._table_row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._rows: _Rows | None = None
        self._batch_id: int | None = None
        """Id of the batch to which `_rows` belong."""
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.bias_token_ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.biases = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self.bias_end_positions = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.penalties = torch.zeros(0, 3, dtype=torch.float32, device=device)
        self.bad_words = torch.zeros(0, 0, 1, dtype=torch.int64, device=device)
        self.last_tokens = torch.zeros(0, 0, dtype=torch.int64, device=device)

    def update_requests(self, output: SchedulerOutput) -> None:
        """Enter the new requests of a step, and forget those whose request indices were freed. This
        must be called before the step."""
        for req_index in output.freed_req_indices:
            self._free.append(self._table_row_of.pop(req_index))
        for request in output.new_reqs:
            if request.logits_processors is not None:
                self._add_request(request, request.logits_processors)

    def _add_request(self, request: NewRequestData, data: LogitsProcessorData) -> None:
        params, prompt, output = request.params, data.prompt_token_ids, data.output_token_ids
        first_stop = len(prompt) + params.min_tokens
        stops = data.stop_token_ids if params.min_tokens else ()
        entries = [(i, amount, _FOREVER) for i, amount in params.logit_bias.items()]
        entries += [(i, -np.inf, first_stop) for i in stops]
        words = [word for word in params.bad_words_token_ids if len(word) > 1]
        self._make_room(len(entries), len(words), max(map(len, words), default=1))
        table_row = self._table_row_of[request.req_index] = self._free.pop()
        # -inf is not an integer, so the biases are sent as their bits.
        packed = np.zeros((3, self.biases.shape[1]), np.int64)
        if entries:
            ids, biases, ends = zip(*entries, strict=True)
            packed[:, : len(ids)] = ids, np.array(biases, np.float64).view(np.int64), ends
        sent = to_device(packed, self._device)
        self.bias_token_ids[table_row] = sent[0]
        self.biases[table_row] = sent[1].view(torch.float64).float()
        self.bias_end_positions[table_row] = sent[2]
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        bits = np.array(penalties, np.float64).view(np.int64)
        self.penalties[table_row] = to_device(bits, self._device).view(torch.float64).float()
        counts = self.counts[table_row].zero_()
        if params.has_penalties:
            known = to_device(np.array(prompt + output, np.int64), self._device)
            in_prompt, sampled = known.split([len(prompt), len(output)])
            counts.index_fill_(0, in_prompt, _IN_PROMPT)
            counts.scatter_add_(0, sampled, torch.ones_like(sampled, dtype=torch.int32))
        single = [word[0] for word in params.bad_words_token_ids if len(word) == 1]
        if params.allowed_token_ids or single:
            others = _FORBIDDEN if params.allowed_token_ids else 0
            forbidden = np.full(len(counts), others, np.int64)
            forbidden[list(params.allowed_token_ids)] = 0
            forbidden[single] = _FORBIDDEN
            counts |= to_device(forbidden, self._device).to(torch.int32)
        _, number, length = self.bad_words.shape
        if number:
            backwards = np.zeros((1 + number, length), np.int64)
            for line, tokens in zip(backwards, [output[-length:], *words], strict=False):
                line[: len(tokens)] = np.array(tokens[::-1], np.int64) + 1
            lines = to_device(backwards, self._device)
            self.last_tokens[table_row], self.bad_words[table_row] = lines[0], lines[1:]

    def _make_room(self, entries: int, words: int, length: int) -> None:
        """Make room for one more row, and in all rows for that many entries, and bad words of that
        length."""
        rows, width = self.biases.shape
        more = 0 if self._free else max(rows, 1)
        if more or entries > width:
            width = max(width, entries)
            self.bias_token_ids = _grown(self.bias_token_ids, rows + more, width)
            self.biases = _grown(self.biases, rows + more, width)
            self.bias_end_positions = _grown(self.bias_end_positions, rows + more, width)
        _, most, longest = self.bad_words.shape
        if more or words > most or length > longest:
            most, longest = max(most, words), max(longest, length)
            self.bad_words = _grown(self.bad_words, rows + more, most, longest)
            self.last_tokens = _grown(self.last_tokens, rows + more, longest)
        if more:
            self.counts = _grown(self.counts, rows + more, self.counts.shape[1])
            self.penalties = _grown(self.penalties, rows + more, self.penalties.shape[1])
            self._free += range(rows, rows + more)

    def apply(self, step: SchedulerOutput, logits: Tensor, positions: Tensor) -> Tensor:
        """Return the logits to sample from.

        logits: [R, vocab] of any float type; not changed.
        positions: [R] int32, the positions of the tokens to be sampled.

        Returns [R, vocab]: `logits` itself if no row asks for a change.
        """
        changed = self._changed_rows(step)
        if changed is None:
            return logits
        result = logits.to(torch.float32, copy=True)
        at_once = max(1, LOGITS_AT_ONCE // logits.shape[1])
        for row_indices, table_rows in zip(
            changed.row_indices.split(at_once), changed.table_rows.split(at_once), strict=True
        ):
            values = result.index_select(0, row_indices)
            values = self._changed(values, table_rows, positions[row_indices])
            result.index_copy_(0, row_indices, values)
        return result

    def _changed(self, values: Tensor, table_rows: Tensor, positions: Tensor) -> Tensor:
        """Return the changed logits of some rows, [N, vocab] float32.

        values: [N, vocab] float32; they are overwritten.
        table_rows: [N] int64, the row of the tables that belongs to each.
        positions: [N] int32, the positions of the tokens to be sampled.
        """
        applies = positions[:, None] < self.bias_end_positions[table_rows]
        biases = self.biases[table_rows].masked_fill(~applies, 0.0)
        values.scatter_add_(1, self.bias_token_ids[table_rows], biases)
        counts = self.counts[table_rows]
        repetition, frequency, presence = self.penalties[table_rows].split(1, dim=1)
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(counts > 0, repeated, values)
        forbidden = (counts & _FORBIDDEN) != 0
        counts &= _FORBIDDEN - 1
        values = values - frequency * counts - presence * (counts > 0)
        values = values.masked_fill(forbidden, -torch.inf)
        return self._without_bad_words(values, table_rows)

    def _without_bad_words(self, values: Tensor, table_rows: Tensor) -> Tensor:
        """Return the values without the tokens that would complete a bad word of several tokens;
        arguments as in `_changed`."""
        _, number, length = self.bad_words.shape
        if not number:
            return values
        words = self.bad_words[table_rows]
        last, before = words[..., 0], words[..., 1:]
        is_there = (before == self.last_tokens[table_rows, None, : length - 1]) | (before == 0)
        completes = is_there.all(-1) & (last > 0)
        falls = torch.zeros_like(last, dtype=torch.float32).masked_fill(completes, -torch.inf)
        return values.scatter_add_(1, (last - 1).clamp(min=0), falls)

    def count_sampled_tokens(self, step: SchedulerOutput, tokens: Tensor) -> None:
        """Add the tokens that a step has sampled to the counts and the last tokens.

        tokens: [R] int64, the sampled tokens.
        """
        changed = self._changed_rows(step)
        if changed is not None:
            at = changed.table_rows * self.counts.shape[1] + tokens[changed.row_indices]
            self.counts.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
            if self.bad_words.shape[1]:
                last = self.last_tokens[changed.table_rows].roll(1, dims=1)
                last[:, 0] = tokens[changed.row_indices] + 1
                self.last_tokens.index_copy_(0, changed.table_rows, last)

    def _changed_rows(self, step: SchedulerOutput) -> _Rows | None:
        """Return the rows of the step whose logits are changed, or None. They are looked up once
        for a batch: its rows are the same in each of its steps, and no other request gets their
        request indices meanwhile."""
        if step.batch_id != self._batch_id:
            table_row_of = self._table_row_of
            found = [
                (row_index, table_row_of[row.req_index])
                for row_index, row in enumerate(step.batch_rows)
                if row.samples_token and row.req_index in table_row_of
            ]
            self._rows = None
            if found:
                sent = to_device(np.array(found, np.int64).T.copy(), self._device)
                self._rows = _Rows(*sent.unbind())
            self._batch_id = step.batch_id
        return self._rows


def _grown(table: Tensor, *shape: int) -> Tensor:
    """Return a table of that shape which begins with this one and is zero elsewhere."""
    grown = table.new_zeros(shape)
    grown[tuple(map(slice, table.shape))] = table
    return grown
