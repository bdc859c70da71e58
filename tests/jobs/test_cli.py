"""Which arguments of a command line change the configuration."""

import sys

from rich.table import Table

from gfl_platform.config import JobConfig
from jobs.console.cli import SECTIONS, console, parse, parser, show_table


def test_every_key_without_a_dot_is_known():
    assert set(SECTIONS) == set(JobConfig.model_fields)


def test_only_keys_of_the_configuration_are_overrides(monkeypatch):
    words = ["model.png", "seed=3", "a=b.jpg", "loss.qfl.bta=1", "--why", "latency=too high"]
    monkeypatch.setattr(sys, "argv", ["job", *words, "cluster={workers: 2}"])
    cli = parser("a job", "an example")
    cli.add_argument("images", nargs="+")
    cli.add_argument("--why")
    arguments = parse(cli)
    assert arguments.overrides == ["seed=3", "loss.qfl.bta=1", "cluster={workers: 2}"]
    assert (arguments.images, arguments.why) == (["model.png", "a=b.jpg"], "latency=too high")


def test_brackets_and_colons_in_texts_of_others_are_printed_as_they_are(capsys):
    for text in ("a log line [/tmp/ray]", "[red]reason", ":warning:"):
        console.print(text)
        console.print(Table(text))
        show_table(text, {text: text})
        assert capsys.readouterr().out.count(text) == 5
