"""The gate before `champion`: a version is promoted if its AP and its FPS pass.

Candidate and champion are measured on the same images under the same protocol (`gather_evidence`).
`decide` weighs these measurements. `promote` and `rollback` record the decision, after which the
aliases move (`history`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import gfl
from gfl.config.loader import config_hash, flatten
from gfl.evaluation.bootstrap import Gain, measure_gain
from gfl.evaluation.protocol import differences, protocol_hash
from gfl_platform.cluster.events import Watcher
from gfl_platform.cluster.launch import JobFailedError
from gfl_platform.cluster.resources import ClusterError
from gfl_platform.config import GateConfig, JobConfig
from gfl_platform.evaluation.benchmark import recall_fps
from gfl_platform.registry import history, models
from gfl_platform.registry.artifacts import CHECKPOINT, find_faults
from gfl_platform.registry.history import Decision
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
from gfl_platform.tracking.client import Store


@dataclass
class Verdict:
    """Whether a version passes the gate, and what speaks for and against it.

    Attributes:
        reasons: One sentence for each requirement, with its measured value.
        figures: The measurements and the settings of the gate, kept with the decision.
        passes: Whether all requirements hold.
    """

    reasons: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    passes: bool = True

    def require(self, holds: bool, reason: str) -> None:
        """Add the reason; the version passes only if every requirement holds."""
        self.reasons.append(reason)
        self.passes &= holds


Compared = tuple[Measurement, Gain]
"""A measurement of the champion, and the AP of the candidate less that of the champion."""


@dataclass
class Rival:
    """The champion on the images of the candidate.

    Attributes:
        version: Number of the champion's version.
        alike: The champion at the settings of the candidate, None if it cannot be measured.
        changes: The settings that differ from those of its training, "key before -> now".
        own: The champion at its own settings, None if these are the same.
        fault: Why it cannot be measured, empty if it can.
    """

    version: int
    alike: Compared | None = None
    changes: Sequence[str] = ()
    own: Compared | None = None
    fault: str = ""


@dataclass(frozen=True)
class Evidence:
    """All measurements that a decision about a candidate rests on.

    Attributes:
        version: Number of the candidate's version.
        candidate: Its measurement on the images that decide.
        logged_ap: Its AP as logged when it was registered, None if none was.
        repeated_ap: Its AP measured again, on the images of its training.
        benchmark_fps: FPS of its latest benchmark under the protocol of `candidate`, if any.
        champion: Number of the champion's version, None if there is no champion.
        rival: What was measured of the champion, None if it was not compared.
    """

    version: int
    candidate: Measurement
    logged_ap: float | None
    repeated_ap: float
    benchmark_fps: float | None = None
    champion: int | None = None
    rival: Rival | None = None


def decide(gate: GateConfig, evidence: Evidence) -> Verdict:
    """Return the gate's verdict on a candidate."""
    verdict, candidate = Verdict(), evidence.candidate
    verdict.figures = {
        "gate": gate.model_dump(mode="json"),
        "data": candidate.digest,
        "protocol": protocol_hash(candidate.protocol),
        "candidate": _figures(evidence.version, candidate),
    }
    _require_repeated_ap(verdict, evidence, gate)
    if evidence.rival:
        _require_gains(verdict, candidate, evidence.rival, gate)
    elif evidence.champion is not None:
        verdict.reasons.append(
            f"Not compared with the champion (version {evidence.champion}), because "
            "registry.gate.compare is false."
        )
    fps, source = candidate.fps, ""
    if evidence.benchmark_fps is not None:
        fps, source = evidence.benchmark_fps, " in its benchmark"
        verdict.figures["candidate"]["benchmark_fps"] = fps
    verdict.require(
        fps >= gate.fps_floor, f"FPS {fps:.1f}{source}, the floor is {gate.fps_floor:g}."
    )
    return verdict


def _require_repeated_ap(verdict: Verdict, evidence: Evidence, gate: GateConfig) -> None:
    """Require that the AP logged at registration comes out again."""
    repeated, logged = evidence.repeated_ap, evidence.logged_ap
    if logged is None:
        verdict.require(False, "No AP was logged when it was registered: nothing to reproduce.")
        return
    verdict.require(
        abs(repeated - logged) <= gate.ap_tolerance,
        f"AP {repeated:.4f} measured again, {logged:.4f} logged ({gate.ap_tolerance:g} allowed).",
    )


def _require_gains(
    verdict: Verdict, candidate: Measurement, rival: Rival, gate: GateConfig
) -> None:
    """Require the margin over the champion at the candidate's settings and at its own."""
    name = f"version {rival.version}"
    if rival.alike:
        measurement, gain = rival.alike
        verdict.figures["champion"] = _figures(rival.version, measurement)
        verdict.figures["gain"] = {"ap": gain.ap, "low": gain.low, "high": gain.high}
        _require_margin(verdict, candidate, rival.alike, name, gate)
        if measurement.key != candidate.key:
            differing = ", ".join(differences(candidate.protocol, measurement.protocol))
            verdict.reasons.append(f"The FPS of both do not compare: {differing}.")
    if rival.changes:
        verdict.reasons.append(
            f"Version {rival.version} was measured with {', '.join(rival.changes)}."
        )
    if rival.own:
        verdict.figures["champion at its own settings"] = _figures(rival.version, rival.own[0])
        _require_margin(verdict, candidate, rival.own, f"{name}, at its own settings", gate)
    if rival.fault:
        verdict.require(
            False,
            f"The champion (version {rival.version}) cannot be measured: {rival.fault}. To promote "
            "without a comparison: registry.gate.compare=false.",
        )


def _require_margin(
    verdict: Verdict, candidate: Measurement, compared: Compared, champion: str, gate: GateConfig
) -> None:
    """Require the margin in AP, and add how certain the difference is."""
    measurement, gain = compared
    noise = ", within the noise" if gain.is_noise else ""
    interval = f"95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
    verdict.require(
        gain.ap >= gate.ap_margin,
        f"AP {candidate.metrics['AP']:.4f}, the champion ({champion}) "
        f"{measurement.metrics['AP']:.4f}: {gain.ap:+.4f} ({interval}{noise}); "
        f"required {gate.ap_margin:+g}.",
    )


def _figures(number: int, measurement: Measurement) -> dict[str, Any]:
    figures = {"version": number, "AP": measurement.metrics["AP"], "fps": measurement.fps}
    return figures | ({"checkpoint": measurement.checkpoint} if measurement.checkpoint else {})


class Examiner:
    """Measures a candidate and its champion, each way of measuring once."""

    def __init__(self, job: JobConfig, store: Store, candidate: Version, watch: Watcher) -> None:
        """Take the candidate, the job that says where to measure, and who watches progress."""
        self._job, self._store = job, store
        self._candidate = candidate
        self._watch = watch
        self._measurements: dict[tuple[int, str], Measurement] = {}

    def examine(self, champion: int | None) -> Verdict:
        """Return the verdict on the candidate; nothing is measured if its files are unfit.

        Args:
            champion: The version that would be replaced, None if there is none.

        Raises:
            ValueError: a dataset or cluster that cannot be used.
            JobFailedError: a worker stopped.
        """
        if faults := self._file_faults():
            return Verdict(faults, passes=False)
        return decide(self._job.registry.gate, self.gather_evidence(champion))

    def gather_evidence(self, champion: int | None) -> Evidence:
        """Measure the candidate and, where the gate compares, the champion."""
        gate, candidate = self._job.registry.gate, self._candidate
        own = own_job(self._job, self._store, candidate)
        job = _with_images(own, gate)
        measurement = self._measure(job, candidate)
        logged_ap = candidate.tags.get("AP")
        rival = None
        if champion is not None and gate.compare:
            rival = self._measure_rival(job, measurement, champion)
        return Evidence(
            version=candidate.version,
            candidate=measurement,
            logged_ap=None if logged_ap is None else float(logged_ap),
            repeated_ap=self._measure(own, candidate).metrics["AP"],
            benchmark_fps=recall_fps(
                self._store, candidate.run_id, protocol_hash(measurement.protocol)
            ),
            champion=champion,
            rival=rival,
        )

    def _file_faults(self) -> list[str]:
        """Return what makes the candidate's artifacts unfit to be loaded."""
        with self._store.storage.scratch_folder() as scratch:
            try:
                folder = models.fetch_version(self._store, self._candidate, scratch)
            except RegistryError as error:
                return [f"It cannot be loaded: {error}."]
            faults = find_faults(folder)
            try:
                gfl.load(folder / "artifacts" / CHECKPOINT, device="cpu")
            except ValueError as error:
                faults.append(f"It cannot be loaded: {error}.")
            return faults

    def _measure_rival(self, job: JobConfig, candidate: Measurement, champion: int) -> Rival:
        """Measure the champion as `job` measures the candidate, and at its own settings.

        A champion that cannot be measured on these images, because it knows other classes or its
        files are gone, is a result; an unusable cluster is an error.
        """
        rival, gate = Rival(champion), job.registry.gate

        def compared(measurement: Measurement) -> Compared:
            rows, draws = (candidate.rows, measurement.rows), gate.draws
            gain = measure_gain(split, *rows, job, draws=draws)
            return measurement, gain

        try:
            split = images_of(job, self._store.storage.cache, list(candidate.ap_by_class))
            version = models.find(self._store, self._candidate.name, str(champion))
            own = own_job(self._job, self._store, version)
            alike, itself = at_settings_of(own, job), on_images_of(own, job)
            rival.alike = compared(self._measure(alike, version, candidate.key))
            rival.changes = _changes(own, alike)
            if itself != alike:
                key = _expected_key(candidate, itself)
                rival.own = compared(self._measure(itself, version, key))
        except ClusterError:
            raise
        except (ValueError, JobFailedError) as error:
            rival.fault = str(error)
        return rival

    def _measure(self, job: JobConfig, version: Version, key: str | None = None) -> Measurement:
        """Return the measurement of a version; one that is kept under `key` is used again."""
        way = (version.version, config_hash(job))
        if way not in self._measurements:
            kept = recall(self._store, version, key) if key else None
            self._measurements[way] = kept or measure(job, self._store, version, self._watch)
        return self._measurements[way]


def _with_images(own: JobConfig, gate: GateConfig) -> JobConfig:
    """Return `own` with the images that decide."""
    if gate.val is None:
        return own
    return own.model_copy(update={"data": own.data.model_copy(update={"val": gate.val})})


def _expected_key(candidate: Measurement, job: JobConfig) -> str:
    """Return the key of a measurement on the candidate's images at the settings of `job`."""
    settings = {
        "short_side": job.data.short_side,
        "long_side": job.data.long_side,
        "postprocess": job.postprocess.model_dump(mode="json"),
    }
    return replace(candidate, protocol=candidate.protocol | settings).key


def _changes(own: JobConfig, job: JobConfig) -> list[str]:
    """Return where `job` differs from the configuration that a version was trained with."""
    before, now = (flatten(config.model_dump(mode="json")) for config in (own, job))
    return [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]


def promote(job: JobConfig, store: Store, name: str, number: int, watch: Watcher) -> Decision:
    """Make a version champion if it passes the gate; return the decision, also a refusal.

    If the version is champion already, as after a crash, the decision that made it champion is
    returned. If another version becomes champion during the measurements, the candidate is compared
    with that one.

    Args:
        job: Where to measure; `job.registry.gate` is the gate.
        store: The registry.
        name: Name of the model.
        number: Number of the candidate's version.
        watch: Called with the events of the measurements.

    Raises:
        ValueError: no such version, a dataset or cluster that cannot be used, or a version that
            somebody made champion by hand. No decision is recorded then.
        JobFailedError: a worker stopped.
    """
    client = store.client
    examiner = Examiner(job, store, models.find(store, name, str(number)), watch)
    past = history.settle(client, name)
    while (champion := past.champion) != number:
        verdict = examiner.examine(champion)
        past = history.settle(client, name)
        if past.champion == champion:
            action: Literal["promoted", "refused"] = "promoted" if verdict.passes else "refused"
            decision = Decision(action, number, past.aliases, verdict.reasons, verdict.figures)
            return history.record(client, name, decision)
    move = past.latest_move
    if move is None or move.version != number:
        raise RegistryError(
            f"{name} version {number}: is champion already, but by no decision; promote another "
            "version, or take the alias away in MLflow first"
        )
    return move


def rollback(store: Store, name: str, why: str) -> Decision:
    """Make the previous champion champion again; return the decision.

    If this command finishes a rollback that a crash interrupted, or another rollback comes first,
    the decision of that rollback is returned.

    Args:
        store: The registry.
        name: Name of the model.
        why: The reason, a sentence for the promotion history.

    Raises:
        RegistryError: there is no previous champion, it cannot be loaded, or the champion changed
            in the meantime.
    """
    client = store.client
    models.list_versions(store, name)  # raises if there is no such model
    champion = history.read_history(client, name).champion
    past = history.settle(client, name)
    if past.champion == champion:
        number = past.aliases.get("previous")
        if champion is None or number is None:
            raise RegistryError(f"{name}: no champion before this one, so nothing to go back to")
        models.load(f"models:/{name}/{number}", store, "cpu")
        past = history.settle(client, name)
        if past.champion == champion:
            return history.record(
                client, name, Decision("rolled back", number, past.aliases, [why])
            )
    move = past.latest_move
    if move and move.action == "rolled back" and move.version == past.champion:
        return move
    champion_now = history.name_target(past.aliases, "champion")
    raise RegistryError(f"{name}: champion is {champion_now} now; nothing rolled back")
