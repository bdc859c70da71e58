"""The gate before `champion`: a version passes if AP and FPS both do, and leaves a trail.

Candidate and champion are measured on the same images under the same protocol. What was decided,
on which figures and why, is written down first; then the aliases follow (`gfl_platform.trail`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from gfl.bootstrap import Gain, measure_gain
from gfl.configfile import flatten
from gfl.speed import differences, protocol_hash
from gfl_platform import registry
from gfl_platform.config import GateConfig, JobConfig
from gfl_platform.events import Watcher
from gfl_platform.measuring import (
    Measurement,
    images_of,
    measure,
    on_images_of,
    own_job,
    recall,
)
from gfl_platform.registry import RegistryError, Version
from gfl_platform.store import connect
from gfl_platform.trail import Decision, OvertakenError, append, settle

PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".ckpt"})
"""Endings of files that may hold a pickle, which runs code when it is loaded."""

ATTEMPTS = 10
"""How often a decision is made anew because another came first."""


@dataclass
class _Verdict:
    """What speaks for and against a version."""

    reasons: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    passes: bool = True

    def require(self, holds: bool, reason: str) -> None:
        self.reasons.append(reason)
        self.passes &= holds


def promote(job: JobConfig, name: str, number: int, watch: Watcher) -> Decision:
    """Make a version champion if it passes the gate; return what was decided, also a refusal.

    Args:
        job: Says where to measure and which registry; `job.registry.gate` is the gate.
        name: Of the model.
        number: Of the version.
        watch: Is told how far the measurements are.

    Raises:
        ValueError: no such version, or the champion already; a dataset or cluster that cannot be
            used. Nothing is decided then.
        JobFailedError: a worker stopped.
    """
    candidate = registry.find(job, name, str(number))
    measured: dict[int, Measurement] = {}

    def decide(last: Decision | None) -> Decision:
        aliases = last.aliases if last else {}
        champion = aliases.get("champion")
        if champion == number:
            raise RegistryError(f"{name} version {number}: is the champion already")
        verdict = _judge(job, candidate, champion, measured, watch)
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
    """Make the previous champion champion again; return what was decided.

    Raises:
        RegistryError: there is no previous one, or it cannot be loaded.
    """
    registry.list_versions(job, name)  # or there is no such model

    def decide(last: Decision | None) -> Decision:
        if last is None or "previous" not in last.aliases:
            raise RegistryError(f"{name}: no champion before this one, so nothing to go back to")
        number = last.aliases["previous"]
        registry.load(f"models:/{name}/{number}", job)
        aliases = _crowned(number, last.aliases.get("champion"))
        return Decision("rolled back", number, aliases, last.number, [why])

    return _decide(job, name, decide)


def _decide(job: JobConfig, name: str, decide: Callable[[Decision | None], Decision]) -> Decision:
    """Write down what `decide` makes of the last decision, anew if another gets in between."""
    client = connect(job)
    for _ in range(ATTEMPTS):
        try:
            written = append(client, name, decide(settle(client, name)))
        except OvertakenError:
            continue
        settle(client, name)
        return written
    raise RegistryError(f"{name}: others kept deciding in between; try again when they are done")


def _crowned(number: int, champion: int | None) -> dict[str, int]:
    """Return the aliases after a version took the place of the champion."""
    return {"champion": number} | ({} if champion is None else {"previous": champion})


def _judge(
    job: JobConfig,
    candidate: Version,
    champion: int | None,
    measured: dict[int, Measurement],
    watch: Watcher,
) -> _Verdict:
    """Weigh a version against the gate and the champion; what is measured goes to `measured`."""
    gate, verdict = job.registry.gate, _Verdict()
    for fault in _faults(job, candidate):
        verdict.require(False, fault)
    if not verdict.passes:
        return verdict
    own = own_job(job, candidate)
    here = _with_images(own, gate)
    number = candidate.version
    if number not in measured:
        measured[number] = measure(here, candidate, watch)
    mine = measured[number]
    as_trained = mine if here == own else measure(own, candidate, watch)
    _require_reproduced(verdict, candidate, as_trained, gate)
    verdict.figures = {
        "gate": gate.model_dump(mode="json"),
        "data": mine.digest,
        "protocol": protocol_hash(mine.protocol),
        "candidate": _figures(number, mine),
    }
    if champion is not None:
        rival = registry.find(job, candidate.name, str(champion))
        rival_own = own_job(job, rival)
        rival_here = on_images_of(rival_own, here)
        if champion not in measured:
            kept = recall(job, rival, mine.key)
            measured[champion] = kept or measure(rival_here, rival, watch)
        _require_gain(verdict, here, mine, measured[champion], champion)
        _tell_differences(verdict, champion, rival_own, rival_here)
    verdict.require(
        mine.fps >= gate.fps_floor, f"FPS {mine.fps:.1f}, the floor is {gate.fps_floor:g}."
    )
    return verdict


def _with_images(own: JobConfig, gate: GateConfig) -> JobConfig:
    if gate.val is None:
        return own
    return own.model_copy(update={"data": own.data.model_copy(update={"val": gate.val})})


def _faults(job: JobConfig, version: Version) -> Iterator[str]:
    """Give what makes a version's artifacts unfit to be loaded."""
    for path in _artifact_paths(job, version):
        if PurePosixPath(path).suffix in PICKLES:
            yield f"Artifact {path} may hold a pickle, which runs code when it is loaded."
    try:
        registry.load(f"models:/{version.name}/{version.version}", job)
    except ValueError as error:
        yield f"It cannot be loaded: {error}."


def _artifact_paths(job: JobConfig, version: Version) -> Iterator[str]:
    """Give the paths of all files that belong to a version."""
    client = connect(job)
    import mlflow

    location = client.get_model_version_download_uri(version.name, str(version.version))
    folders = [""]
    while folders:
        within = folders.pop()
        for entry in mlflow.artifacts.list_artifacts(f"{location}/{within}".rstrip("/")):
            path = PurePosixPath(within) / PurePosixPath(entry.path).name
            if entry.is_dir:
                folders.append(str(path))
            else:
                yield str(path)


def _require_reproduced(
    verdict: _Verdict, version: Version, found: Measurement, gate: GateConfig
) -> None:
    ap, logged = found.metrics["AP"], version.tags.get("AP")
    if logged is None:
        verdict.require(False, "No AP was logged when it was registered: nothing to reproduce.")
        return
    verdict.require(
        abs(ap - float(logged)) <= gate.ap_tolerance,
        f"AP {ap:.4f} measured again, {float(logged):.4f} logged ({gate.ap_tolerance:g} allowed).",
    )


def _require_gain(
    verdict: _Verdict, job: JobConfig, mine: Measurement, theirs: Measurement, champion: int
) -> None:
    """Require the margin over the champion; say how sure the difference is."""
    gate = job.registry.gate
    split = images_of(job, list(mine.ap_by_class))
    gain = measure_gain(
        split, mine.rows, theirs.rows, job, draws=gate.draws, confidence=gate.confidence
    )
    verdict.figures["champion"] = _figures(champion, theirs)
    verdict.figures["gain"] = {"ap": gain.ap, "low": gain.low, "high": gain.high}
    if theirs.key != mine.key:
        differing = ", ".join(differences(mine.protocol, theirs.protocol))
        verdict.reasons.append(f"The FPS of both do not compare: {differing}.")
    verdict.require(
        gain.ap >= gate.ap_margin,
        f"AP {mine.metrics['AP']:.4f}, the champion (version {champion}) "
        f"{theirs.metrics['AP']:.4f}: {_said(gain, gate)}; required {gate.ap_margin:+g}.",
    )


def _said(gain: Gain, gate: GateConfig) -> str:
    noise = ", within the noise" if gain.is_noise else ""
    interval = f"{100 * gate.confidence:g} % interval {gain.low:+.4f} to {gain.high:+.4f}"
    return f"{gain.ap:+.4f} ({interval}{noise})"


def _tell_differences(
    verdict: _Verdict, champion: int, own: JobConfig, measured_as: JobConfig
) -> None:
    """Say where the champion was not measured as it was trained."""
    before, now = (flatten(job.model_dump(mode="json")) for job in (own, measured_as))
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
    if changed:
        verdict.reasons.append(f"Version {champion} was measured with {', '.join(changed)}.")


def _figures(number: int, measured: Measurement) -> dict[str, Any]:
    return {"version": number, "AP": measured.metrics["AP"], "fps": measured.fps}
