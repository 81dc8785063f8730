"""`examples/digits_scores.py`: the scores of a network's labels."""

import numpy as np
import pytest
from digits_data import BACKGROUND
from digits_scores import scores_of


def test_scores_of_a_confusion_matrix():
    confusion = np.zeros((11, 11), int)
    confusion[BACKGROUND, BACKGROUND] = 90
    confusion[BACKGROUND, 3] = 10
    confusion[3, 3] = 6
    confusion[3, 4] = 2
    mean_iou, accuracy = scores_of(confusion)
    assert mean_iou == pytest.approx((90 / 100 + 6 / 18 + 0 / 2) / 11)
    assert accuracy == 6 / 8
