"""Look at the model registry and point aliases: `python -m jobs.registry list|show|promote`."""

import argparse
import re
import time

from rich.table import Table

from jobs.console import console, parse, parser, run, show_table

EXAMPLE = "python -m jobs.registry promote gfl-demo 3"


def main() -> None:
    """Run the command line."""
    made = parser("List registered models, show one, point an alias at a version.", EXAMPLE)
    commands = made.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="all versions, or those of one model")
    listing.add_argument("--name", help="only this model")
    show = commands.add_parser("show", help="all that is known of a version")
    promote = commands.add_parser("promote", help="point an alias at a version")
    for command in (show, promote):
        command.add_argument("name")
        command.add_argument("version", help="number or alias")
    promote.add_argument("--alias", default="champion", help="default: champion")
    run(registry, parse(made))


def registry(arguments: argparse.Namespace) -> None:
    """Run one command of the registry."""
    from gfl_platform import registry as models
    from gfl_platform.config import job_of

    job = job_of(arguments.overrides)
    for word in arguments.overrides:
        if re.split("[.=]", word)[0] not in ("storage", "tracking"):
            raise ValueError(f"{word}: has no effect here; storage.root and tracking.uri have")
    if arguments.command == "list":
        table = Table("model", "version", "aliases", "AP", "FPS", "run", "registered")
        for v in models.list_versions(job, arguments.name):
            age = time.strftime("%Y-%m-%d %H:%M", time.localtime(v.created_ms / 1000))
            figures = (v.tags.get("AP", ""), v.tags.get("fps", ""))
            table.add_row(v.name, str(v.version), ", ".join(v.aliases), *figures, v.run_id, age)
        console.print(table)
        return
    found = models.find(job, arguments.name, arguments.version)
    if arguments.command == "show":
        show_table(f"{found.name} version {found.version}", models.describe(job, found))
        return
    before = models.set_alias(job, found.name, found.version, arguments.alias)
    was = f" (was version {before})" if before else ""
    console.print(f"{found.name}@{arguments.alias} is version {found.version}{was}")


if __name__ == "__main__":
    main()
