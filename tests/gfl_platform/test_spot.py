"""The watcher of spot interruptions, against a metadata service on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gfl_platform import spot


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


def test_the_node_is_drained_once_at_the_notice(metadata, monkeypatch):
    metadata.quiet = 2
    drained = []
    monkeypatch.setattr(spot.subprocess, "run", lambda words, check: drained.append(words))
    spot.watch(url(metadata), poll_seconds=0.01)
    (words,) = drained
    assert words[:2] == ["ray", "drain-node"]
    assert "DRAIN_NODE_REASON_PREEMPTION" in words
    assert metadata.asked == 3


def test_where_there_is_no_metadata_it_says_so():
    with pytest.raises(OSError, match="refused"):
        spot.notice("http://127.0.0.1:9")
