"""What a linear classifier reads from features: the class folders of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FOLDS = 5


def class_of(path: Path, root: Path) -> str:
    """The class of a picture: the first folder below ``root``, as in ImageNet's layout; "" where it
    lies in the folder itself."""
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def why_not(labels: Sequence[str]) -> str | None:
    """Why pictures with these classes cannot be probed; None where they can.

    Args:
        labels: the pictures' classes, none of them ""."""
    counts = Counter(labels)
    if len(counts) < 2:
        return "all pictures are of one class"
    least = min(counts, key=lambda name: counts[name])
    if counts[least] < FOLDS:
        return f"the class {least} has {counts[least]} pictures, fewer than {FOLDS}"
    return None


def linear_probe(features: np.ndarray, labels: Sequence[str]) -> float:
    """Share of pictures whose class a linear classifier names that was fitted to the others.

    Logistic regression (scikit-learn's, penalty of its default strength) on standardised features,
    five folds with the classes' shares, each picture judged once by the fold that it is not in.

    Args:
        features: [n, C].
        labels: n classes, each with :data:`FOLDS` pictures or more.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    found = cross_val_predict(model, features.astype(np.float64), np.array(labels), cv=folds)
    return float(np.mean(found == np.array(labels)))


def floor(labels: Sequence[str]) -> float:
    """Share of the commonest class, which answering without a look gives."""
    return max(Counter(labels).values()) / len(labels)
