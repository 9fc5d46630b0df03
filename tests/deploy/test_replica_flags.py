"""The configuration for Ray Serve is valid, also where its commented lines are taken in, and means
what the same flags of `minisrv serve` mean. Ray is not needed here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from minisrv.cli import serve_settings
from minisrv.config import EngineConfig, ServerConfig
from minisrv.deploy.replica_flags import flags_of
from minisrv.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "deploy" / "ray-serve.yaml").read_text()


def uncommented(page: str) -> str:
    """Return the page with its commented settings taken in."""
    return re.sub(
        r"^( *)# ((?:  )*[a-z_-]+: *[^ #\n].*|[a-z_]+:|- name: .*)$", r"\1\2", page, flags=re.M
    )


def args_of(page: str) -> dict[str, Any]:
    (application,) = yaml.safe_load(page)["applications"]
    found: dict[str, Any] = application["args"]
    return found


def test_the_configuration_is_that_of_a_server():
    flags = flags_of(args_of(PAGE))
    assert serve_settings(flags) == (EngineConfig(), ServerConfig(request_timeout=50))


def test_the_commented_arguments_are_flags_with_their_defaults(tmp_path: Path):
    args = args_of(uncommented(PAGE))
    assert args.keys() > args_of(PAGE).keys() | {"model", "kv-cache-memory", "api-key-file"}
    assert args.pop("prefix-routing") is False
    (tmp_path / "keys").write_text("one\ntwo\n")
    args["api-key-file"] = str(tmp_path / "keys")
    engine, server = serve_settings(flags_of(args))
    assert engine == EngineConfig(model="Qwen/Qwen3-0.6B", kv_cache_memory=16 << 30)
    assert server == ServerConfig(request_timeout=50, api_keys=("one", "two"))


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"max-num-seqs": 8}, ["--max-num-seqs=8"]),
        ({"max_num_seqs": "8"}, ["--max-num-seqs=8"]),
        ({"enforce-eager": True}, ["--enforce-eager"]),
        ({"async-scheduling": "false"}, ["--no-async-scheduling"]),
        ({"model": None}, []),
        (
            {"allowed-hosts": ["a.example", "b.example"]},
            ["--allowed-hosts", "a.example", "b.example"],
        ),
        ({"model": "-x"}, ["--model=-x"]),
    ],
)
def test_settings_become_flags(settings: dict[str, Any], flags: list[str]):
    assert flags_of(settings) == flags
    serve_settings(flags)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 1}, "http_options"),
        ({"api_workers": 2}, "num_replicas"),
        ({"api-key": "secret"}, "api-key-file"),
        ({"no-such": 1}, "there is no --no-such"),
        ({"max-num-seqs": "many"}, "invalid int value"),
        ({"max-num-seqs": 0}, "max_num_seqs=0 is not allowed"),
    ],
)
def test_wrong_settings_raise_an_error_and_do_not_end_the_program(
    settings: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        serve_settings(flags_of(settings))
