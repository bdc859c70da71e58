"""The gate before `champion`: a version passes if AP and FPS both do, and leaves a trail.

Candidate and champion are measured on the same images under the same protocol. What was decided,
on which figures and why, is written down first; then the aliases follow (`gfl_platform.registry.history`).
"""

from collections.abc import Callable
from typing import Final

from gfl_platform.cluster.events import Watcher
from gfl_platform.config import JobConfig
from gfl_platform.judging import Judge
from gfl_platform.registry import models
from gfl_platform.registry.history import Decision, OvertakenError, append, read_trail, settle
from gfl_platform.registry.models import RegistryError
from gfl_platform.tracking.client import connect

ROLLED_BACK: Final = "rolled back"

ATTEMPTS = 10
"""How often a decision is made anew because another came first."""


def promote(job: JobConfig, name: str, number: int, watch: Watcher) -> Decision:
    """Make a version champion if it passes the gate; return what was decided, also a refusal.

    If it is the champion already, as after a crash, that is the decision that made it so.

    Args:
        job: Says where to measure and which registry; `job.registry.gate` is the gate.
        name: Of the model.
        number: Of the version.
        watch: Is told how far the measurements are.

    Raises:
        ValueError: no such version; a dataset or cluster that cannot be used. Nothing is decided
            then.
        JobFailedError: a worker stopped.
    """
    candidate = models.find(job, name, str(number))
    judge = Judge(job, candidate, watch)

    def decide(last: Decision | None) -> Decision:
        aliases = last.aliases if last else {}
        champion = aliases.get("champion")
        if last and champion == number:
            return _crowning(job, name, last)
        verdict = judge.weigh(champion)
        if verdict.passes:
            aliases = _crowned(number, champion)
        return Decision(
            "promoted" if verdict.passes else "refused",
            number,
            aliases,
            last.number if last else 0,
            verdict.reasons,
            verdict.figures,
        )

    return _decide(job, name, decide)


def rollback(job: JobConfig, name: str, why: str) -> Decision:
    """Make the version champion that was so before the present one; return what was decided.

    If another rollback has come first, or was interrupted, that is what it decided.

    Raises:
        RegistryError: there is no previous one, or it cannot be loaded, or a promotion came first.
    """
    versions = models.list_versions(job, name)
    unwanted = next((v.version for v in versions if "champion" in v.aliases), None)

    def decide(last: Decision | None) -> Decision:
        champion = last.aliases.get("champion") if last else None
        if last and champion != unwanted:
            if last.action == ROLLED_BACK:
                return last
            raise RegistryError(f"{name}: champion is version {champion} now; nothing rolled back")
        if last is None or "previous" not in last.aliases:
            raise RegistryError(f"{name}: no champion before this one, so nothing to go back to")
        number = last.aliases["previous"]
        models.load(f"models:/{name}/{number}", job, "cpu")
        aliases = _crowned(number, champion)
        return Decision(ROLLED_BACK, number, aliases, last.number, [why])

    return _decide(job, name, decide)


def _decide(job: JobConfig, name: str, decide: Callable[[Decision | None], Decision]) -> Decision:
    """Write down what `decide` makes of the last decision, anew if another gets in between."""
    client = connect(job)
    for _ in range(ATTEMPTS):
        try:
            decision = decide(settle(client, name))
            if decision.number:  # it was made before
                return decision
            now = settle(client, name)
            if decision.based_on != (now.number if now else 0):  # meanwhile; also by hand
                continue
            written = append(client, name, decision)
        except OvertakenError:
            continue
        settle(client, name)
        return written
    raise RegistryError(f"{name}: others kept deciding in between; try again when they are done")


def _crowning(job: JobConfig, name: str, last: Decision) -> Decision:
    """Return the decision that made the champion of `last` champion."""
    champion, crowning = last.aliases["champion"], last
    for decision in reversed(read_trail(connect(job), name)):
        if not decision.void and decision.number <= last.number:
            if decision.aliases.get("champion") != champion:
                break
            crowning = decision
    return crowning


def _crowned(number: int, champion: int | None) -> dict[str, int]:
    """Return the aliases after a version took the place of the champion."""
    return {"champion": number} | ({} if champion is None else {"previous": champion})
