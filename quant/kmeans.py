"""k-means of many small problems at once, on any device: Lloyd's iterations from k-means++ seeds.

::

    seeds      the first point at random; the next is the best of `TRIALS` drawn with probability ∝ |x − nearest seed|²
    assign     argmin_j |x − c_j|² = argmax_j (x·c_j − |c_j|²/2)
    update     c_j = mean of the points that chose it; a centroid that none chose is drawn anew as seeds are

Seeds and the first iterations see `SAMPLE` points of each problem, the last `FINAL` all of them. To go on, or to choose
seeds among all, changed the error of keys that were not trained on by less than 2 %. Memory: the points,
and one block of scores. On a CPU the number of a centroid is put into the last bits of its score, so that a plain
maximum finds it; scores that differ by less than 2⁻¹⁵ of their size may be taken for equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRIALS = 4
SAMPLE = 4096
ITERATIONS, FINAL = 8, 3
CPU_TOKENS = 256
"""Points whose scores stay in a core's cache."""
DEVICE_SCORES = 2**25
"""Scores that exist at a time elsewhere."""


def kmeans(x: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Centroids, (problems, count, dim) fp32, of points x, (problems, points, dim) fp32. Same seed, same centroids.

    count: 256 at most. Equal points give equal centroids. ValueError if there are no points.
    """
    if x.shape[1] == 0 or not 1 <= count <= 256:
        raise ValueError(
            f"{count} centroids of {x.shape[1]} points; at least one point and 1 to 256 centroids are needed"
        )
    generator = torch.Generator(x.device).manual_seed(seed)
    sample = x
    if x.shape[1] > SAMPLE:
        chosen = torch.randperm(x.shape[1], generator=generator, device=x.device)[:SAMPLE]
        sample = x[:, chosen].contiguous()
    centroids = lloyd(sample, seeds(sample, count, generator), ITERATIONS, generator)
    return lloyd(x, centroids, FINAL, generator)


def seeds(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(problems, count, dim) of the points of x."""
    rows = torch.arange(x.shape[0], device=x.device)
    found = [x[rows, torch.randint(x.shape[1], (x.shape[0],), generator=generator, device=x.device)]]
    size = x.square().sum(dim=-1)
    distance = (x - found[0][:, None]).square().sum(dim=-1)
    for _ in range(count - 1):
        candidates = x[rows[:, None], drawn(distance, TRIALS, generator)]
        # |x − c|² = |x|² + 2 · (|c|²/2 − x·c)
        half = candidates.square().sum(dim=-1, keepdim=True) / 2
        reached = torch.minimum(distance[:, None], size[:, None] + 2 * torch.baddbmm(half, candidates, x.mT, alpha=-1))
        best = reached.sum(dim=-1).argmin(dim=-1)
        distance = reached[rows, best]
        found.append(candidates[rows, best])
    return torch.stack(found, dim=1)


def drawn(distance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(problems, count) numbers of points, drawn in proportion to their squared distances, (problems, points)."""
    # Where all points are seeds already, any is as good as another.
    weights = distance.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def lloyd(x: Tensor, centroids: Tensor, iterations: int, generator: torch.Generator) -> Tensor:
    """Centroids after so many iterations."""
    rows, count = torch.arange(x.shape[0], device=x.device)[:, None], centroids.shape[1]
    for _ in range(iterations):
        chosen = nearest(x, centroids)
        sums, members = totals(x, chosen, count)
        centroids = sums / members.clamp_min(1)[..., None]
        if bool((members == 0).any()):
            distance = (x - centroids[rows, chosen]).square().sum(dim=-1)
            others = x[rows, drawn(distance, count, generator)]
            centroids = torch.where((members == 0)[..., None], others, centroids)
    return centroids


def totals(x: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums, (problems, count, dim), and numbers, (problems, count), of the points that chose each centroid; in an order
    that is the same every time, which atomic sums of a GPU are not."""
    problems, _, dim = x.shape
    if x.device.type == "cpu":
        place = (chosen + count * torch.arange(problems)[:, None]).flatten()
        sums = torch.zeros((problems * count, dim)).index_add_(0, place, x.reshape(-1, dim))
        return sums.view(problems, count, dim), torch.bincount(place, minlength=problems * count).view(problems, count)
    return totals_in_blocks(x, chosen, count)


def totals_in_blocks(x: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`totals` as products with rows of zeros and ones, any device."""
    problems, points, dim = x.shape
    sums, members = x.new_zeros((problems, count, dim)), x.new_zeros((problems, count))
    step = max(1, DEVICE_SCORES // (problems * count))
    for start in range(0, points, step):
        part = slice(start, start + step)
        one = (chosen[:, None, part] == torch.arange(count, device=x.device)[:, None]).float()
        sums += one @ x[:, part]
        members += one.sum(dim=-1)
    return sums, members


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """(problems, points) int64, the number of each point's nearest centroid."""
    problems, points, _ = x.shape
    count = centroids.shape[1]
    half = -centroids.square().sum(dim=-1, keepdim=True) / 2
    if x.device.type != "cpu":
        return nearest_in_blocks(x, centroids)
    with_half, ones = torch.cat((centroids, half), dim=-1), x.new_ones(points)
    numbers = torch.arange(count, dtype=torch.int32)[:, None]
    found = torch.empty((problems, points), dtype=torch.int32)
    for problem in range(problems):
        columns = torch.cat((x[problem].T, ones[None]))
        for start in range(0, points, CPU_TOKENS):
            scores = with_half[problem] @ columns[:, start : start + CPU_TOKENS]
            scores.view(torch.int32).bitwise_and_(-256).bitwise_or_(numbers)
            found[problem, start : start + CPU_TOKENS] = scores.amax(dim=0).view(torch.int32)
    return found.bitwise_and_(255).long()


def nearest_in_blocks(x: Tensor, centroids: Tensor) -> Tensor:
    """`nearest`, exactly, any device."""
    half = -centroids.square().sum(dim=-1, keepdim=True) / 2
    step = max(1, DEVICE_SCORES // (x.shape[0] * centroids.shape[1]))
    blocks = [torch.baddbmm(half, centroids, part.mT).argmax(dim=1) for part in x.split(step, dim=1)]
    return torch.cat(blocks, dim=1)
