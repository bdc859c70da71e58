"""The watcher of spot interruptions, against a metadata service on loopback."""

import json
import os
import threading
from http.client import BadStatusLine
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy import spot


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2: a token first; then 404, or the notice in `server.action`."""

    def do_PUT(self):
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "a token")

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            return self.answer(401, "")
        self.server.asked += 1
        if self.server.asked <= self.server.quiet:
            return self.answer(404, "")
        notice = {"action": "terminate", "time": "2026-01-01T00:00:00Z"}
        return self.answer(200, json.dumps(notice))

    def answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.asked, server.quiet = 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_notice_is_read_with_a_token(metadata):
    metadata.quiet = 1
    assert spot.notice(url(metadata)) is None
    assert spot.notice(url(metadata)) == "terminate"


@pytest.fixture
def ray_command(tmp_path, monkeypatch):
    """A `ray` that refuses until `tmp_path/accepts` is there, and a function: what it was told."""
    (tmp_path / "bin").mkdir()
    command, told, accepts = (tmp_path / name for name in ("bin/ray", "told", "accepts"))
    command.write_text(f'#!/bin/sh\necho "$@" >> {told}\ntest -e {accepts}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    return accepts, lambda: told.read_text().splitlines()


def test_the_node_is_drained_once_at_the_notice(metadata, ray_command):
    accepts, told = ray_command
    accepts.touch()
    metadata.quiet = 2
    assert spot.watch(url(metadata), poll_seconds=0.01)
    (words,) = told()
    assert words.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert words.endswith("--deadline-remaining-seconds 110")
    assert metadata.asked == 3


def test_a_refused_drain_is_tried_again(ray_command):
    accepts, told = ray_command
    threading.Timer(0.5, accepts.touch).start()
    assert spot.drain("terminate", poll_seconds=0.05, grace=60)
    assert len(told()) > 1


def test_a_drain_that_is_always_refused_ends_with_the_notice(ray_command):
    _, told = ray_command
    assert not spot.drain("terminate", poll_seconds=0.05, grace=0.5)
    assert len(told()) > 1


@pytest.mark.parametrize("failure", [OSError("timed out"), BadStatusLine("half"), KeyError("x")])
def test_metadata_that_fails_at_boot_and_later_does_not_end_the_watch(
    ray_command, monkeypatch, failure
):
    accepts, told = ray_command
    accepts.touch()
    answers = iter([failure, None, failure, "terminate"])

    def notice(_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(spot, "notice", notice)
    assert spot.watch(poll_seconds=0.01)
    assert len(told()) == 1


def test_where_nothing_answers_the_watch_ends():
    with pytest.raises(OSError, match=r"no instance metadata .*refused"):
        spot.watch("http://127.0.0.1:9", poll_seconds=0.01, patience_seconds=0.05)


def test_where_there_is_no_metadata_it_says_so():
    with pytest.raises(OSError, match="refused"):
        spot.notice("http://127.0.0.1:9")
