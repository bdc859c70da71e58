"""The promotion history of a model: which version became champion, when, by whom, and why.

Each decision is kept as JSON in a tag of the version that it is about. A decision is written before
the aliases `champion` and `previous` move, and the next command finishes what a crash interrupted.
An alias that somebody moved without a decision, in MLflow's pages for instance, stays where it is;
the promotion history says so.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from gfl_platform.provenance import acting_user, git_state
from gfl_platform.tracking.client import reason_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

GATED_ALIASES = ("champion", "previous")
"""The aliases that only decisions move."""

DECISION = "gfl.decision."
"""Start of the key of every tag that holds a decision."""

MOST_REASONS, LONGEST_REASON = 16, 1000
"""Bounds on what one tag holds: MLflow takes 100 000 characters, MySQL 65 535 bytes."""

RETRY_DELAYS_S = (0.05, 0.2, 1.0)
"""Delays before a write is tried again, in seconds."""


class HistoryError(ValueError):
    """A promotion history or alias that cannot be written."""


@dataclass(frozen=True)
class Decision:
    """One entry of a promotion history.

    Attributes:
        action: What was decided.
        version: The version that the decision is about.
        before: The versions that `champion` and `previous` pointed at before the decision.
        reasons: The reasons, one sentence each.
        figures: Measurements of the candidate and the champion, and the settings of the gate.
        user: Name of the person who decided.
        commit: Commit of the code that decided.
        time_ms: Time of the decision in milliseconds since 1970, later than that of every decision
            that was known when this one was written.
        id: Random text that orders decisions of the same millisecond.
        applied: Whether the aliases have been moved.
        number: Place in the promotion history, from 1.
    """

    action: Literal["promoted", "refused", "rolled back"]
    version: int
    before: dict[str, int]
    reasons: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    user: str = field(default_factory=acting_user)
    commit: str = field(default_factory=lambda: git_state()[0])
    time_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    applied: bool = False
    number: int = 0

    @property
    def aliases(self) -> dict[str, int]:
        """The versions that `champion` and `previous` point at after the decision."""
        if self.action == "refused":
            return self.before
        previous = self.before.get("champion", self.before.get("previous"))
        return {"champion": self.version} | ({} if previous is None else {"previous": previous})


@dataclass(frozen=True)
class History:
    """All decisions on a model, and where its aliases are.

    Attributes:
        decisions: All decisions, also refusals, the oldest first.
        aliases: The versions that `champion` and `previous` point at now.
    """

    decisions: list[Decision]
    aliases: dict[str, int]

    @property
    def champion(self) -> int | None:
        """The version that is champion now, if there is one."""
        return self.aliases.get("champion")

    @property
    def latest_move(self) -> Decision | None:
        """The latest decision that moves aliases, if there is one."""
        moves = [decision for decision in self.decisions if decision.action != "refused"]
        return moves[-1] if moves else None

    @property
    def moved_by_hand(self) -> list[str]:
        """One sentence for each alias that no decision has put where it is."""
        known = [self.latest_move.aliases if self.latest_move else {}]
        known += [decision.aliases for decision in self.decisions[-1:]]
        if self.aliases in known:
            return []
        return [
            f"{alias} was {name_target(known[0], alias)} and is "
            f"{name_target(self.aliases, alias)}, by no decision."
            for alias in GATED_ALIASES
            if self.aliases.get(alias) != known[0].get(alias)
        ]


def read_history(client: "MlflowClient", model: str) -> History:
    """Return the promotion history of `model`; tags that hold no decision are passed over."""
    decisions = []
    for entry in client.search_model_versions(f"name = '{model}'"):
        for key, text in entry.tags.items():
            if not key.startswith(DECISION):
                continue
            try:
                decisions.append(Decision(**json.loads(text)))
            except (ValueError, TypeError):
                logger.warning("%s version %s: tag %s is no decision", model, entry.version, key)
    decisions.sort(key=lambda decision: (decision.time_ms, decision.id))
    aliases = client.get_registered_model(model).aliases
    return History(
        [replace(decision, number=n) for n, decision in enumerate(decisions, start=1)],
        {alias: int(aliases[alias]) for alias in GATED_ALIASES if alias in aliases},
    )


def settle(client: "MlflowClient", model: str) -> History:
    """Finish the latest decision if a crash came before its aliases moved; return the history.

    Raises:
        HistoryError: an alias cannot be moved.
    """
    history = read_history(client, model)
    move = history.latest_move
    if move is None or move.applied:
        return history
    if all(
        history.aliases.get(alias) in (move.before.get(alias), move.aliases.get(alias))
        for alias in GATED_ALIASES
    ):
        _apply(client, model, move)
    else:  # somebody has moved an alias since the crash
        _write(client, model, replace(move, applied=True))
    return read_history(client, model)


def record(client: "MlflowClient", model: str, decision: Decision) -> Decision:
    """Write a decision down, then move the aliases; return the decision with its number.

    Raises:
        HistoryError: the decision cannot be written, or an alias cannot be moved.
    """
    earlier = read_history(client, model)
    decision = replace(
        decision,
        reasons=[
            reason[:LONGEST_REASON]
            for reason in [*earlier.moved_by_hand, *decision.reasons][:MOST_REASONS]
        ],
        time_ms=max([decision.time_ms, *(1 + known.time_ms for known in earlier.decisions)]),
        applied=decision.action == "refused",
    )
    _write(client, model, decision)
    if not decision.applied:
        _apply(client, model, decision)
    decisions = read_history(client, model).decisions
    return next((known for known in decisions if known.id == decision.id), decision)


def _apply(client: "MlflowClient", model: str, decision: Decision) -> None:
    """Point the aliases where a decision, or one that came after it, puts them.

    Of several processes that do so at once, the last one to move an alias looks at the history
    after that, so that the latest decision holds in the end.
    """
    while True:
        for version in decision.aliases.values():  # before an alias moves: a version may be deleted
            _retry(model, partial(client.get_model_version, model, str(version)))
        for alias, version in reversed(decision.aliases.items()):  # `champion` comes last
            _retry(model, partial(client.set_registered_model_alias, model, alias, str(version)))
        _write(client, model, replace(decision, applied=True))
        latest = read_history(client, model).latest_move
        if latest is None or latest.id == decision.id:
            return
        decision = latest


def _write(client: "MlflowClient", model: str, decision: Decision) -> None:
    """Keep a decision as a tag of its version."""
    content = asdict(decision)
    del content["number"]
    key = f"{DECISION}{decision.time_ms}-{decision.id}"
    value = json.dumps(content)
    _retry(model, partial(client.set_model_version_tag, model, str(decision.version), key, value))


def _retry(model: str, write: Callable[[], object]) -> None:
    """Write, and again if another process writes at the same moment, which databases refuse."""
    from mlflow.exceptions import MlflowException

    delays = iter(RETRY_DELAYS_S)
    while True:
        try:
            write()
            return
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise HistoryError(
                    f"{model}: the version is not there any more, so nothing is decided "
                    f"({reason_of(error)}); promote another version"
                ) from error
            delay = next(delays, None)
            if delay is None:
                raise HistoryError(
                    f"{model}: the decision cannot be kept ({reason_of(error)}); try again"
                ) from error
            time.sleep(delay)


def name_target(aliases: dict[str, int], alias: str) -> str:
    """Return what an alias points at, in words."""
    return f"version {aliases[alias]}" if alias in aliases else "nothing"
