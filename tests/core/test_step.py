"""The ids of steps that no scheduler has made."""

from __future__ import annotations

from minisrv.core.step import unscheduled_id


def test_the_id_of_an_unscheduled_step_is_nobody_elses():
    """Such an id is unique and negative, so that a cache keyed by the batch's id takes one trial
    step neither for another one nor for a scheduled step, whose ids begin at 0."""
    ids = [unscheduled_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert max(ids) < 0
