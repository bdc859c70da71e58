"""Assignment and losses in float64 as their papers word them: plain loops, no tensor algebra."""

import math
from itertools import pairwise

import numpy as np

from tests.support.detectors import level_sizes

STRIDES = (8, 16, 32, 64, 128)
EPSILON = 1e-6


def locations(height, width):
    """Return x, y and stride of every location, and where each level starts."""
    found, starts = [], [0]
    for step, (rows, columns) in zip(STRIDES, level_sizes(height, width), strict=True):
        found += [(x * step, y * step, step) for y in range(rows) for x in range(columns)]
        starts.append(len(found))
    return found, starts


def atss(boxes, height, width, valid_height, valid_width, topk):
    """Return the ground truth of every location, -1 where none: one after the other."""
    points, starts = locations(height, width)
    best = [(-1.0, -1)] * len(points)
    for g, (x1, y1, x2, y2) in enumerate(boxes):
        candidates = []
        for start, end in pairwise(starts):
            level = [
                i
                for i in range(start, end)
                if points[i][0] < valid_width and points[i][1] < valid_height
            ]
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            level.sort(key=lambda i: ((points[i][0] - cx) ** 2 + (points[i][1] - cy) ** 2, i))
            candidates += level[:topk]
        overlaps = []
        for i in candidates:
            x, y, step = points[i]
            half = step * 4
            w = max(0.0, min(x2, x + half) - max(x1, x - half))
            h = max(0.0, min(y2, y + half) - max(y1, y - half))
            union = (2 * half) ** 2 + (x2 - x1) * (y2 - y1) - w * h
            overlaps.append(w * h / max(union, EPSILON))
        threshold = np.mean(overlaps) + np.std(overlaps, ddof=1)
        for i, overlap in zip(candidates, overlaps, strict=True):
            x, y, _ = points[i]
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if overlap >= threshold and inside and overlap > best[i][0]:
                best[i] = (overlap, g)
    return [g for _, g in best]


def losses(outputs, boxes, labels, size, config):
    """Return the losses of class logits, edge logits and maybe centerness logits, (B, P, ...) each.

    Also returns how many edges of positive locations their bins do not reach.
    """
    model, loss = config.model, config.loss
    totals = {"scores": 0.0, "centerness": 0.0, "giou": 0.0, "dfl": 0.0}
    positives, weights, clipped = 0, 0.0, 0
    points, _ = locations(size, size)
    for image, (truths, classes) in enumerate(zip(boxes, labels, strict=True)):
        cls, reg, *centerness = (np.asarray(output[image], dtype=float) for output in outputs)
        assigned = atss(truths, size, size, size, size, config.assigner.topk)
        positives += max(1, sum(g >= 0 for g in assigned))
        for p, g in enumerate(assigned):
            x, y, step = points[p]
            targets = [0.0] * len(cls[p])
            if g >= 0:
                x1, y1, x2, y2 = truths[g]
                true = [(x - x1) / step, (y - y1) / step, (x2 - x) / step, (y2 - y) / step]
                found = [_distance(side, model) for side in reg[p].reshape(4, -1)]
                iou, giou = _overlaps(found, true)
                if model.quality == "joint":
                    targets[classes[g]] = iou
                    weight = max(_sigmoid(z) for z in cls[p])
                else:
                    targets[classes[g]] = 1.0
                    weight = _centerness(*true)
                    totals["centerness"] += _cross_entropy(centerness[0][p][0], weight)
                weights += weight
                totals["giou"] += weight * (1 - giou)
                if model.edges == "distribution":
                    reach = model.reg_max - 0.1
                    clipped += sum(t / model.bin_width > reach for t in true)
                    edges = [
                        _dfl(side, min(t / model.bin_width, reach))
                        for side, t in zip(reg[p].reshape(4, -1), true, strict=True)
                    ]
                    totals["dfl"] += weight * sum(edges) / 4
            for z, target in zip(cls[p], targets, strict=True):
                if model.quality == "joint":
                    modulation = abs(target - _sigmoid(z)) ** loss.qfl.beta
                else:
                    modulation = (0.25 if target else 0.75) * abs(target - _sigmoid(z)) ** 2
                totals["scores"] += modulation * _cross_entropy(z, target)
    weights = max(weights, 1.0)
    found = {"giou": totals["giou"] / weights * loss.giou.weight}
    if model.quality == "joint":
        found["qfl"] = totals["scores"] / positives * loss.qfl.weight
    else:
        found["focal"] = totals["scores"] / positives * loss.focal.weight
        found["centerness"] = totals["centerness"] / positives * loss.centerness.weight
    if model.edges == "distribution":
        found["dfl"] = totals["dfl"] / weights * loss.dfl.weight
    return found, clipped


def _sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _cross_entropy(z, target):
    return max(z, 0) - z * target + math.log1p(math.exp(-abs(z)))


def _log_softmax(logits):
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - log_sum for z in logits]


def _distance(logits, model):
    if model.edges == "dirac":
        return math.exp(min(logits[0], 10.0))
    return sum(math.exp(p) * k * model.bin_width for k, p in enumerate(_log_softmax(logits)))


def _dfl(logits, target):
    log_probability, left = _log_softmax(logits), math.floor(target)
    right = target - left
    return -(1 - right) * log_probability[left] - right * log_probability[left + 1]


def _overlaps(a, b):
    """Return IoU and GIoU of two boxes around one point, given as `ltrb`."""
    intersection = enclosure = 1.0
    for low, high in ((0, 2), (1, 3)):
        intersection *= min(a[low], b[low]) + min(a[high], b[high])
        enclosure *= max(a[low], b[low]) + max(a[high], b[high])
    areas = ((s[0] + s[2]) * (s[1] + s[3]) for s in (a, b))
    union = max(sum(areas) - intersection, EPSILON)
    enclosure = max(enclosure, EPSILON)
    return intersection / union, intersection / union - (enclosure - union) / enclosure


def _centerness(left, top, right, bottom):
    across = min(left, right) / max(left, right)
    return math.sqrt(across * min(top, bottom) / max(top, bottom))
