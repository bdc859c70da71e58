"""Which ways of running a model `jobs.benchmark` measures."""

import argparse
from dataclasses import replace

from gfl.evaluation.protocol import PRECISIONS, Variant


def parse_variants(arguments: argparse.Namespace) -> list[Variant]:
    """Return what the command line asks for.

    Raises:
        ValueError: a precision or a batch size that does not exist.
    """
    if arguments.images is not None and arguments.images < 1:
        raise ValueError(f"--images {arguments.images}: expected at least 1")
    found = []
    for word in arguments.precision.split(","):
        named = [precision for precision in PRECISIONS if precision == word]
        if not named:
            raise ValueError(f"--precision {word}: expected some of {','.join(PRECISIONS)}")
        plain = Variant(named[0])
        found.append(plain)
        if arguments.no_channels_last:
            found.append(replace(plain, channels_last=False))
        if arguments.compile:
            found.append(replace(plain, compiled=True))
        for size in filter(None, arguments.batches.split(",")):
            if not size.isdigit() or int(size) < 1:
                raise ValueError(f"--batches {size}: expected whole numbers, such as 8,32")
            found.append(replace(plain, batch=int(size)))
    return list(dict.fromkeys(found))
