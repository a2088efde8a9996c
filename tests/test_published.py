"""The published numbers: only beside the classes and the way that they are of."""

import pytest

from common.published import CIFAR_FS, FC100, published_results


def test_the_papers_numbers_stand_beside_5_way_episodes_of_their_own_split():
    assert published_results("cifar_fs", 5) == CIFAR_FS
    assert published_results("fc100", 5) == FC100


@pytest.mark.parametrize("split, n_way", [("cifar_fs", 10), ("tutorial", 5), ("", 5)])
def test_the_papers_numbers_stand_nowhere_else(split, n_way):
    assert published_results(split, n_way) == ()


@pytest.mark.parametrize("results", [CIFAR_FS, FC100])
def test_each_row_has_a_method_an_encoder_and_two_accuracies_in_percent(results):
    for method, encoder, parameters, one_shot, five_shot in results:
        assert method and encoder and (parameters is None or parameters[0].isdigit())
        assert 20 < one_shot < five_shot < 100
