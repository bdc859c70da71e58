"""Look at registered models, decide which is champion: `python -m jobs.registry COMMAND`."""

import argparse
import re
from pathlib import Path

from jobs import registry_commands
from jobs.console.cli import parse, parser, run

EXAMPLE = "python -m jobs.registry promote gfl-demo 3 registry.gate.fps_floor=30"
SECTIONS = ("storage", "tracking", "cluster", "registry")
COMMANDS = {
    "show": (registry_commands.show, "all that is known of a version", ["version"]),
    "promote": (
        registry_commands.promote,
        "make a version champion, if AP and FPS pass",
        ["version"],
    ),
    "rollback": (registry_commands.rollback, "make the previous champion champion again", []),
    "history": (registry_commands.history, "all decisions, and why", []),
    "compare": (
        registry_commands.compare,
        "two versions: settings, AP, pictures",
        ["version", "other"],
    ),
    "alias": (registry_commands.alias, "point another alias at a version", ["version", "alias"]),
}


def main() -> None:
    """Run the command line."""
    made = parser("Look at registered models; decide which is champion.", EXAMPLE)
    below = made.add_subparsers(dest="command", required=True)
    listing = below.add_parser("list", help="all versions")
    listing.add_argument("--name", help="of this model")
    listing.set_defaults(run=registry_commands.show_versions)
    for name, (action, about, words) in COMMANDS.items():
        command = below.add_parser(name, help=about)
        for word in ("name", *words):
            command.add_argument(word, help="number or alias" if word == "version" else None)
        command.set_defaults(run=action)
        if name == "rollback":
            command.add_argument("--why", required=True, help="a sentence for the trail")
        if name == "compare":
            command.add_argument("--out", type=Path, default=Path("outputs/comparison.png"))
    for place in (made, *below.choices.values()):
        about = "YAML file with the gate and where to run"
        default = None if place is made else argparse.SUPPRESS  # lest it replace the one before
        place.add_argument("--config", type=Path, default=default, help=about)
    run(registry, parse(made))


def registry(arguments: argparse.Namespace) -> None:
    """Run one command of the registry."""
    from gfl_platform.config import job_of, load_job

    given = arguments.overrides
    job = load_job(arguments.config, given) if arguments.config else job_of(given)
    for word in given:
        if re.split("[.=]", word)[0] not in SECTIONS:
            raise ValueError(f"{word}: has no effect here; {', '.join(SECTIONS)} have")
    arguments.run(job, arguments)


if __name__ == "__main__":
    main()
