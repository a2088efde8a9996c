"""The published numbers: only beside the classes and the way that they are of."""

import pytest

from common.data import ImageSet
from common.published import CIFAR_FS, FC100, published_results
from common.splits import class_split


def classes_of(name):
    """The test classes of a split of CIFAR-100, of which no image is needed."""
    return class_split(name, ImageSet("cifar100", None, None, []))["test"]


@pytest.mark.parametrize("name, results", [("cifar_fs", CIFAR_FS), ("fc100", FC100)])
def test_the_papers_numbers_stand_beside_their_own_classes_of(name, results):
    classes = classes_of(name)
    assert len(classes) == 20
    assert published_results("cifar100", classes, 5) == results
    assert published_results("cifar100", classes[::-1], 5) == results


@pytest.mark.parametrize(
    "dataset, classes, n_way",
    [
        ("cifar100", classes_of("cifar_fs"), 10),
        ("cifar100", classes_of("cifar_fs")[1:], 5),
        ("cifar100", ["kangaroo", "crocodile", "butterfly", "shark", "forest"], 5),
        ("mine", classes_of("fc100"), 5),
    ],
)
def test_the_papers_numbers_stand_nowhere_else(dataset, classes, n_way):
    assert published_results(dataset, classes, n_way) == ()


@pytest.mark.parametrize("results", [CIFAR_FS, FC100])
def test_each_row_has_a_method_an_encoder_and_two_accuracies_in_percent(results):
    for method, encoder, parameters, one_shot, five_shot in results:
        assert method and encoder and (parameters is None or parameters[0].isdigit())
        assert 20 < one_shot < five_shot < 100
