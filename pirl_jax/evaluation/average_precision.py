"""Average precision of one class as VOC's devkit (from 2010 on) and vissl take it.

Letters: N pictures.
"""

import numpy as np


def average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
  """Returns the area under the curve of precision over recall, in (0, 1].

  Precision is first made to rise nowhere along the curve: at each recall it is the highest at that recall or a higher
  one; the area then is summed at every change of recall (vissl: vissl/utils/svm_utils/evaluate.py). Pictures of equal
  score are taken together, as scikit-learn's `precision_recall_curve` does, so that their order does not matter;
  scikit-learn's own `average_precision_score` leaves precision as it is, and so is never higher.

  Args:
    targets: i[N]: 1 present, 0 absent, -1 neither ("difficult"), left out. At least one is 1.
    scores: f[N], finite; higher means more surely present.
  """
  judged = targets >= 0
  present, scores = targets[judged] == 1, scores[judged]
  order = np.argsort(-scores, kind="stable")
  last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of its equals
  hits = np.cumsum(present[order])[last]
  precision = np.maximum.accumulate((hits / (last + 1))[::-1])[::-1]
  recall = hits / hits[-1]
  return float(np.sum(np.diff(recall, prepend=0.0) * precision))
