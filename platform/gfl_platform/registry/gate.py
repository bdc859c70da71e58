"""The gate before `champion`: a version passes if AP and FPS both do, and leaves a trail.

Candidate and champion are measured on the same images under the same protocol. What was decided,
on which figures and why, is written down first; then the aliases follow (`history`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Final

from gfl.config.loader import config_hash, flatten
from gfl.evaluation.bootstrap import Gain, measure_gain
from gfl.evaluation.protocol import differences, protocol_hash
from gfl_platform.cluster.events import Watcher
from gfl_platform.cluster.launch import JobFailedError
from gfl_platform.cluster.resources import ClusterError
from gfl_platform.config import GateConfig, JobConfig
from gfl_platform.evaluation.benchmark import recall_fps
from gfl_platform.registry import models
from gfl_platform.registry.history import Decision, OvertakenError, append, read_trail, settle
from gfl_platform.registry.measurement import (
    Measurement,
    at_settings_of,
    images_of,
    measure,
    on_images_of,
    own_job,
    recall,
)
from gfl_platform.registry.models import RegistryError, Version
from gfl_platform.tracking.client import connect

PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".ckpt"})
"""Endings of files that may hold a pickle, which runs code when it is loaded."""


@dataclass
class Verdict:
    """What speaks for and against a version."""

    reasons: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    passes: bool = True

    def require(self, holds: bool, reason: str) -> None:
        """Note a reason; the version passes only if all of them hold."""
        self.reasons.append(reason)
        self.passes &= holds


class Judge:
    """Weighs a version against the gate and a champion; measures nothing twice."""

    def __init__(self, job: JobConfig, candidate: Version, watch: Watcher) -> None:
        """Take the version, `job.registry.gate` as the gate, and whom to tell of progress."""
        self._job = job
        self._candidate = candidate
        self._watch = watch
        self._measured: dict[tuple[int, str], Measurement] = {}

    def weigh(self, champion: int | None) -> Verdict:
        """Return the verdict; `champion` is the version to be replaced, if there is one.

        Raises:
            ValueError: a dataset or cluster that cannot be used.
            JobFailedError: a worker stopped.
        """
        gate, candidate, verdict = self._job.registry.gate, self._candidate, Verdict()
        for fault in _faults(self._job, candidate):
            verdict.require(False, fault)
        if not verdict.passes:
            return verdict
        own = own_job(self._job, candidate)
        here = _with_images(own, gate)
        mine = self._measure(here, candidate)
        _require_reproduced(verdict, candidate, self._measure(own, candidate), gate)
        verdict.figures = {
            "gate": gate.model_dump(mode="json"),
            "data": mine.digest,
            "protocol": protocol_hash(mine.protocol),
            "candidate": _figures(candidate.version, mine),
        }
        if champion is not None and gate.compare:
            self._try_gains(verdict, here, mine, champion)
        elif champion is not None:
            verdict.reasons.append(f"Not compared with the champion (version {champion}), as told.")
        self._require_fps(verdict, mine)
        return verdict

    def _try_gains(
        self, verdict: Verdict, here: JobConfig, mine: Measurement, champion: int
    ) -> None:
        """Require the margin; a champion that cannot be measured on these images is a reason."""
        try:
            self._require_gains(verdict, here, mine, champion)
        except ClusterError:  # which says nothing of the champion
            raise
        except (ValueError, JobFailedError) as error:
            verdict.require(
                False,
                f"The champion (version {champion}) cannot be measured: {error}. To promote "
                "without a comparison: registry.gate.compare=false.",
            )

    def _require_gains(
        self, verdict: Verdict, here: JobConfig, mine: Measurement, champion: int
    ) -> None:
        """Require the margin over the champion run as the candidate, and as it is itself."""
        rival = models.find(self._job, self._candidate.name, str(champion))
        own = own_job(self._job, rival)
        alike, itself = at_settings_of(own, here), on_images_of(own, here)
        theirs = self._measure(alike, rival, mine.key)
        verdict.figures["champion"] = _figures(champion, theirs)
        gain = _require_gain(verdict, here, mine, theirs, f"version {champion}")
        verdict.figures["gain"] = {"ap": gain.ap, "low": gain.low, "high": gain.high}
        if theirs.key != mine.key:
            differing = ", ".join(differences(mine.protocol, theirs.protocol))
            verdict.reasons.append(f"The FPS of both do not compare: {differing}.")
        _tell_differences(verdict, champion, own, alike)
        if itself != alike:
            theirs = self._measure(itself, rival, _expected_key(mine, itself))
            verdict.figures["champion at its own settings"] = _figures(champion, theirs)
            _require_gain(verdict, here, mine, theirs, f"version {champion}, at its own settings")

    def _require_fps(self, verdict: Verdict, mine: Measurement) -> None:
        """Require the floor, of the latest benchmark where there is one under this protocol."""
        floor = self._job.registry.gate.fps_floor
        fps, where = mine.fps, ""
        benchmark = recall_fps(self._job, self._candidate.run_id, protocol_hash(mine.protocol))
        if benchmark is not None:
            fps, where = benchmark, " in its benchmark"
            verdict.figures["candidate"]["benchmark_fps"] = benchmark
        verdict.require(fps >= floor, f"FPS {fps:.1f}{where}, the floor is {floor:g}.")

    def _measure(self, job: JobConfig, version: Version, key: str | None = None) -> Measurement:
        """Return what is measured of a version; with `key`, what is kept of it will do."""
        way = (version.version, config_hash(job))
        if way not in self._measured:
            kept = recall(job, version, key) if key else None
            self._measured[way] = kept or measure(job, version, self._watch)
        return self._measured[way]


def _expected_key(mine: Measurement, job: JobConfig) -> str:
    """Return the key of a measurement on the images of `mine`, at the settings of `job`."""
    settings = {
        "short_side": job.data.short_side,
        "long_side": job.data.long_side,
        "postprocess": job.postprocess.model_dump(mode="json"),
    }
    return replace(mine, protocol=mine.protocol | settings).key


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
        models.load(f"models:/{version.name}/{version.version}", job, "cpu")
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
    verdict: Verdict, version: Version, found: Measurement, gate: GateConfig
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
    verdict: Verdict, job: JobConfig, mine: Measurement, theirs: Measurement, champion: str
) -> Gain:
    """Require the margin over the champion; say how sure the difference is, and return it."""
    gate = job.registry.gate
    split = images_of(job, list(mine.ap_by_class))
    gain = measure_gain(
        split, mine.rows, theirs.rows, job, draws=gate.draws, confidence=gate.confidence
    )
    verdict.require(
        gain.ap >= gate.ap_margin,
        f"AP {mine.metrics['AP']:.4f}, the champion ({champion}) "
        f"{theirs.metrics['AP']:.4f}: {_said(gain, gate)}; required {gate.ap_margin:+g}.",
    )
    return gain


def _said(gain: Gain, gate: GateConfig) -> str:
    noise = ", within the noise" if gain.is_noise else ""
    interval = f"{100 * gate.confidence:g} % interval {gain.low:+.4f} to {gain.high:+.4f}"
    return f"{gain.ap:+.4f} ({interval}{noise})"


def _tell_differences(
    verdict: Verdict, champion: int, own: JobConfig, measured_as: JobConfig
) -> None:
    """Say where the champion was not measured as it was trained."""
    before, now = (flatten(job.model_dump(mode="json")) for job in (own, measured_as))
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
    if changed:
        verdict.reasons.append(f"Version {champion} was measured with {', '.join(changed)}.")


def _figures(number: int, measured: Measurement) -> dict[str, Any]:
    return {"version": number, "AP": measured.metrics["AP"], "fps": measured.fps}


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
