"""What the machine can do at most, to judge the detectors by: convolutions and memory."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

ROUNDS = 5
BYTES = 256 * 2**20


def peaks(device: torch.device) -> dict[str, float]:
    """Return the best GFLOP/s of a 3 x 3 convolution, of a product of matrices, and GB/s."""
    found = {}
    low = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for dtype in (torch.float32, torch.bfloat16) if low else (torch.float32,):  # else: minutes
        name = str(dtype).removeprefix("torch.")
        rates = []
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.randn(1, 256, 100, 152, device=device, dtype=dtype)
            images = images.contiguous(memory_format=layout)
            weights = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
            weights = weights.contiguous(memory_format=layout)
            operations = 2 * 256 * 256 * 9 * 100 * 152
            seconds = _seconds(lambda x=images, w=weights: F.conv2d(x, w, padding=1), device)
            rates.append(operations / seconds / 1e9)
        found[f"convolution_{name}_gflops"] = max(rates)
        square = torch.randn(2048, 2048, device=device, dtype=dtype)
        seconds = _seconds(lambda x=square: x @ x, device)
        found[f"matmul_{name}_gflops"] = 2 * 2048**3 / seconds / 1e9
    source = torch.zeros(BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), device)
    return found | {"memory_gb_s": 2 * BYTES / seconds / 1e9}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
