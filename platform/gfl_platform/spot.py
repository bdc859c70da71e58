"""Leaves a spot node in time: `python spot.py` beside `ray start`, on every spot node.

AWS gives two minutes' notice in the instance's metadata; Ray does not look there. On a notice this
tells Ray to drain the node, so that training goes on elsewhere from a checkpoint. Stands alone: it
is copied to nodes as one file. Elsewhere than on AWS it ends at once.
"""

import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
POLL_SECONDS = 5.0
GRACE_SECONDS = 110
"""Of the two minutes that AWS gives."""

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


def drain(action: str) -> None:
    """Tell Ray that the node it runs on here goes away."""
    subprocess.run(
        [
            *("ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", f"spot interruption: {action}"),
            *("--deadline-remaining-seconds", str(GRACE_SECONDS)),
        ],
        check=True,
    )


def watch(endpoint: str = METADATA, poll_seconds: float = POLL_SECONDS) -> None:
    """Wait for a notice, then drain this node."""
    while True:
        try:
            action = notice(endpoint)
        except OSError as error:  # the service limits how often it is asked
            logger.warning("%s: %s", endpoint, error)
        else:
            if action:
                logger.warning("notice: %s; draining this node", action)
                drain(action)
                return
        time.sleep(poll_seconds)


def _request(method: str, url: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=2) as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        notice(METADATA)
    except OSError as error:
        sys.exit(f"{METADATA}: no instance metadata ({error}); nothing to watch here")
    watch()
