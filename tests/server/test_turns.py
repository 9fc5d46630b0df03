"""An API worker whose event loop makes no progress is ended by the kernel, whatever blocks it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from minisrv.processes import describe_exit_status

_PROGRAM = """\
import asyncio, time
from minisrv.server import worker
from minisrv.text.chat_template import ChatTemplate

worker.TURN_SECONDS = 2
worker.TURN_SECONDS_OF_A_PROCESSOR = 0

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def compare():
    lists = "{% set a = [1] %}{% set b = [1] %}"
    lists += "{% set a = [a, a] %}{% set b = [b, b] %}" * 60
    template = ChatTemplate({"default": lists + "{{ a == b }}"}, {})
    template.render([{"role": "user", "content": "x"}], True)

async def main():
    watch = asyncio.create_task(worker.watch_event_loop())
    await asyncio.sleep(0)
    for _ in range(6):  # busy for longer than the limit, with turns
        await asyncio.to_thread(work, 0.5)
    print("lives", flush=True)
    {last}
    watch.cancel()

asyncio.run(main())
work(3)  # its end has time
"""


@pytest.mark.parametrize(
    ("last", "status"),
    [("pass", 0), ("await asyncio.to_thread(compare)", -signal.SIGPROF)],
    ids=["with turns", "an operation without end"],
)
def test_a_loop_without_turns(last: str, status: int) -> None:
    program = _PROGRAM.replace("{last}", last)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == "lives\n"
    if status:
        assert "would not end" in describe_exit_status(done.returncode)
