"""Rows of classical methods: held against scikit-image, scikit-learn and PyMaxflow on the same scene."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import ALL_BANDS, BANDS, CLASSES, Made, Row, class_fields, write_card

WHOLE = {"size": "whole", "halo": [0], "stride": 1}
BAND = 3
"""The raster's band that is compared with thresholds."""


def rows() -> list[Row]:
    """All of them."""
    methods = [Row(f"{name} (classical)", "classical", partial(_classical, name=name)) for name in METHODS]
    return [*methods, Row("random-forest (classical)", "classical", _forest)]


Method = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From bands (c, y, x), the feature (y, x) and where it is known to class indices."""


def _otsu(bands: np.ndarray, feature: np.ndarray, known: np.ndarray) -> np.ndarray:
    from skimage.filters import threshold_otsu

    return np.asarray(feature > threshold_otsu(feature[known]))


def _multi_otsu(bands: np.ndarray, feature: np.ndarray, known: np.ndarray) -> np.ndarray:
    from skimage.filters import threshold_multiotsu

    return np.digitize(feature, threshold_multiotsu(feature[known], 4, nbins=128))


def _region_growing(bands: np.ndarray, feature: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Connected parts above one quantile that hold an element above another."""
    from skimage.measure import label

    low, high = np.quantile(feature[known], [0.7, 0.95])
    parts = label(known & (feature > low), connectivity=1)
    return np.isin(parts, np.unique(parts[known & (feature > high)]))


def _watershed(bands: np.ndarray, feature: np.ndarray, known: np.ndarray) -> np.ndarray:
    from skimage.filters import sobel
    from skimage.segmentation import watershed

    low, high = np.quantile(feature[known], [0.3, 0.8])
    markers = np.where(feature <= low, 1, np.where(feature >= high, 2, 0)) * known
    return np.asarray(watershed(sobel(feature), markers, mask=known) - 1)


def _graph_cut(bands: np.ndarray, feature: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The minimum cut by the solver of Boykov and Kolmogorov (PyMaxflow)."""
    import maxflow

    x = feature.astype(np.float64)
    bright = known & _otsu(bands, feature, known)
    dark, light = x[known & ~bright].mean(), x[bright].mean()
    cost = [known * (x - mean) ** 2 / (light - dark) ** 2 for mean in (dark, light)]
    graph = maxflow.GraphFloat()
    nodes = graph.add_grid_nodes(x.shape)
    for offset in ((0, 1), (1, 0)):
        structure = np.zeros((3, 3))
        structure[1 + offset[0], 1 + offset[1]] = 1
        both = known & np.roll(known, (-offset[0], -offset[1]), (0, 1))
        graph.add_grid_edges(nodes, SMOOTHNESS * both, structure, symmetric=True)
    graph.add_grid_tedges(nodes, cost[0], cost[1])
    graph.maxflow()
    return ~np.asarray(graph.get_grid_segments(nodes))


def _normalised_cut(bands: np.ndarray, feature: np.ndarray, known: np.ndarray) -> np.ndarray:
    """By scikit-image: SLIC, a graph of mean colours (three bands), normalised cuts, Otsu on what is left."""
    from skimage import graph, segmentation

    span = [np.ptp(band[known]) for band in bands]
    low = [band[known].min() for band in bands]
    scaled = np.stack([(b - a) / s * known for b, a, s in zip(bands, low, span, strict=True)])
    pieces = segmentation.slic(
        scaled, 400, 1.0, convert2lab=False, channel_axis=0, mask=None if known.all() else known
    )
    near = graph.rag_mean_color(np.moveaxis(scaled, 0, -1), pieces, mode="similarity", sigma=0.004)
    if 0 in near:
        near.remove_node(0)
    parts = graph.cut_normalized(pieces, near, thresh=0.5, rng=0)
    means = np.zeros(feature.shape, np.float32)
    for part in np.unique(parts[known]):
        here = known & (parts == part)
        means[here] = feature[here].mean(dtype=np.float64)
    return _otsu(bands, means, known)


SMOOTHNESS = 0.2
THREE = ["b1", "b2", f"b{BAND}"]
METHODS: dict[str, tuple[Method, int, dict[str, Any]]] = {
    "otsu": (_otsu, 2, {}),
    "multi-otsu": (_multi_otsu, 4, {"bins": 128}),
    "region-growing": (_region_growing, 2, {"seed": 0.95, "grow": 0.7}),
    "watershed": (_watershed, 2, {"markers": [[0, 0.3], [0.8, 1]]}),
    "graph-cut": (_graph_cut, 2, {"smoothness": SMOOTHNESS}),
    "normalised-cut": (_normalised_cut, 2, {"segments": 400, "sigma": 0.004}),
}
"""What is called without segpipe, how many classes, and what the card's arguments say."""


def _classical(folder: Path, name: str) -> Made:
    """Held against scikit-image's own functions (graph-cut: PyMaxflow's) on the whole scene."""
    method, classes, arguments = METHODS[name]
    feature = {"linear": {f"b{BAND}": 1}}
    bands = THREE if name == "normalised-cut" else ALL_BANDS
    card = write_card(
        folder,
        "classical",
        bands=bands,
        architecture=name,
        arguments={"feature": feature, **arguments},
        window=WHOLE,
        output={"activation": "none"},
        classes=class_fields(classes),
    )

    def labels(x: torch.Tensor) -> np.ndarray:
        image = x[0].numpy()
        return method(image, image[bands.index(f"b{BAND}")], image.any(axis=0)).astype(np.int64)

    return Made(card, labels)


def _forest(folder: Path) -> Made:
    """Held against scikit-learn's own forest; learned on noise, as scenes are normalised."""
    from sklearn.ensemble import RandomForestClassifier

    from segpipe.models.providers.classical.forest import save_forest

    rng = np.random.default_rng(0)
    image = rng.normal(size=(20_000, BANDS)).astype(np.float32)
    target = np.digitize(image[:, 0] + 0.5 * image[:, 3] ** 2, np.linspace(-1, 2, CLASSES - 1))
    forest = RandomForestClassifier(50, min_samples_leaf=5, random_state=0).fit(image, target)
    save_forest(forest, folder / "forest.safetensors")
    card = write_card(
        folder,
        "classical",
        architecture="random-forest",
        weights="forest.safetensors",
        window={"halo": [0], "stride": 1},
        output={"activation": "none"},
    )

    def labels(x: torch.Tensor) -> np.ndarray:
        shares = forest.predict_proba(x[0].flatten(1).T.numpy())
        return np.asarray(shares.argmax(1).reshape(x.shape[2:]))

    return Made(card, labels)
