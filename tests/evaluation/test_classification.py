import numpy as np

from pirl_jax.evaluation import classification


def test_ranks_of_equal_scores_go_to_the_lower_class():
  logits = np.float32([[3, 1, 2, 0], [3, 1, 2, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 5, 5, 9]])
  assert classification.true_ranks(logits, np.array([0, 3, 0, 2, 2])).tolist() == [0, 3, 0, 2, 2]
