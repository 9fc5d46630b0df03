"""Servers that cannot start: exit status 1, one line that says why, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from minisrv.checkpoint import resolve_checkpoint
from tests.e2e.server import SMALL, Server, until
from tests.e2e.test_start_and_stop import free_port

Start = Callable[..., Server]


def assert_refused(server: Server, *words: str) -> None:
    """Check that the server ended with status 1 and a single line of error with these words."""
    assert server.wait() == 1
    problems = [line for line in server.log.splitlines() if "INFO" not in line]
    assert len(problems) == 1, server.log
    assert all(word in problems[0] for word in words), problems[0]
    server.assert_nothing_left()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the default model, which the test damages."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(resolve_checkpoint(None), directory)
    return directory


def last_shard(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.safetensors"))[-1]


def test_truncated_weights(start: Start, checkpoint: Path) -> None:
    shard = last_shard(checkpoint)
    os.truncate(shard, shard.stat().st_size - 1000)
    assert_refused(start(*SMALL, str(checkpoint)), "did not start", shard.name, "cannot be read")


def test_a_missing_shard(start: Start, checkpoint: Path) -> None:
    shard = last_shard(checkpoint)
    shard.unlink()
    assert_refused(start(*SMALL, str(checkpoint)), shard.name, "not there")


def test_missing_weights(start: Start, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers + 1}))
    server = start(*SMALL, str(checkpoint))
    assert_refused(server, "did not start", "11 missing", f"model.layers.{layers}.")


def test_a_chat_template_that_is_none(start: Start, checkpoint: Path) -> None:
    """An invalid template is found before the engine loads, and not by a worker after that."""
    (checkpoint / "chat_template.jinja").write_text("{% if %}")
    server = start(*SMALL, str(checkpoint))
    assert_refused(server, "chat template is not valid", "--chat-template")
    assert "loading weights" not in server.log


def test_no_checkpoint(start: Start, tmp_path: Path) -> None:
    assert_refused(start(*SMALL, str(tmp_path)), "has no config.json")


def test_a_port_in_use(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert_refused(
            start(*SMALL, "--port", port), "cannot listen on 127.0.0.1:" + port, "in use"
        )


def test_two_servers_on_one_port(start: Start) -> None:
    """Of two servers that start at the same time, before either of them serves, one is refused."""
    flags = (*SMALL, "--port", free_port())
    servers = [start(*flags), start(*flags)]
    refused = until_one_ends(servers)
    assert_refused(refused, "cannot listen on", "in use")
    (other,) = (server for server in servers if server is not refused)
    assert other.wait_ready().complete("x", max_tokens=1)["choices"]


def until_one_ends(servers: list[Server]) -> Server:
    """The first of the servers that ends."""

    def ended() -> list[Server]:
        return [server for server in servers if server.process.poll() is not None]

    return until(ended, "one of them gives up")[0]


def test_capture_sizes_that_leave_a_gap(start: Start) -> None:
    server = start(*SMALL, "--cudagraph-capture-sizes", "1", "2")
    assert_refused(server, "cudagraph_capture_sizes", "add 8 to the sizes")


def test_a_graph_that_no_memory_holds(start: Start) -> None:
    """A capture size above the tokens of a step is refused by its number, before anything is
    allocated."""
    server = start(*SMALL, "--cudagraph-capture-sizes", "8", "999999")
    assert_refused(server, "cudagraph_capture_sizes name 999999", "max_num_batched_tokens=64")


def test_full_graphs_on_a_cpu(start: Start) -> None:
    """The mode is refused before torch is imported."""
    server = start(*SMALL, "--device", "cpu", "--cudagraph-mode", "full")
    assert_refused(server, "cudagraph_mode=full", "use full-and-piecewise")


def test_more_context_than_the_model_has(start: Start) -> None:
    server = start("--max-model-len", "1000000")
    assert_refused(server, "max_model_len=1000000", "use at most 2048")


def test_a_gpu_where_there_is_no_driver(start: Start) -> None:
    """The missing driver is found before torch is imported."""
    assert_refused(start(*SMALL, "--device", "cuda"), "device=cuda", "no CUDA driver", "nvidia-smi")


def test_a_temporary_directory_too_deep_for_a_socket(start: Start) -> None:
    assert_refused(start(*SMALL, temporary="d" * 100), "set TMPDIR to a shorter directory")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("import tempfile; tempfile.tempdir = '/nowhere/at/all'", "No such file or directory"),
        # A limit on the size of files stands for a full disk, which a test cannot have.
        ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))", "too large"),
    ],
    ids=["missing", "full"],
)
def test_no_temporary_directory_that_can_be_used(start: Start, trouble: str, words: str) -> None:
    server = start(*SMALL, before=trouble)
    assert_refused(server, "no temporary directory that can be used", words, "set TMPDIR")
