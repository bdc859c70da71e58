"""The trail of a model: which version became champion, when, by whom, on what figures, and why.

A decision is a version of a second registered model, NAME-decisions. The store itself numbers them,
on SQLite, on PostgreSQL and behind a server alike, so that they have one order without any lock.
Each names the decision that it is based on: if another got in between, it is void.

The aliases `champion` and `previous` follow the trail. Whoever comes next finishes what a crash has
interrupted, and writes down what somebody has moved by hand.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from gfl_platform.provenance import acting_user, git_state
from gfl_platform.tracking.client import reason_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

FOLLOWED = ("previous", "champion")
"""The aliases that the trail decides on, in the order in which they are moved."""

OF_MODEL = "gfl.decisions_of"
"""Tag of a registered model that is the trail of another."""

DECISION, APPLIED = "decision", "applied"

SECOND_LOOK_S = 1.0
"""What has been moved by hand stays moved; another's promotion is through by then."""

LATE_S = 30.0
"""For so long what a slow promoter wrote over a later decision is taken back, not noted."""

Action = Literal["promoted", "refused", "rolled back", "moved by hand"]


class TrailError(ValueError):
    """A trail that cannot be written."""


class OvertakenError(Exception):
    """Another decision came first; this one is void."""


@dataclass(frozen=True)
class Decision:
    """One entry of the trail.

    Attributes:
        action: What was decided.
        version: Of the model, that it was decided about; None where a hand took an alias away.
        aliases: Where `champion` and `previous` point afterwards.
        based_on: Number of the decision that was the last when this one was made; 0 of the first.
        reasons: Why, a sentence each.
        figures: What was measured of the candidate and the champion.
        user: Who decided; of a hand, who noticed.
        commit: Of the code that decided.
        time_s: When, in seconds since 1970.
        number: Its place in the trail, from 1.
        applied: Whether the aliases have been moved.
        void: Whether another decision came between it and the one that it is based on.
    """

    action: Action
    version: int | None
    aliases: dict[str, int]
    based_on: int
    reasons: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    user: str = field(default_factory=acting_user)
    commit: str = field(default_factory=lambda: git_state()[0])
    time_s: float = field(default_factory=time.time)
    number: int = 0
    applied: bool = False
    void: bool = False


def trail_of(model: str) -> str:
    """Return the name of the registered model that holds the decisions on `model`."""
    return f"{model}-decisions"


def read_trail(client: "MlflowClient", model: str) -> list[Decision]:
    """Return all decisions on `model`, the first first, also those that are void.

    A version that is no decision is passed over; one may have been, before somebody changed its
    tags, so that the next may be based on it.
    """
    found = client.search_model_versions(f"name = '{trail_of(model)}'", max_results=10_000)
    decisions: list[Decision] = []
    bases = {0}
    for entry in sorted(found, key=lambda entry: int(entry.version)):
        number = int(entry.version)
        try:
            decision = Decision(**json.loads(entry.tags[DECISION]), number=number)
        except (KeyError, ValueError, TypeError):
            logger.warning("%s version %d: is no decision; passed over", trail_of(model), number)
            bases.add(number)
            continue
        void = decision.based_on not in bases
        bases = bases if void else {number}
        decisions.append(replace(decision, applied=APPLIED in entry.tags, void=void))
    return decisions


def append(client: "MlflowClient", model: str, decision: Decision) -> Decision:
    """Write a decision down, and return it with its number; the aliases are `settle`'s business.

    Raises:
        OvertakenError: another came first.
        TrailError: the trail cannot be written.
    """
    from mlflow.exceptions import MlflowException

    told = {k: v for k, v in asdict(decision).items() if k not in ("number", "applied", "void")}
    why = " ".join(decision.reasons)
    try:
        _open(client, model)
        entry = client.create_model_version(
            trail_of(model),
            f"decision:/{model}/{decision.version}",  # there is nothing to load
            tags={DECISION: json.dumps(told)},
            description=f"{decision.action} {decision.version}: {why}"[:5000],
            await_creation_for=0,
        )
    except MlflowException as error:
        raise TrailError(f"{trail_of(model)}: {reason_of(error)}; try again") from error
    written = read_trail(client, model)
    if next(each for each in written if each.number == int(entry.version)).void:
        raise OvertakenError
    return replace(decision, number=int(entry.version))


def settle(client: "MlflowClient", model: str) -> Decision | None:
    """Make trail and aliases agree, and return the decision that holds, None before the first."""
    moved_to = 0
    seen: dict[str, int] | None = None
    while True:
        valid = _valid(client, model)
        last = valid[max(valid)] if valid else None
        actual = _followed(client, model)
        wanted = last.aliases if last else {}
        if actual == wanted:
            if last and not last.applied:
                entry = (trail_of(model), str(last.number))
                _firmly(partial(client.set_model_version_tag, *entry, APPLIED, "yes"))
            return replace(last, applied=True) if last else None
        before = valid[last.based_on].aliases if last and last.based_on in valid else {}
        left_behind = 0 < moved_to != (last.number if last else 0)
        if last and (
            left_behind or _is_between(actual, before, last) or _is_late(actual, valid.values())
        ):
            _move(client, model, actual, last)  # what a crash, or a slower promoter, left behind
            moved_to = last.number
        elif seen != actual:
            seen = actual
            time.sleep(SECOND_LOOK_S)
        else:
            _note_hand(client, model, last, actual)


def _valid(client: "MlflowClient", model: str) -> dict[int, Decision]:
    """Return the decisions that are not void, by number."""
    return {each.number: each for each in read_trail(client, model) if not each.void}


def _is_late(actual: Mapping[str, int], valid: Iterable[Decision]) -> bool:
    """Whether aliases are as a decision of just now wanted them, which another has replaced."""
    since = time.time() - LATE_S
    return any(each.time_s > since and actual == each.aliases for each in valid)


def _is_between(actual: Mapping[str, int], before: Mapping[str, int], last: Decision) -> bool:
    """Whether aliases are on their way from the last decision but one to the last."""
    return not last.applied and all(
        actual.get(alias) in (before.get(alias), last.aliases.get(alias)) for alias in FOLLOWED
    )


def _move(
    client: "MlflowClient", model: str, actual: Mapping[str, int], decision: Decision
) -> None:
    """Point the aliases as decided, unless another decision comes first."""
    for alias in FOLLOWED:
        wanted = decision.aliases.get(alias)
        if actual.get(alias) == wanted:
            continue
        if max(_valid(client, model)) != decision.number:
            return
        if wanted is None:
            _firmly(partial(client.delete_registered_model_alias, model, alias))
        else:
            _firmly(partial(client.set_registered_model_alias, model, alias, str(wanted)))


def _firmly(write: Callable[[], None]) -> None:
    """Write; again where another process wrote the same at the same moment, which stores refuse."""
    from mlflow.exceptions import MlflowException

    for wait in (0.05, 0.2, 1.0):
        try:
            return write()
        except MlflowException:
            time.sleep(wait)
    return write()


def _note_hand(
    client: "MlflowClient", model: str, last: Decision | None, actual: dict[str, int]
) -> None:
    """Write down aliases that no decision explains."""
    was = last.aliases if last else {}
    reasons = [
        f"{alias} was {_said(was.get(alias))} and is {_said(actual.get(alias))}, by no decision."
        for alias in reversed(FOLLOWED)
        if was.get(alias) != actual.get(alias)
    ]
    based_on = last.number if last else 0
    user = f"unknown, noticed by {acting_user()}"
    noted = Decision("moved by hand", actual.get("champion"), actual, based_on, reasons, user=user)
    try:
        append(client, model, noted)
    except OvertakenError:
        return


def _said(version: int | None) -> str:
    return f"version {version}" if version else "nothing"


def _followed(client: "MlflowClient", model: str) -> dict[str, int]:
    aliases = client.get_registered_model(model).aliases
    return {alias: int(aliases[alias]) for alias in FOLLOWED if alias in aliases}


def _open(client: "MlflowClient", model: str) -> None:
    """Make the registered model that holds the trail, unless there is one."""
    from mlflow.exceptions import MlflowException

    name = trail_of(model)
    try:
        client.create_registered_model(
            name,
            tags={OF_MODEL: model},
            description=f"Decisions on {model}, a version each; see `jobs.registry history`.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if client.get_registered_model(name).tags.get(OF_MODEL) != model:
            raise TrailError(
                f"{name}: is a model of its own, so {model} can have no trail; rename one"
            ) from error
