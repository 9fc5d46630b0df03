"""Replicas of Ray Serve answer as `minisrv serve` does, and one whose engine dies is replaced. With
`pip install '.[ray]'` only."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed (pip install '.[ray]')", allow_module_level=True)

import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema

from minisrv.deploy.ray import app
from tests.deploy.test_replica_flags import uncommented

REPLICAS = 2
FLAGS = {"max-num-seqs": 4, "max-num-batched-tokens": 32, "max-model-len": 512}
STORY = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module", params=[False, True], ids=["direct", "prefix-routing"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an application with two replicas and an API key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("secret\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {**FLAGS, "api-key-file": str(keys), "prefix-routing": request.param}
        settings["kv-events-endpoint"] = f"ipc://{keys.parent}/events"
        serve.run(_two_of_each(app(settings)), name="minisrv")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def _two_of_each(application: serve.Application) -> serve.Application:
    """Set the number of the engines' replicas, as a configuration would."""
    deployment = application._bound_deployment
    if deployment.name == "minisrv":
        return deployment.options(num_replicas=REPLICAS).bind(*deployment.init_args)
    (engines,) = deployment.init_args
    return deployment.bind(_two_of_each(engines))


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    headers = {"authorization": "Bearer secret"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client


def test_each_replica_publishes_at_an_endpoint_of_its_own(
    client: httpx.Client, tmp_path_factory: pytest.TempPathFactory
):
    """Both have started, which the second could not do at the endpoint of the first."""
    assert client.get("/ready").status_code == 200
    found = {path.name for path in tmp_path_factory.getbasetemp().glob("keys*/events-*")}
    assert found == {"events-0", "events-1"}


def test_a_completion_is_that_of_a_server(client: httpx.Client):
    whole = client.post("/v1/completions", json=STORY).json()
    assert whole["usage"]["completion_tokens"] == 8
    text = ""
    with client.stream("POST", "/v1/completions", json={**STORY, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    for line in lines[:-1]:
        text += "".join(choice["text"] for choice in json.loads(line)["choices"])
    assert lines[-1] == "[DONE]"
    assert text == whole["choices"][0]["text"]


def test_what_a_server_refuses_is_refused(client: httpx.Client):
    assert client.post("/v1/completions", json={"prompt": 7}).status_code == 400
    assert client.post("/v1/completions", json={"prompt": "x" * (5 << 20)}).status_code == 413
    wrong = {"authorization": "Bearer wrong"}
    assert client.post("/v1/completions", json=STORY, headers=wrong).status_code == 401
    assert client.get("/nowhere").status_code == 404
    stored = client.post("/v1/responses", json={"input": "Once", "store": True})
    assert "replica" in stored.json()["error"]["message"], "the next request may meet another one"
    assert client.get("/ready", headers=wrong).status_code == 200


def test_a_replica_whose_engine_dies_is_replaced(
    client: httpx.Client, request: pytest.FixtureRequest
):
    """Requests that come before Ray knows are sent again where there is a deployment in front."""
    before = _engines()
    assert len(before) == REPLICAS
    dead, replica = before.popitem()
    os.kill(dead, signal.SIGKILL)
    _wait(lambda: not Path(f"/proc/{dead}").exists(), "it has ended")

    def has_ended() -> bool:
        if request.node.callspec.params["url"]:
            for number in range(5):
                prompt = f"{time.monotonic()}, {number}: once upon a time"
                answer = client.post("/v1/completions", json={**STORY, "prompt": prompt})
                assert answer.status_code == 200, answer.text
        return not Path(f"/proc/{replica}").exists()

    _wait(has_ended, "its replica ends")
    for _ in range(8):
        assert client.post("/v1/completions", json=STORY).status_code == 200
    _wait(lambda: len(_engines()) == REPLICAS, "another takes its place")
    assert _engines().items() > before.items()


def test_ray_accepts_the_configuration_and_its_commented_settings():
    page = (Path(__file__).parents[2] / "deploy" / "ray-serve.yaml").read_text()
    ServeDeploySchema.model_validate(yaml.safe_load(page))
    whole = yaml.safe_load(uncommented(page))
    engines, reader = whole["applications"][0]["deployments"]
    del engines["num_replicas"]  # autoscaling_config stands in its place
    assert {"autoscaling_config", "request_router_config", "max_surge_percent"} < engines.keys()
    assert reader["name"] == "prompt-reader"
    ServeDeploySchema.model_validate(whole)


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not within a minute: {what}"
        time.sleep(0.1)


def _engines() -> dict[int, int]:
    """Return the process ids of the engines, and those of the replicas that they belong to."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "status").read_text()
            parent = int(status.split("PPid:")[1].split()[0])
            if status.startswith("Name:\tminisrv-engine\n"):
                command = Path(f"/proc/{parent}/cmdline").read_text()
                if command.startswith("ray::ServeReplica:minisrv:minisrv"):
                    found[int(path.name)] = parent
        except FileNotFoundError:  # it has ended
            continue
    return found
