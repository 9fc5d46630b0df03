"""The verification of a step that requests have had: it is recorded as it runs by its graphs, then
run again eagerly on copies, and the two are compared as a certification compares them.

The eager run is at the same padded shape with the same kernels. Its rows have request indices for
trials, with copies of the inputs that the step found there. The blocks to which the step wrote are
copied; those that it only read are read where they are, and must not be free before the end.
Hidden states, logits, sampled tokens, the cache entries of the step and the next inputs of its rows
must be equal bit for bit. Of everything else that the step could have written, the tensors of all
requests and some blocks of the cache are watched.

Knows: what of a step is kept, and the order of the eager run. Knows nothing of which steps are
verified, nor of what follows a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from minisrv.certification.compare import compare_values
from minisrv.certification.digest import digest_
from minisrv.certification.generation import Turn, Visit
from minisrv.certification.trial import BufferedTrial, TrialSpace, true_of
from minisrv.core.kv_cache import BlockPool
from minisrv.core.step import ScheduledRow, SchedulerOutput, unscheduled_id
from minisrv.graph.captured import CapturedGraph
from minisrv.modes import CUDAGraphMode, GraphKey, Stage, StageOutput
from minisrv.runner.generation import Generation
from minisrv.runner.input_buffers import Upload, to_device
from minisrv.runner.model_runner import ModelRunner


class Disagreement(NamedTuple):
    """What a step did otherwise than its eager run.

    keys: the graphs that may be at fault.
    what: what differed, in words.
    """

    keys: list[GraphKey]
    what: str


class StepRecord:
    """A step of requests as it ran, and what it found.

    output: the step.
    blocks: the blocks of the requests to which its rows write, by request index: (index in the
        block table, block).
    tables: all blocks of the rows, by request index.
    stages: the stages that have run, with the graph that each was replayed by.
    results: what the step computed, by name, in the order in which it is computed.
    before: the tensors of the requests as the step found them.
    masks: the bitmask of its rows, where an epilogue has run.
    """

    def __init__(
        self,
        runner: ModelRunner,
        output: SchedulerOutput,
        tables: Mapping[int, Sequence[int]],
        watched: Sequence[int],
    ) -> None:
        """Begin the record of a step whose inputs are in their buffers and that is launched next.

        watched: blocks which the step must not change where they are not its own.
        """
        self.output = output
        self.rows = output.rows
        self.tables = tables
        self.stages: list[tuple[GraphKey, CapturedGraph | None]] = []
        self.results: dict[str, Tensor] = {}
        self.masks: Tensor | None = None
        self._runner = runner
        self._device = runner.kv_caches[0].device
        size, entries = runner.block_size, []
        self.blocks: dict[int, list[tuple[int, int]]] = {}
        for row in self.rows:
            start, end = row.num_computed_tokens, row.num_computed_tokens + row.num_tokens
            table = tables[row.req_index]
            written = written_blocks(row, size)
            self.blocks[row.req_index] = [(index, table[index]) for index in written]
            positions = np.arange(start, end)
            entries.append(np.array(table, np.int64)[positions // size] * size + positions % size)
        own = np.concatenate(entries)
        watched = [*watched, *(block for pairs in self.blocks.values() for _, block in pairs)]
        of_watched = np.unique(watched)[:, None] * size + np.arange(size)
        self._written = to_device(own, self._device)
        protected = np.setdiff1d(of_watched, own, assume_unique=True)
        self._protected = to_device(protected.astype(np.int64), self._device)
        req_indices = np.array([row.req_index for row in self.rows], np.int64)
        self.req_indices = to_device(req_indices, self._device)
        tensors = vars(runner.request_tensors)
        self.before = {name: tensor.clone() for name, tensor in tensors.items()}
        self._protected_before = entry_digests(runner, self._protected)
        self._changed: dict[str, Tensor] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all stages of the step have run."""
        return bool(self.stages) and self.stages[-1][0][1].output is not StageOutput.HIDDEN

    @property
    def name(self) -> str:
        """The stages of the step, for a log."""
        return ", ".join(f"{mode.name} {key.num_tokens}" for (mode, key), _ in self.stages)

    def begin_stage(self, key: GraphKey) -> None:
        """Record what a stage finds that is launched next."""
        if key[1].stage is Stage.EPILOGUE:
            self.masks = self._runner.buffers.bitmask[: len(self.rows)].clone()

    def end_stage(self, key: GraphKey) -> None:
        """Record what a stage has done that was launched last."""
        runner, buffers = self._runner, self._runner.buffers
        self.stages.append((key, runner.graphs.get(key)))
        if key[1].stage is Stage.MODEL:
            hidden = buffers.hidden[: self.output.num_tokens].clone()
            self.results |= model_results(runner, hidden, self._written)
        if self.is_complete:
            self.results |= final_results(runner, key, self.req_indices)
            self._find_changes()

    def _find_changes(self) -> None:
        """Find, on the device, what the step has changed besides what it computes."""
        found = entry_digests(self._runner, self._protected)
        self._changed["cache entries outside of the step"] = found != self._protected_before
        for name, tensor in vars(self._runner.request_tensors).items():
            before = self.before[name]
            if name in ("last_token", "next_position"):
                before, tensor = (t.index_fill(0, self.req_indices, 0) for t in (before, tensor))
            self._changed[f"{name} of a request index"] = before != tensor

    def unexpected_writes(self) -> list[str]:
        """Return descriptions of what the step changed although it must not."""
        return true_of(self._changed)


def entry_digests(runner: ModelRunner, entries: Tensor) -> Tensor:
    """Return the digests of cache entries, [layers, entries]."""
    digests = [digest_(cache.flatten(0, 1).index_select(0, entries)) for cache in runner.kv_caches]
    return torch.stack(digests)


def model_results(runner: ModelRunner, hidden: Tensor, written: Tensor) -> dict[str, Tensor]:
    """Return what the stage of a model computes.

    hidden: a copy of the hidden states of the step's tokens.
    written: the cache entries of these tokens.
    """
    return {"hidden states": hidden, "bits of the cache": entry_digests(runner, written)}


def final_results(runner: ModelRunner, key: GraphKey, req_indices: Tensor) -> dict[str, Tensor]:
    """Return what the last stage of a step computes, as copies. Behind logits, tokens are sampled
    without a graph.

    req_indices: those of its rows.
    """
    buffers, tensors = runner.buffers, runner.request_tensors
    rows = len(req_indices)
    found = {"next positions": tensors.next_position[req_indices]}
    if key[1].output is StageOutput.LOGITS:
        return {"logits": buffers.logits[:rows].clone(), **found}
    tokens = buffers.sampled_token_ids[:rows].clone()
    return {"tokens": tokens, "last tokens": tensors.last_token[req_indices], **found}


class ShadowTrial(BufferedTrial):
    """The eager run of a recorded step on copies.

    results: what it has computed, as `StepRecord.results`.
    """

    def __init__(self, runner: ModelRunner, space: TrialSpace, record: StepRecord) -> None:
        device = runner.kv_caches[0].device
        own = np.array(space.req_indices[: len(record.rows)], np.int64)
        super().__init__(record.name, runner, space, record.stages[0][0], to_device(own, device))
        self._record = record
        self.results: dict[str, Tensor] = {}
        free = iter(space.blocks)
        copies = {block: next(free) for pairs in record.blocks.values() for _, block in pairs}
        rows, new_blocks, entries = [], [], []
        size = runner.block_size
        for row, req_index in zip(record.rows, space.req_indices, strict=False):
            table = [copies.get(block, block) for block in record.tables[row.req_index]]
            new_blocks += [(req_index, index, block) for index, block in enumerate(table)]
            positions = row.num_computed_tokens + np.arange(row.num_tokens)
            entries.append(np.array(table, np.int64)[positions // size] * size + positions % size)
            rows.append(
                msgspec.structs.replace(
                    row,
                    request_id=f"trial-{req_index}",
                    req_index=req_index,
                    num_logprobs=None,
                    use_structured_output=False,
                    has_logits_processors=False,
                    prompt_logprobs=None,
                )
            )
        step_id = unscheduled_id()
        self.output = SchedulerOutput(
            step_id=step_id,
            batch_id=step_id,
            batch_rows=rows,
            new_reqs=[],
            new_blocks=new_blocks,
            num_decodes=record.output.num_decodes,
            num_tokens=record.output.num_tokens,
        )
        self._written = to_device(np.concatenate(entries), device)
        self._copies = [
            to_device(np.array([*blocks], np.int64), device)
            for blocks in (copies.keys(), copies.values())
        ]

    def prepare(self) -> None:
        """Copy what the step found to the request indices and the blocks of the trial."""
        tensors, record = self.runner.request_tensors, self._record
        self._fill_buffers(poison=False)
        self._fill_request_tensors(poison=False)
        originals, copies = self._copies
        for cache in self.runner.kv_caches:
            cache.index_copy_(0, copies, cache.index_select(0, originals))
        upload = Upload()
        tensors.apply(self.output, upload)
        upload.send(self.req_indices.device)
        for name, before in record.before.items():
            if name != "block_table":
                getattr(tensors, name)[self.req_indices] = before[record.req_indices]
        self._keep_request_tensors()

    @torch.no_grad()
    def run(self) -> None:
        """Run the stages of the step eagerly, each at its padded shape."""
        runner, record = self.runner, self._record
        stages = tuple((CUDAGraphMode.NONE, key[1]) for key, _ in record.stages)
        attn = runner.prepare(self.output, stages)
        runner.launch(stages[0], self.output, attn)
        hidden = runner.buffers.hidden[: self.output.num_tokens].clone()
        self.results = model_results(runner, hidden, self._written)
        for stage in stages[1:]:
            assert record.masks is not None, "an epilogue was recorded"
            runner.buffers.bitmask[: len(record.masks)] = record.masks
            runner.launch(stage, self.output)
        self.results |= final_results(runner, stages[-1], self.req_indices)


def num_written_blocks(output: SchedulerOutput, block_size: int) -> int:
    """Return the number of blocks to which a step writes, which is that of the free blocks that its
    verification takes."""
    return sum(len(written_blocks(row, block_size)) for row in output.rows)


def written_blocks(row: ScheduledRow, block_size: int) -> range:
    """Return the indices, in the block table of its request, of the blocks to which a row
    writes. No other row writes to them."""
    start, end = row.num_computed_tokens, row.num_computed_tokens + row.num_tokens
    return range(start // block_size, (end - 1) // block_size + 1)


def verify_step(
    runner: ModelRunner, blocks: Sequence[int], record: StepRecord, turn: Turn
) -> Disagreement | None:
    """Run a recorded step again eagerly, in turns with the steps of requests, and return where the
    two differ; None if they do not.

    blocks: those that `take_blocks` has taken.
    """
    trial = ShadowTrial(runner, TrialSpace.of(runner, blocks), record)
    with Visit(runner, trial, Generation.in_service(runner), turn):
        turn.begin_part(f"{trial.name}: the eager run of a step that is verified")
        trial.prepare()
        trial.run()
    replayed = [key for key, graph in record.stages if graph is not None]
    if writes := record.unexpected_writes():
        return Disagreement(replayed, f"it changed {', '.join(writes)}, which no row of it owns")
    difference = compare_values(trial.results, record.results)
    if difference is None:
        return None
    is_of_model = difference.name in ("hidden states", "bits of the cache")
    at_fault = [key for key in replayed if (key[1].stage is Stage.MODEL) == is_of_model]
    what = f"{difference.name} differ from the eager run's {difference.words}"
    return Disagreement(at_fault or replayed, what)


def take_blocks(pool: BlockPool, record: StepRecord) -> list[int]:
    """Take the free blocks that the verification of a step needs. `BlockPool.give_back` takes them
    back. Since the step was launched, no other has been, so none is missing that was free then."""
    needed = num_written_blocks(record.output, pool.block_size)
    assert needed <= pool.num_free, "there were as many when the step was launched"
    blocks = pool.reserve(needed)
    return sorted([*blocks, *pool.evict(needed - len(blocks))])
