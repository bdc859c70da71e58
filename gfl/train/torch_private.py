"""The one private name of torch that this package uses, written for torch 2.14.

`torch.compile(dynamic=True)` is public, but it gives sizes that happen to be equal in the first
call (two sides of an image, or objects and colour channels) one symbol, and compiles again when
they differ. `torch._dynamo.maybe_mark_dynamic`, which the documentation of torch's dynamic shapes
names, marks single dimensions. A test of one compilation for several sizes holds it
(`test_one_compilation_serves_every_size`), and `pyproject.toml` has an upper bound for torch.
"""

import torch
from torch import Tensor


def mark_dynamic(tensor: Tensor, *dimensions: int) -> None:
    """Tell the compiler that `dimensions` of `tensor` have other sizes in other calls."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimensions)  # imported here, which takes seconds
