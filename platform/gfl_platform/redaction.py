"""Secrets are masked where text leaves the program: for MLflow, files, errors and logs.

>>> redact("postgresql://me:hunter2@host/db")
'postgresql://me:***@host/db'
"""

import json
import os
import re
from functools import cache

MASK = "***"

_WORDS = r"signature|credential|token|secret|passw(?:or)?d|pwd|api_?key|access_?key(?:_?id)?"

_IN_URLS = (
    # user:password@, up to the last @; digits and a slash are a port and a path.
    (re.compile(r"""(://[^/:@\s"']*:)(?!\d+/)[^\s"'<>\\]{1,500}@"""), rf"\1{MASK}@"),
    # token@
    (re.compile(r"""(https?://)[^/:@\s"']+@"""), rf"\1{MASK}@"),
    # Presigned queries, and other ones with a secret.
    (
        re.compile(rf"""(?i)([?&;](?:[\w.-]{{0,40}}(?:{_WORDS})|sig|key)=)[^&;\s"'<>\\]+"""),
        rf"\1{MASK}",
    ),
)

_IN_TEXTS = (
    # password: hunter2 in YAML, DB_PASSWORD=hunter2 in a file of settings, "token": "abc" in code.
    (
        re.compile(
            rf"""(?im)^([+-]?[ \t\w.-]{{0,80}}(?:{_WORDS})(?:: +|=))[^\s()\[\]{{}}.,"']+$"""
        ),
        rf"\1{MASK}",
    ),
    (
        re.compile(rf"""(?i)((?:{_WORDS})\w{{0,20}}["']?\s*[:=]\s*["'])[^"'\s]+(?=["'])"""),
        rf"\1{MASK}",
    ),
    (re.compile(r"(?i)\b(bearer |basic )[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\b(?:gh[pousr]|hf)_\w{16,}\b"), MASK),
)

_SECRET_VARIABLE = re.compile(
    r"(?i)(password|passwd|secret|token|credentials?|(api|access|private|secret)_?key(_id)?)$"
)

_SHORTEST = 6
"""Least length of the values of environment variables that are masked: `test` is no secret."""


def redact(text: str) -> str:
    """Return `text` without the secrets in it.

    Masked are passwords and tokens in URLs, presigned queries, assignments to names such as
    `password`, and the values of environment variables such as MLFLOW_TRACKING_PASSWORD.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _names_secret(name):
            text = text.replace(value, MASK).replace(json.dumps(value)[1:-1], MASK)
    for pattern, mask in (*_IN_URLS, *_IN_TEXTS):
        text = pattern.sub(mask, text)
    return text


@cache
def _names_secret(variable: str) -> bool:
    """Return whether an environment variable of this name holds a secret."""
    return _SECRET_VARIABLE.search(variable) is not None


def require_no_credentials(key: str, location: str) -> None:
    """Check that a location, such as a path or a URL, holds no credentials.

    Raises:
        ValueError: it holds some; the message says where they belong.
    """
    if any(pattern.search(location) for pattern, _ in _IN_URLS):
        raise ValueError(
            f"{key}: got {redact(location)!r}: credentials in a location end up in logs; leave "
            "them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, or download "
            "the file and name the copy"
        )
