"""How rows are grouped, and which SMs make a cluster, as far as sizes alone decide it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .words import GROUP_ROWS, KV_TILE, MAX_ROWS

Rows = npt.NDArray[np.integer]

# Most tiles of each mate, at the longest, that clusters of more than two are launched for. They
# leave SMs out, which is missed the more the more keys there are.
MOST_TILES_OF_MATE = 4


def count_groups(rows: Rows, size: int) -> int:
    """Row groups of at most ``size`` rows of sequences that have ``rows`` ``[S]``."""
    return int((-(-rows // size)).sum())


def choose_groups(
    rows: Rows, max_seq_len: int, num_workers: int, clusters: Sequence[tuple[int, int]]
) -> tuple[int, int, int]:
    """Rows of a row group, SMs of a cluster of the launch, and SMs in all.

    Small groups where all of them can have mates of the largest clusters: as many SMs work on the
    same keys then as with large ones, and each has fewer rows.

    Parameters
    ----------
    rows : ndarray
        ``[S]`` rows of each sequence.
    max_seq_len, num_workers, clusters
        As of `choose_clusters`.
    """
    most = int(rows.max(initial=0))
    for size in GROUP_ROWS:
        groups = count_groups(rows, size)
        ctas, workers = choose_clusters(groups, max_seq_len, num_workers, clusters)
        if size >= min(most, MAX_ROWS):
            break
        if ctas > 2 and groups * ctas <= workers:
            return size, ctas, workers
    return MAX_ROWS, ctas, workers


def choose_clusters(
    groups: int, max_seq_len: int, num_workers: int, clusters: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """SMs of a cluster of the launch, 1 for no clusters, and SMs in all.

    Parameters
    ----------
    groups : int
        Row groups of all requests.
    max_seq_len : int
        Longest KV length.
    num_workers : int
        SMs to plan for.
    clusters
        SMs of a cluster, and how many such run at a time.
    """
    for ctas, available in sorted(clusters, reverse=True):
        count = min(available, num_workers // ctas)
        if ctas == 2:
            fits = 4 * groups <= 3 * num_workers
        else:  # nearly every group may have a cluster
            fits = 8 * groups <= 9 * count and max_seq_len <= MOST_TILES_OF_MATE * ctas * KV_TILE
        if fits and count > 0:
            return ctas, count * ctas
    return 1, num_workers


def sizes_to_plan(
    rows: Rows, max_seq_len: int, num_workers: int, clusters: Sequence[tuple[int, int]]
) -> list[int]:
    """Sizes of row groups that may be the best for known lengths, the largest first.

    The one that `choose_groups` finds, and smaller ones if these are few: SMs that read the same
    keys can only win where most would have nothing to do.
    """
    chosen, *_ = choose_groups(rows, max_seq_len, num_workers, clusters)
    below = min(chosen, int(rows.max(initial=0)))
    few = [size for size in GROUP_ROWS if 2 * count_groups(rows, size) <= num_workers]
    return [chosen, *(size for size in reversed(few) if size < below)]
