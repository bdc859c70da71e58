"""Real servers on loopback for the tests: MLflow, S3, PostgreSQL. They can be killed."""

import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}

S3_APPLICATION = """
import sys
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
import logging

application = DomainDispatcherApplication(create_backend_app)
busy, careless = Path(sys.argv[2]), Path(sys.argv[2] + "-careless")

def front(environ, start_response):
    if busy.exists():
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>"]
    if careless.exists():
        environ.pop("HTTP_IF_MATCH", None)
        environ.pop("HTTP_IF_NONE_MATCH", None)
    return application(environ, start_response)

logging.getLogger("werkzeug").setLevel(logging.ERROR)
run_simple("127.0.0.1", int(sys.argv[1]), front, threaded=True)
"""


def free_port():
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server process that answers over HTTP."""

    health = ""
    environment = {}  # noqa: RUF012

    def __init__(self, folder):
        self.folder, self.port, self._process = Path(folder), free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def command(self):
        raise NotImplementedError

    def start(self):
        with (self.folder / f"{type(self).__name__}.log").open("a") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
                env=os.environ | self.environment,
            )  # fmt: skip
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/{self.health}", timeout=2).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return
        raise AssertionError(f"{self.command()} does not answer; see {self.folder}")

    def stop(self):
        """Kill it."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class MLflow(Server):
    """An MLflow server; by default over a SQLite file and a folder of artifacts."""

    health = "health"
    # Else eight more processes start, for jobs that nobody submits.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # noqa: RUF012

    def __init__(self, folder, store=None, artifacts=None):
        super().__init__(folder)
        self.store = store or f"sqlite:///{folder}/server.db"
        self.artifacts = artifacts or f"{folder}/artifacts"

    def command(self):
        return [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.store, "--artifacts-destination", self.artifacts,
        ]  # fmt: skip


class LosesAnswers:
    """A server in front of another one that passes requests on, and loses some of the answers.

    Attributes:
        paths: Ends of the paths whose next answer is lost; it is taken out then.
    """

    def __init__(self, server):
        self.paths = set()
        lost, behind = self.paths, server

        class Handler(http.server.BaseHTTPRequestHandler):
            def pass_on(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection("127.0.0.1", behind.port, timeout=30)
                headers = dict(self.headers) | {"Host": f"127.0.0.1:{behind.port}"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                for path in [path for path in lost if self.path.split("?")[0].endswith(path)]:
                    lost.remove(path)
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


class ModelServer(Server):
    """`mlflow models serve` of a model."""

    health = "ping"

    def __init__(self, folder, model, **environment):
        super().__init__(folder)
        self.model = model
        self.environment = environment | {
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def command(self):
        return [
            sys.executable, "-m", "mlflow", "models", "serve", "-m", self.model,
            "--port", str(self.port), "--env-manager", "local",
        ]  # fmt: skip

    def ask(self, content):
        """Return the status and the text of the answer to a request, JSON unless it is bytes."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.uri}/invocations", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def peak_memory(self):
        """Return the largest resident size in bytes of its worker process so far."""
        pid = self._process.pid
        (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        status = Path(f"/proc/{worker}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class S3(Server):
    """An S3 API that answers 503 while it is `busy`, and may be `careless` about conditions."""

    health = "moto-api/"

    def __init__(self, folder):
        super().__init__(folder)
        self._busy = self.folder / "busy"

    def command(self):
        return [sys.executable, "-c", S3_APPLICATION, str(self.port), str(self._busy)]

    def busy(self, yes):
        """Refuse, or answer again."""
        if yes:
            self._busy.touch()
        else:
            self._busy.unlink()

    @contextlib.contextmanager
    def careless(self):
        """Ignore the conditions of writes, as some servers do."""
        marker = self.folder / "busy-careless"
        marker.touch()
        yield
        marker.unlink()


class PostgreSQL:
    """An empty database; `tools` is the folder of its programs, None where there are none."""

    _installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))  # Debian's, not in PATH
    _initdb = shutil.which("initdb") or (_installed[-1] if _installed else None)
    tools = Path(_initdb).parent if _initdb else None

    def __init__(self):
        # Not in pytest's folder, which every pytest closes to other users.
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="gfl-postgresql-")), free_port()
        self.uri = f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"

    def start(self):
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            shutil.chown(self.folder, "postgres")
        if not (self.folder / "data").exists():
            self._run("initdb", "-D", self.folder / "data", "-A", "trust", "-U", "postgres")
        where = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self._run("pg_ctl", "-D", self.folder / "data", "-o", f"-p {self.port} {where}",
                  "-l", self.folder / "log", "-w", "start")  # fmt: skip

    def stop(self):
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def remove(self):
        """Stop it for good."""
        self.stop()
        shutil.rmtree(self.folder)

    def _run(self, program, *arguments):
        other = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        words = [*other, str(self.tools / program), *map(str, arguments)]
        subprocess.run(words, check=True, capture_output=True, cwd=self.folder)
