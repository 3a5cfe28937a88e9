"""A random forest that looks at one element at a time: fitted by scikit-learn, stored as arrays.

The floor for every network that looks at neighbours too. The file is data (safetensors), never a
pickle, and is read without scikit-learn.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from segpipe.errors import RequestError
from segpipe.models.weights import load_state

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier

CHUNK = 1 << 15
"""Elements that go through the trees together on a CPU: their node numbers stay in the cache."""

ARRAYS = {
    "roots": torch.int64,
    "children_left": torch.int32,
    "children_right": torch.int32,
    "feature": torch.int32,
    "threshold": torch.float32,
    "shares": torch.float32,
    "classes": torch.int64,
    "bands": torch.int64,
}
"""What is in a file. `roots`: (trees,), first node of each. Over all nodes: `children_*`, -1 at leaves;
`feature`, the band that is asked; `threshold`, at most which goes left. `shares`: (leaves, classes), in
the nodes' order. `classes`: (classes,), the output channel of each. `bands`: (1,), how many."""


def fit_forest(
    image: np.ndarray,
    target: np.ndarray,
    *,
    trees: int = 100,
    max_samples: int | float | None = None,
    min_samples_leaf: int = 5,
    seed: int = 0,
    ignore: int = -1,
    threads: int = 1,
) -> RandomForestClassifier:
    """A forest fitted to the labelled elements of one image; the same for the same seed.

    Args:
        image: (c, …) float32, as the card normalises it; elements that are not finite are left out.
        target: (…) index of the class, in the card's order.
        trees: how many.
        max_samples: elements (or share of them) drawn for each tree; None: as many as there are.
        min_samples_leaf: a split leaves at least this many on each side.
        seed: of the draws.
        ignore: the target of elements without a label.
        threads: how many trees are fitted at a time; the answer is the same.

    Raises:
        RequestError: the shapes do not fit, or nothing is labelled.
    """
    from sklearn.ensemble import RandomForestClassifier

    if image.shape[1:] != target.shape:
        raise RequestError(f"target: found shape {target.shape}; valid: the image's, {image.shape[1:]}")
    wanted = (target != ignore) & np.isfinite(image).all(axis=0)
    if not wanted.any():
        raise RequestError(f"target: no element has a finite value and a label other than {ignore}")
    if isinstance(max_samples, int):
        max_samples = min(max_samples, int(np.count_nonzero(wanted)))
    forest = RandomForestClassifier(
        trees, max_samples=max_samples, min_samples_leaf=min_samples_leaf, random_state=seed, n_jobs=threads
    )
    return forest.fit(image[:, wanted].T.astype(np.float32), target[wanted])


def save_forest(forest: RandomForestClassifier, path: str | Path) -> None:
    """Write the trees as plain arrays (see `ARRAYS`); classes must be channel indices, 0 and up."""
    trees = [estimator.tree_ for estimator in forest.estimators_]
    roots = np.cumsum([0, *(tree.node_count for tree in trees)])[:-1]

    def children(name: str) -> np.ndarray:
        local = [getattr(tree, name) for tree in trees]
        return np.concatenate([np.where(c < 0, -1, c + root) for c, root in zip(local, roots, strict=True)])

    left = children("children_left")
    leaf = left < 0
    value = np.concatenate([tree.value[:, 0, :] for tree in trees])[leaf]
    exact = np.concatenate([tree.threshold for tree in trees])
    threshold = exact.astype(np.float32)
    # Bands are float32: x ≤ t is the same as x ≤ the last float32 that is not above t.
    threshold = np.where(threshold > exact, np.nextafter(threshold, np.float32(-np.inf)), threshold)
    arrays = {
        "roots": roots,
        "children_left": left,
        "children_right": children("children_right"),
        "feature": np.where(leaf, 0, np.concatenate([tree.feature for tree in trees])),
        "threshold": np.where(leaf, np.float32(0), threshold),
        "shares": value / value.sum(axis=1, keepdims=True),
        "classes": np.asarray(forest.classes_),
        "bands": np.array([forest.n_features_in_]),
    }
    save_file({name: torch.from_numpy(arrays[name]).to(kind) for name, kind in ARRAYS.items()}, Path(path))


@dataclass
class Forest:
    """The trees on a device, all their nodes in one list."""

    roots: list[int]
    depths: list[int]
    """Most questions from each root to a leaf."""
    children: torch.Tensor
    """(2 · nodes,) int32: right and left child of each node; a leaf's are itself."""
    feature: torch.Tensor
    """(nodes,) int32."""
    threshold: torch.Tensor
    """(nodes,) float32."""
    row: torch.Tensor
    """(nodes,) int32: a leaf's row in `shares`."""
    shares: torch.Tensor
    """(leaves, k) float32, a column per output channel."""
    device: torch.device
    threads: int
    """Chunks at a time, on a CPU; the answer is the same."""

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training: a threshold per question, and the leaves' shares."""
        return len(self.threshold) - len(self.shares) + self.shares.numel()

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean of the trees' shares: (n, c, …) float32 to (n, k, …) float32, element by element."""
        n, c, *space = batch.shape
        scores = [self._window(x.reshape(c, -1)) for x in batch]
        return torch.stack(scores).reshape(n, -1, *space)

    def _window(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (k, elements) of one window (c, elements)."""
        if x.device.type != "cpu":
            return self._chunk(x.contiguous()).T
        chunks = [part.contiguous() for part in x.split(CHUNK, dim=1)]
        # A thread per chunk, not threads inside each of its thousands of small steps.
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(self._chunk, chunks))).T

    def _chunk(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (elements, k): every element asks its tree's deepest path, and waits at its leaf."""
        count = x.shape[1]
        flat, at = x.reshape(-1), torch.arange(count, dtype=torch.int32, device=x.device)
        total = torch.zeros(count, self.shares.shape[1], dtype=torch.float64, device=x.device)
        for root, depth in zip(self.roots, self.depths, strict=True):
            node = torch.full((count,), root, dtype=torch.int32, device=x.device)
            for _ in range(depth):
                asked = flat.index_select(0, self.feature.index_select(0, node) * count + at)
                left = asked <= self.threshold.index_select(0, node)
                node = self.children.index_select(0, node * 2 + left)
            total += self.shares.index_select(0, self.row.index_select(0, node))
        return (total / len(self.roots)).float()


def load_forest(path: Path, bands: int, classes: int, device: torch.device, threads: int = 1) -> Forest:
    """The trees of a file that `save_forest` wrote.

    Args:
        path: a safetensors file.
        bands: channels of the windows.
        classes: channels of the scores; those the forest never saw get 0.
        device: where the trees go.
        threads: of a CPU.

    Raises:
        RequestError: another kind of file, damaged, or for other bands or classes.
    """
    state = load_state(path)
    _check_arrays(path, state)
    if int(state["bands"]) != bands:
        raise RequestError(f"{path}: the forest takes {int(state['bands'])} bands; input.bands has {bands}")
    channels = state["classes"]
    if not 0 <= int(channels.min()) <= int(channels.max()) < classes:
        raise RequestError(
            f"{path}: the forest's classes are {channels.tolist()}; "
            f"valid: 0 to {classes - 1}, indices of the card's classes"
        )
    left, right = state["children_left"], state["children_right"]
    leaf = left < 0
    own = torch.arange(len(left), dtype=torch.int32)
    children = torch.stack([torch.where(leaf, own, right), torch.where(leaf, own, left)], 1)
    shares = torch.zeros(len(state["shares"]), classes)
    shares[:, channels] = state["shares"]
    roots = state["roots"].tolist()
    return Forest(
        roots=roots,
        depths=[_depth(left, right, root) for root in roots],
        children=children.reshape(-1).to(device),
        feature=state["feature"].to(device),
        threshold=state["threshold"].to(device),
        row=(leaf.cumsum(0) - 1).clamp(min=0).int().to(device),
        shares=shares.to(device),
        device=device,
        threads=threads,
    )


def _depth(left: torch.Tensor, right: torch.Tensor, root: int) -> int:
    """Questions from a root to its deepest leaf."""
    depth, level = 0, torch.tensor([root])
    while True:
        level = level[left[level] >= 0]
        if not len(level):
            return depth
        level = torch.cat([left[level], right[level]]).unique()
        depth += 1


def _check_arrays(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Whether the arrays are there and every index in them leads somewhere, further down the tree.

    Raises:
        RequestError: names the first array that is not as `save_forest` writes it.
    """
    for name, kind in ARRAYS.items():
        axes = 2 if name == "shares" else 1
        if name not in state or state[name].dtype != kind or state[name].ndim != axes:
            raise RequestError(f"{path}: {name}: valid: {kind} with {axes} axes, as save_forest writes it")
    left, right, roots = state["children_left"], state["children_right"], state["roots"]
    nodes, leaf = len(left), left < 0
    for name in ("children_right", "feature", "threshold"):
        if len(state[name]) != nodes:
            raise _damaged(path, name)
    own = torch.arange(nodes)[~leaf]
    shares = state["shares"]
    wrong = {
        # A child comes after its parent, so that no path goes round in circles.
        "children_left": bool((left[~leaf] <= own).any() or (left >= nodes).any()),
        "children_right": bool((right[~leaf] <= own).any() or (right >= nodes).any()),
        "feature": _outside(state["feature"], int(state["bands"][0])),
        "threshold": not bool(state["threshold"].isfinite().all()),
        "roots": not len(roots) or _outside(roots, nodes),
        "shares": shares.shape != (int(leaf.sum()), len(state["classes"]))
        or not bool(shares.isfinite().all()),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise _damaged(path, name)


def _damaged(path: Path, name: str) -> RequestError:
    return RequestError(f"{path}: {name}: damaged, or not written by save_forest")


def _outside(indices: torch.Tensor, stop: int) -> bool:
    return bool(((indices < 0) | (indices >= stop)).any())
