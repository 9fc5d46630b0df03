"""Shows what replicas of Ray Serve do to requests: how these are spread, what the death of a
replica and an update cost, and how long the first token takes when there is no replica.

    python -m benchmarks.ray_serve --replicas 2 --json ray-2.json

Starts Ray on this machine, and an application with the default model. Under a closed loop of
streams it kills the engine of one replica, then the process of another, and then replaces all
replicas by ones with another setting. At last it lets the deployment scale to zero, and asks for a
completion. Each request ends in one of these ways: `ok`; `error event`, a stream that ends with an
error; `status N`, an answer that is an error; `cut`, a stream that ends with neither. Exits with
status 1 if a request ends otherwise than with `ok` while no replica has just died.

Needs `pip install '.[ray]' httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.streams import Load, free_port, until
from minisrv.tools.environment import environment

FLAGS = {"max-num-seqs": 8, "max-num-batched-tokens": 64, "max-model-len": 512}
SETTLED_SECONDS = 0.5
"""Seconds after a death in which requests may still reach what is dead."""
EXPORTED_SECONDS = 12
"""Seconds in which metrics reach Ray's page: two exports, and Ray's own interval."""


class Application:
    """The application in a Ray of its own.

    replicas: the number of its engines.
    flags: those of every deployment.
    """

    def __init__(self, replicas: int, flags: dict[str, Any]) -> None:
        import ray
        from ray import serve

        from minisrv.deploy.ray import app

        self.serve, self.ray, self.app = serve, ray, app
        self.replicas, self.flags = replicas, flags
        self.metrics_port, self.port = free_port(), free_port()
        ray.init(
            num_cpus=4 * replicas,  # Ray's count of what is reserved, not of what there is
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _metrics_export_port=self.metrics_port,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End Ray."""
        self.serve.shutdown()
        self.ray.shutdown()

    def deploy(self, flags: dict[str, Any], **options: Any) -> float:
        """Deploy with these flags too and options of the engines' deployment; return how many
        seconds it took until every replica was that."""
        began = time.monotonic()
        self.serve.run(_with_options(self.app({**self.flags, **flags}), options), name="minisrv")
        return round(time.monotonic() - began, 2)

    def engines(self) -> dict[int, int]:
        """Return the process ids of the engines, and those of their replicas."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                status = (path / "status").read_text()
                if status.startswith("Name:\tminisrv-engine\n"):
                    parent = int(status.split("PPid:")[1].split()[0])
                    command = Path(f"/proc/{parent}/cmdline").read_text()
                    if command.startswith("ray::ServeReplica:minisrv:minisrv"):
                        found[int(path.name)] = parent
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
        return found

    def running(self) -> int:
        """Return the number of replicas that Ray gives requests to."""
        states = self.serve.status().applications["minisrv"].deployments["minisrv"].replica_states
        return int(states.get("RUNNING", 0))

    async def finished(self) -> list[float]:
        """Return how many choices each replica has finished, by Ray's metrics."""
        async with httpx.AsyncClient() as client:
            page = await client.get(f"http://127.0.0.1:{self.metrics_port}/metrics")
        lines = page.text.splitlines()
        counts: Counter[str] = Counter()
        for line in lines:
            if line.startswith("ray_minisrv_request_success_total{"):
                worker = line.split('WorkerId="')[1].split('"')[0]
                counts[worker] += round(float(line.rsplit(" ", 1)[1]))
        return sorted(counts.values())


def _with_options(application: Any, options: dict[str, Any]) -> Any:
    """Return an application with these options of the engines' deployment, which is that of the
    application or the one behind the prompt reader."""
    deployment = application._bound_deployment
    if deployment.name == "minisrv":
        return deployment.options(**options).bind(*deployment.init_args)
    (engines,) = deployment.init_args
    return deployment.bind(_with_options(engines, options))


async def spread(application: Application, load: Load, seconds: float) -> dict[str, Any]:
    """Measure how a load is spread over the replicas."""
    async with load.running():
        await asyncio.sleep(seconds)
    await asyncio.sleep(EXPORTED_SECONDS)
    return load.summary() | {"finished_by_replica": await application.finished()}


async def death(
    application: Application, load: Load, seconds: float, victim: str
) -> dict[str, Any]:
    """Kill the engine of a replica, or the process of a replica, under load."""
    async with load.running():
        await asyncio.sleep(seconds)
        before = application.engines()
        engine, replica = before.popitem()
        killed = load.now()
        os.kill(engine if victim == "engine" else replica, signal.SIGKILL)
        restored = await until(
            lambda: (
                application.running() == application.replicas
                and len(application.engines()) == application.replicas
                and engine not in application.engines()
            ),
            "another replica takes the place of the dead one",
        )
        await asyncio.sleep(seconds)
    open_then = [each for each in load.ended if each.began <= killed < each.ended]
    late = [each for each in load.ended if each.began > killed + SETTLED_SECONDS]
    soon = [each for each in load.ended if killed < each.began <= killed + SETTLED_SECONDS]
    return load.summary() | {
        "restored_s": restored,
        "open_at_death": dict(Counter(each.how for each in open_then)),
        "begun_within_half_a_second": dict(Counter(each.how for each in soon)),
        "begun_later": dict(Counter(each.how for each in late)),
        "last_failure_after_s": max(
            (round(each.ended - killed, 3) for each in load.ended if each.how != "ok"), default=None
        ),
    }


async def update(application: Application, load: Load, seconds: float) -> dict[str, Any]:
    """Replace all replicas under load."""
    old = application.engines().keys()
    async with load.running():
        await asyncio.sleep(seconds)
        took = await asyncio.to_thread(
            application.deploy,
            {"max-waiting": 512},
            num_replicas=application.replicas,
            max_surge_percent=50,
        )
        gone = await until(lambda: not old & application.engines().keys(), "old replicas end")
        await asyncio.sleep(seconds)
    return load.summary() | {"deployed_s": took, "old_replicas_gone_after_s": gone}


async def zero(application: Application, load: Load) -> dict[str, Any]:
    """Scale to zero, and back by one request."""
    scaling = {"min_replicas": 0, "initial_replicas": 1, "max_replicas": application.replicas}
    delays = {"downscale_delay_s": 3, "upscale_delay_s": 0, "downscale_to_zero_delay_s": 3}
    scaling |= {"target_ongoing_requests": 4, "metrics_interval_s": 1, "look_back_period_s": 2}
    await asyncio.to_thread(
        application.deploy, {"max-waiting": 511}, autoscaling_config=scaling | delays
    )
    await until(lambda: not application.engines(), "the deployment scales to zero")
    load.began = time.monotonic()
    async with httpx.AsyncClient(timeout=120) as client:
        cold = await load.request(client, "Cold")
        warm = await load.request(client, "Warm")
    assert cold.first is not None
    assert warm.first is not None
    return {
        "ends": [cold.how, warm.how],
        "first_token_s": round(cold.first - cold.began, 3),
        "first_token_warm_s": round(warm.first - warm.began, 3),
    }


async def phases(options: argparse.Namespace) -> AsyncIterator[tuple[str, Any]]:
    """Run the phases, and yield the name of each and what it found."""
    flags = {**FLAGS, "prefix-routing": options.prefix_routing}
    application = Application(options.replicas, flags)
    try:
        yield "deployed_s", application.deploy({}, num_replicas=options.replicas)
        load = Load(application.url, options.streams, options.tokens)
        yield "spread", await spread(application, load, options.seconds)
        for victim in ("engine", "replica"):
            yield f"{victim} killed", await death(application, load, options.seconds, victim)
        yield "update", await update(application, load, options.seconds)
        yield "scale to zero", await zero(application, load)
    finally:
        application.close()


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the phases, print what each has found, and return all of it."""
    found = {}
    async for name, values in phases(options):
        print(name, json.dumps(values), flush=True)
        found[name] = values
        if options.json is not None:  # also if a later phase does not end
            settings = {name: value for name, value in vars(options).items() if name != "json"}
            described = msgspec.to_builtins(environment("ray"))
            result = {"environment": described, "settings": settings, "flags": FLAGS}
            options.json.write_text(json.dumps(result | {"phases": found}, indent=1) + "\n")
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """Return what should not have happened."""
    wrong = [
        f"{name}: {found[name]['ends']}"
        for name in ("spread", "update")
        if found[name]["ends"].keys() != {"ok"}
    ]
    wrong += [
        f"{name}: {found[name]['begun_later']}"
        for name in ("engine killed", "replica killed")
        if found[name]["begun_later"].keys() != {"ok"}
    ]
    if found["scale to zero"]["ends"] != ["ok", "ok"]:
        wrong.append(f"scale to zero: {found['scale to zero']['ends']}")
    return wrong


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--seconds", type=float, default=5, help="load before and after each event")
    text = "with the deployment in front that reads bodies"
    parser.add_argument("--prefix-routing", action="store_true", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        import ray  # noqa: F401
    except ImportError:
        sys.exit("ray is not installed; this script needs: pip install '.[ray]' httpx")
    found = asyncio.run(measure(options))
    if wrong := failures(found):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
