"""Show registered models and decide the champion: `python -m jobs.registry COMMAND`."""

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from jobs.console.cli import console, parse, parser, run, show_table

if TYPE_CHECKING:
    from gfl_platform.config import JobConfig
    from gfl_platform.registry.history import Decision
    from gfl_platform.tracking.client import Store

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))

CLASSES_SHOWN = 20


def show_versions(job: "JobConfig", store: "Store", arguments: argparse.Namespace) -> None:
    """Print registered versions, a line each."""
    from gfl_platform.registry import models

    versions = models.list_versions(store, arguments.name)
    table = Table("model", "version", "aliases", "AP", "FPS", "protocol", "data", "run", "age")
    for version in versions:
        figures = (version.tags.get(key, "") for key in ("AP", "fps", "protocol", "data"))
        age = _age(time.time() - version.created_ms / 1000)
        aliases = ", ".join(version.aliases)
        table.add_row(version.name, str(version.version), aliases, *figures, version.run_id, age)
    console.print(table)
    if len({version.tags.get("protocol") for version in versions} - {None}) > 1:
        console.print("FPS with different protocols do not compare.")


def show(job: "JobConfig", store: "Store", arguments: argparse.Namespace) -> None:
    """Print the card of a version."""
    from gfl_platform.registry import model_card, models

    version = models.find(store, arguments.name, arguments.version)
    show_table(f"{version.name} version {version.version}", model_card.describe(store, version))


def promote(job: "JobConfig", store: "Store", arguments: argparse.Namespace) -> None:
    """Make a version champion if it passes the gate.

    Raises:
        ValueError: it does not.
    """
    from gfl_platform.registry import gate, models
    from jobs.console.progress import Progress

    version = models.find(store, arguments.name, arguments.version)
    with Progress() as progress:
        decision = gate.promote(job, store, version.name, version.version, progress.show)
    show_decision(version.name, decision)
    if decision.action == "refused":
        name = f"{version.name} version {version.version}"
        raise ValueError(f"{name}: refused by the gate, see above")


def rollback(job: "JobConfig", store: "Store", arguments: argparse.Namespace) -> None:
    """Make the previous champion champion again."""
    from gfl_platform.registry import gate

    show_decision(arguments.name, gate.rollback(store, arguments.name, arguments.why))


def history(job: "JobConfig", store: "Store", arguments: argparse.Namespace) -> None:
    """Print the promotion history of a model."""
    from gfl_platform.registry import history, models

    models.list_versions(store, arguments.name)  # raises if there is no such model
    past = history.settle(store.client, arguments.name)
    table = Table("", "when", "decision", "champion", "why", "by", "commit", title=arguments.name)
    for decision in past.decisions:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision.time_ms / 1000))
        table.add_row(
            str(decision.number),
            when,
            f"{decision.action} {decision.version}",
            str(decision.aliases.get("champion", "")),
            "\n".join(decision.reasons),
            decision.user,
            decision.commit[:8],
        )
    console.print(table)
    for sentence in past.moved_by_hand:
        console.print(sentence)


def alias(job: "JobConfig", store: "Store", arguments: argparse.Namespace) -> None:
    """Point an alias, but `champion` and `previous`, at a version."""
    from gfl_platform.registry import models

    version = models.find(store, arguments.name, arguments.version)
    before = models.set_alias(store, version.name, version.version, arguments.alias)
    was = f" (was version {before})" if before else ""
    console.print(f"{version.name}@{arguments.alias} is version {version.version}{was}")


def compare(job: "JobConfig", store: "Store", arguments: argparse.Namespace) -> None:
    """Print how a version differs from another, and draw where they disagree.

    Raises:
        ValueError: --out is no PNG file.
    """
    from gfl.evaluation.coco_eval import format_statistic
    from gfl_platform.registry import compare, models
    from jobs.console.progress import Progress

    if arguments.out.suffix != ".png":
        raise ValueError(f"--out {arguments.out}: expected a file that ends in .png")
    a, b = (models.find(store, arguments.name, v) for v in (arguments.version, arguments.other))
    with Progress() as progress:
        comparison = compare.compare(job, store, (a, b), arguments.out, progress.show)
    gain = comparison.gain
    noise = ", within the noise" if gain.is_noise else ""
    show_table(
        f"{a.name}: version {a.version} -> version {b.version}",
        {
            "AP": f"{comparison.a.metrics['AP']:.4f} -> {comparison.b.metrics['AP']:.4f}: "
            f"{gain.ap:+.4f} (95 % interval {gain.low:+.4f} to {gain.high:+.4f}{noise})",
            "FPS": f"{comparison.a.fps:.1f} -> {comparison.b.fps:.1f}",
            "protocols": ", ".join(comparison.protocols) or "the same",
            "configuration": "\n".join(comparison.settings) or "the same",
            "pictures": arguments.out,
        },
    )
    largest = sorted(gain.by_class.items(), key=lambda item: -abs(item[1]))[:CLASSES_SHOWN]
    table = Table("class", f"AP of {a.version}", f"AP of {b.version}", "difference")
    for name, difference in largest:
        aps = (format_statistic(side.ap_by_class[name]) for side in (comparison.a, comparison.b))
        table.add_row(name, *aps, f"{difference:+.4f}")
    console.print(table)


def show_decision(model: str, decision: "Decision") -> None:
    """Print what was decided, and why."""
    console.print(f"{model} version {decision.version}: {decision.action}")
    for reason in decision.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    aliases = decision.aliases.items()
    console.print("  ".join(f"{model}@{alias} is version {number}" for alias, number in aliases))


def _age(seconds: float) -> str:
    unit, size = next(((u, s) for u, s in UNITS if seconds >= s), UNITS[-1])
    return f"{seconds / size:.0f} {unit}"


EXAMPLE = "python -m jobs.registry promote gfl-demo 3 registry.gate.fps_floor=30"

SECTIONS = ("storage", "tracking", "cluster", "registry")

COMMANDS = {
    "show": (show, "show the model card of a version", ["version"]),
    "promote": (promote, "make a version champion if it passes the gate", ["version"]),
    "rollback": (rollback, "make the previous champion champion again", []),
    "history": (history, "list all decisions with their reasons", []),
    "compare": (compare, "compare two versions: settings, AP, pictures", ["version", "other"]),
    "alias": (alias, "point another alias at a version", ["version", "alias"]),
}


def main() -> None:
    """Run the command line."""
    cli = parser("Show registered models, and decide which version is champion.", EXAMPLE)
    below = cli.add_subparsers(dest="command", required=True)
    listing = below.add_parser("list", help="list all versions")
    listing.add_argument("--name", help="list this model only")
    listing.set_defaults(run=show_versions)
    for name, (action, about, words) in COMMANDS.items():
        subcommand = below.add_parser(name, help=about)
        for word in ("name", *words):
            subcommand.add_argument(word, help="number or alias" if word == "version" else None)
        subcommand.set_defaults(run=action)
        if name == "rollback":
            subcommand.add_argument("--why", required=True, help="reason for the history")
        if name == "compare":
            subcommand.add_argument("--out", type=Path, default=Path("outputs/comparison.png"))
    for place in (cli, *below.choices.values()):
        about = "YAML file with the gate and the cluster settings"
        # A default of the subcommand would overwrite a value given before its name.
        default = None if place is cli else argparse.SUPPRESS
        place.add_argument("--config", type=Path, default=default, help=about)
    run(registry, parse(cli))


def registry(arguments: argparse.Namespace) -> None:
    """Run one command of the registry."""
    from gfl_platform.config import job_of, load_job
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store

    given = arguments.overrides
    job = load_job(arguments.config, given) if arguments.config else job_of(given)
    for word in given:
        if re.split("[.=]", word)[0] not in SECTIONS:
            raise ValueError(f"{word}: has no effect here; {', '.join(SECTIONS)} have")
    arguments.run(job, Store(job.tracking, Storage(job.storage)), arguments)


if __name__ == "__main__":
    main()
