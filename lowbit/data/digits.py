"""Handwritten digits that come with scikit-learn: 1,797 real 8x8 images, in every installation."""

import torch

from lowbit.data.base import ArrayDataset, Data, _stratified_order, dataset, pixel_statistics
from lowbit.extras import extra

TEST = 360


@dataset(
    "digits",
    title="handwritten digits, 8x8, gray",
    task="classification",
    kind="embedded",
    items="1,437 + 360",
    classes=10,
    license="CC BY 4.0",
    citation="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998",
    source="scikit-learn (sklearn.datasets.load_digits)",
    note="the UCI test part; split here into 1,437 training and 360 test images, balanced over the digits",
)
def digits() -> Data:
    """The digits, uint8 ``[N, 1, 8, 8]`` with the original 17 gray levels spread over 0 ... 255."""
    with extra("data", "the data set digits"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy((bunch.images * 255 / 16).round()).to(torch.uint8)[:, None]
    y = torch.from_numpy(bunch.target).to(torch.int64)
    order = _stratified_order(y, seed=0)
    whole = ArrayDataset(x, y)
    test, train = whole.take(order[:TEST].sort().values), whole.take(order[TEST:].sort().values)
    mean, std = pixel_statistics(train.x)
    names = tuple(str(d) for d in range(10))
    return Data("digits", "classification", names, train, test, (1, 8, 8), mean, std)
