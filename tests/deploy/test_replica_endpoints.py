"""No two replicas wait at the same endpoint for readers of KV events. Ray is not needed here."""

from __future__ import annotations

from itertools import product

import pytest

from minisrv.config import ServerConfig
from minisrv.deploy.replica_endpoints import PORTS, check_endpoints, endpoints_of_replica
from minisrv.engine.kv_events import KVEventPublisher
from minisrv.errors import ConfigError


def settings(endpoint: str, replay: str | None = None) -> ServerConfig:
    return ServerConfig(kv_events_endpoint=endpoint, kv_events_replay_endpoint=replay)


def test_endpoints_that_are_accepted_are_of_one_replica_each():
    """Ports that are too close are refused; with all others no endpoint is used twice."""
    accepted = 0
    for distance in range(-2 * PORTS, 2 * PORTS + 1):
        server = settings("tcp://*:5557", f"tcp://*:{5557 + distance}")
        if abs(distance) < PORTS:
            with pytest.raises(ConfigError, match="100 apart"):
                check_endpoints(server)
            continue
        check_endpoints(server)
        accepted += 1
        replicas = [endpoints_of_replica(server, rank) for rank in range(PORTS)]
        used = [
            getattr(replica, name)
            for replica, name in product(
                replicas, ("kv_events_endpoint", "kv_events_replay_endpoint")
            )
        ]
        assert len(set(used)) == 2 * PORTS
    assert accepted == 2 * (PORTS + 1)


def test_the_rank_is_added_to_ports_and_paths():
    server = settings("tcp://router:5557", "ipc:///run/kv/replay")
    check_endpoints(server)
    assert endpoints_of_replica(server, 0).kv_events_endpoint == "tcp://router:5557"
    third = endpoints_of_replica(server, 3)
    assert third.kv_events_endpoint == "tcp://router:5560"
    assert third.kv_events_replay_endpoint == "ipc:///run/kv/replay-3"
    assert endpoints_of_replica(ServerConfig(), 500) == ServerConfig()


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:*", "tcp://*:0", "tcp://*:65500", "inproc://events", "nonsense"]
)
def test_an_endpoint_that_replicas_cannot_divide_is_refused(endpoint: str):
    with pytest.raises(ConfigError, match=r"tcp://\*:5557"):
        check_endpoints(settings(endpoint))


def test_more_replicas_than_ports_are_refused():
    with pytest.raises(ConfigError, match="more than 100 replicas"):
        endpoints_of_replica(settings("tcp://*:5557"), PORTS)


def test_replicas_with_the_same_flags_publish_at_the_same_time(tmp_path):
    server = settings(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
    publishers = []
    try:
        for rank in range(2):
            config = endpoints_of_replica(server, rank).kv_events
            assert config is not None
            private_dir = tmp_path / f"private-{rank}"
            private_dir.mkdir()
            publishers.append(KVEventPublisher(config, private_dir))
        names = {path.name for path in tmp_path.iterdir() if path.is_socket()}
        assert names == {"events-0", "events-1", "replay-0", "replay-1"}
    finally:
        for publisher in publishers:
            publisher.close()
