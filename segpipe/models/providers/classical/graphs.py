"""Graph cut and normalised cut: elements or superpixels as nodes, borders between them as edges."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from skimage.graph import RAG, cut_normalized
from skimage.segmentation import slic
from threadpoolctl import threadpool_limits

from segpipe.models.providers.classical.regions import by_thresholds, known_values, otsu_thresholds

UNIT = 1 << 20
"""Capacities are whole numbers: this one stands for 1."""
SEED = 0
"""Of the eigenvector search of the normalised cut, so that a scene has one answer."""


def graph_cut(feature: np.ndarray, known: np.ndarray, smoothness: float, bins: int) -> np.ndarray:
    """Two classes: the labels y of least energy, found exactly as a minimum cut.

    E(y) = Σ (x − m(y))² / (m₁ − m₀)² + smoothness · (pairs of face neighbours of different class), where m₀
    and m₁ are the means below and above Otsu's threshold. Greig, Porteous and Seheult (1989), Journal of the
    Royal Statistical Society B 51(2), 271-279. Of several solutions, the one with least of class 1.

    Args:
        feature: float32, (y, x) or (z, y, x).
        known: bool, the same shape.

    Raises:
        SceneError: the scene has one value.
    """
    values = known_values(feature, known).astype(np.float64)
    above = values > otsu_thresholds(feature[known], 2, bins)[0]
    dark, bright = values[~above].mean(), values[above].mean()
    # What class 1 saves: E(y = 0) − E(y = 1), without the borders.
    gain = (2 * values - dark - bright) / (bright - dark)
    # Beyond the price of all its borders an element's class is settled: so capacities stay small.
    limit = 2 * feature.ndim * smoothness + 1
    gain = np.rint(np.clip(gain, -limit, limit) * UNIT).astype(np.int32)
    first, second = _neighbours(known)
    n = len(values)
    source, sink = n, n + 1
    plus, minus = np.flatnonzero(gain > 0), np.flatnonzero(gain < 0)
    tails = np.concatenate([first, second, np.full(len(plus), source), minus])
    heads = np.concatenate([second, first, plus, np.full(len(minus), sink)])
    border = np.full(2 * len(first), round(smoothness * UNIT), dtype=np.int32)
    capacities = np.concatenate([border, gain[plus], -gain[minus]])
    graph = csr_array((capacities, (tails, heads)), shape=(n + 2, n + 2))
    rest = graph - maximum_flow(graph, source, sink).flow
    rest.eliminate_zeros()
    reached = breadth_first_order(rest, source, return_predecessors=False)
    labels = np.zeros(feature.shape, dtype=np.intp)
    cut = np.zeros(n + 2, dtype=np.intp)
    cut[reached] = 1
    labels[known] = cut[:n]
    return labels


def _neighbours(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of known elements that share a face, numbered among the known in order of memory."""
    number = np.full(known.shape, -1, dtype=np.int32)
    number[known] = np.arange(np.count_nonzero(known), dtype=np.int32)
    firsts, seconds = [], []
    for axis in range(known.ndim):
        along = np.moveaxis(number, axis, 0)
        a, b = along[:-1].ravel(), along[1:].ravel()
        both = (a >= 0) & (b >= 0)
        firsts.append(a[both])
        seconds.append(b[both])
    return np.concatenate(firsts), np.concatenate(seconds)


def normalised_cut(
    bands: np.ndarray,
    feature: np.ndarray,
    known: np.ndarray,
    classes: int,
    *,
    segments: int,
    compactness: float,
    sigma: float,
    cut: float,
    bins: int,
) -> np.ndarray:
    """SLIC superpixels, cut apart by normalised cuts; classes by Otsu on each part's mean feature.

    Shi and Malik (2000), IEEE Transactions on Pattern Analysis and Machine Intelligence 22(8), 888-905, on
    the superpixels of Achanta et al. (2012), ibid. 34(11), 2274-2282.

    Args:
        bands: float32, (c, y, x) or (c, z, y, x): what superpixels and their likeness are made of.
        feature: float32, (y, x) or (z, y, x): what tells the classes apart.
        known: bool, the feature's shape.
        classes: how many.
        segments: superpixels, about.
        compactness: SLIC's weight of nearness.
        sigma: edges weigh exp(−|difference of means|² / sigma), bands scaled to 0…1.
        cut: a part is not cut further where that costs more.
        bins: of the histogram for Otsu.

    Raises:
        SceneError: fewer parts than classes are left.
    """
    known_values(feature, known)
    scaled = unit_range(bands, known)
    pieces = slic(
        scaled,
        segments,
        compactness,
        convert2lab=False,  # three bands need not be red, green and blue
        mask=None if known.all() else known,
        channel_axis=0,
    )
    graph = likeness(scaled, pieces, sigma)
    # One thread: the order of sums must not follow the machine, and small products gain nothing.
    with threadpool_limits(1, "blas"):
        parts = cut_normalized(pieces, graph, thresh=cut, rng=SEED)
    where, total = parts[known], int(parts.max()) + 1
    sizes = np.maximum(np.bincount(where, minlength=total), 1)
    means = np.bincount(where, feature[known], minlength=total) / sizes
    flat = means[parts].astype(np.float32)
    return by_thresholds(flat, otsu_thresholds(flat[known], classes, bins))


def unit_range(bands: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Each band with its known elements mapped to 0…1; 0 elsewhere."""
    values = bands[:, known]
    low, high = values.min(axis=1), values.max(axis=1)
    span = np.where(high > low, high - low, np.float32(1))
    scaled = np.zeros_like(bands)
    scaled[:, known] = (values - low[:, None]) / span[:, None]
    return scaled


def likeness(bands: np.ndarray, pieces: np.ndarray, sigma: float) -> RAG:
    """Adjacent pieces and how like they are: exp(−|difference of mean bands|² / sigma).

    skimage.graph.rag_mean_color in its similarity mode, for any number of bands. Piece 0 is no piece.
    """
    numbers = np.unique(pieces[pieces > 0])
    means = np.stack([ndimage.mean(band, pieces, numbers) for band in bands], axis=1)
    mean = dict(zip(numbers.tolist(), means, strict=True))
    graph = RAG(pieces, connectivity=2)
    graph.remove_nodes_from([0])
    for number, node in graph.nodes(data=True):
        node["labels"] = [number]
    for a, b, edge in graph.edges(data=True):
        edge["weight"] = float(np.exp(-np.sum((mean[a] - mean[b]) ** 2) / sigma))
    return graph
