"""benchmarks/ready.py with servers of the default model, on a CPU."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from benchmarks import ready

SERVE = shlex.join([sys.executable, "-m", "minisrv.cli", "serve"])
SMALL = "--max-num-seqs 1 --max-num-batched-tokens 16 --max-model-len 64"


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["ready.py", *arguments])
    ready.main()


@pytest.mark.parametrize("cold", [False, True])
def test_a_start_has_its_seconds_and_phases(tmp_path, monkeypatch, capfd, cold):
    out, caches = tmp_path / "ready.json", tmp_path / "caches"
    seen = f"sh -c 'echo $XDG_CACHE_HOME >> {caches}; exec {SERVE} {SMALL} \"$@\"' sh"
    servers = ("--server", f"graphs={seen}", "--server", f"eager={SERVE} {SMALL} --enforce-eager")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(monkeypatch, "--rounds", "1", "--json", str(out), *servers, *["--cold"] * cold)

    report = json.loads(out.read_text())
    assert report["environment"]["versions"]["torch"]
    assert report["cold"] == cold
    assert list(report["servers"]) == ["graphs", "eager"]
    for server in report["servers"].values():
        [start] = server["starts"]
        assert {"launcher", "checkpoint", "imports", "weights"} <= start["phases"].keys()
        assert 0 < sum(start["phases"].values()) < 120
        assert 0 < start["seconds"] < start["first_token"] < 120
    printed = capfd.readouterr()
    turns = [line.partition(":")[0] for line in printed.err.splitlines()]
    assert turns == ["warm-up"] * 2 * (not cold) + ["round 1 of 1"] * 2
    assert [line.split()[0] for line in printed.out.splitlines()] == ["server", "graphs", "eager"]
    homes = caches.read_text().split()
    assert len(homes) == (1 if cold else 2)
    assert (str(tmp_path) in homes) == (not cold)


def test_a_server_that_ends_gives_its_last_words(monkeypatch):
    with pytest.raises(SystemExit, match=r"wrong ended with status 3.*\nno such GPU"):
        run(monkeypatch, "--server", "wrong=sh -c 'echo no such GPU; exit 3'")


def test_a_label_names_one_server(monkeypatch, capsys):
    for servers in (["minisrv serve"], ["a=true", "a=true"]):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, *(word for text in servers for word in ("--server", text)))
        assert "LABEL=COMMAND" in capsys.readouterr().err


def test_phases_are_those_of_the_line_that_the_server_logs():
    said = ready._SAID.search("ready in 9.9 s (weights 0.4, two words 10.2): http://h:1/v1, mode x")
    assert said is not None
    assert ready.phases(said[1]) == {"weights": 0.4, "two words": 10.2}
