"""Leaves a spot node in time: `python spot.py` beside `ray start`, on every spot node.

AWS gives two minutes' notice in the instance's metadata; Ray does not look there. On a notice this
tells Ray to drain the node, so that training goes on elsewhere from a checkpoint. Stands alone: it
is copied to nodes as one file. Elsewhere than on AWS it ends after a minute.
"""

import http.client
import json
import logging
import math
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
POLL_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
"""For the metadata service's first answer: a network may come up later than this."""

GRACE_SECONDS = 110
"""Of the two minutes that AWS gives."""

UNANSWERED = (OSError, http.client.HTTPException, ValueError, KeyError)
"""What comes of a metadata service that is away, busy or answers half."""

logger = logging.getLogger("spot")


def notice(endpoint: str) -> str | None:
    """Return what happens to this instance (`terminate`, `stop`, `hibernate`), None if nothing.

    Args:
        endpoint: URL of the instance metadata service.

    Raises:
        OSError: no metadata service answers.
    """
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _request("PUT", f"{endpoint}/latest/api/token", lifetime)
    try:
        path = f"{endpoint}/latest/meta-data/spot/instance-action"
        answer = _request("GET", path, {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    return str(json.loads(answer)["action"])


def drain(action: str, poll_seconds: float = POLL_SECONDS, grace: float = GRACE_SECONDS) -> bool:
    """Tell Ray that the node it runs on here goes away, until it has heard or the time is over.

    Args:
        action: Of the notice.
        poll_seconds: Between two attempts.
        grace: Seconds that are left.

    Returns:
        Whether Ray has heard.
    """
    until = time.monotonic() + grace
    while (left := until - time.monotonic()) > 0:
        command = [
            *("ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", f"spot interruption: {action}"),
            *("--deadline-remaining-seconds", str(math.ceil(left))),
        ]
        try:
            subprocess.run(command, check=True, timeout=left)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("not drained: %s", error)
            time.sleep(poll_seconds)
        else:
            return True
    return False


def watch(
    endpoint: str = METADATA,
    poll_seconds: float = POLL_SECONDS,
    patience_seconds: float = PATIENCE_SECONDS,
) -> bool:
    """Wait for a notice, then drain this node; return whether Ray has heard.

    Args:
        endpoint: URL of the instance metadata service.
        poll_seconds: Between two questions.
        patience_seconds: For its first answer; once it has answered, it is asked for ever.

    Raises:
        OSError: nothing has answered.
    """
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            action = notice(endpoint)
            give_up = math.inf
        except UNANSWERED as error:  # the service limits how often it is asked
            if time.monotonic() > give_up:
                raise OSError(f"{endpoint}: no instance metadata ({error})") from error
            logger.warning("%s: %s", endpoint, error)
        else:
            if action:
                logger.warning("notice: %s; draining this node", action)
                return drain(action, poll_seconds)
        time.sleep(poll_seconds)


def _request(method: str, url: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=2) as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        sys.exit(None if watch() else "Ray has not heard of the notice: the node was not drained")
    except OSError as error:
        sys.exit(f"{error}; nothing to watch here")
