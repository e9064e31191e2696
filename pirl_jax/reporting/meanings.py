"""What every figure of a run means: the columns of metrics.jsonl, and the figures in results/*.json."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Meaning:
  """The meaning of one figure.

  Attributes:
    text: what the figure is, with its unit or range.
    healthy: the range of a run that learns, in words; "" if no range says so.
    low, high: the ends of the healthy range at the end of a run, or None for an end that is open.
  """

  text: str
  healthy: str = ""
  low: float | None = None
  high: float | None = None


METRICS = {
  "step": Meaning("number of updates so far"),
  "epoch": Meaning("passes over the training images so far"),
  "loss": Meaning("pretext_weight x loss_pretext + (1 - pretext_weight) x loss_image + angle_weight x loss_angle, or "
                  "the cross-entropy of a predicted label; in nats", "falls; below its chance level at the end"),
  "loss_image": Meaning("contrastive loss of the image view; in nats", "falls"),
  "loss_pretext": Meaning("contrastive loss of the pretext view; in nats", "falls"),
  "loss_angle": Meaning("cross-entropy of the angle by which the image view was turned; in nats", "falls below ln 4"),
  "top1_angle": Meaning("share of the batch whose angle is predicted rightly, in [0, 1]", "rises above 1/4"),
  "learning_rate": Meaning("learning rate of the step, already scaled to the batch size"),
  "top1": Meaning("share of the batch whose label is predicted rightly, in [0, 1]; runs without a bank only",
                  "rises above 1 / number of labels"),
  "embedding_spread": Meaning("standard deviation of the batch's embeddings, times sqrt(dim): 1 fills the sphere, 0 is "
                              "a point", "0.2 to 1; below 0.05 the embeddings have collapsed", 0.2, 1.0),
  "similarity_own": Meaning("mean cosine of an image's embedding and its own row of the bank, in [-1, 1]",
                            "above similarity_negatives", 0.3, 1.0),
  "similarity_own_pretext": Meaning("mean cosine of the pretext view's embedding and the image's own row, in [-1, 1]",
                                    "above 0.2 at the end; near 0 nothing is learnt yet", 0.2, 1.0),
  "similarity_negatives": Meaning("mean cosine of an image's embedding and the negatives, in [-1, 1]",
                                  "below similarity_own"),
  "negatives_beaten": Meaning("share of the negatives that are less similar than the own row, in [0, 1]; 0.5 is chance",
                              "above 0.8 at the end", 0.8, 1.0),
  "images_per_second": Meaning("training images per second since the last row, without pauses"),
  "data_wait": Meaning("share of the time in which the step waits for images, in [0, 1]",
                       "below 0.1; more threads or smaller copies of the images help", 0.0, 0.1),
  "other_knn_top1": Meaning("kNN top-1, by pooled features, on the set that evaluate.source and evaluate.root name, in "
                            "[0, 1]", "rises"),
  "other_linear_top1": Meaning("top-1 of a linear classifier on pooled features of that set, in [0, 1]", "rises"),
  "knn_top1": Meaning("share of the held-out images whose class is that of a vote of the nearest training images, in "
                      "[0, 1]; needs labels", "rises above 1 / number of classes"),
  "bank_rank": Meaning("RankMe of 2,048 rows of the bank: the number of directions that they fill, from 1 to dim",
                       "falls at first, because new rows are random, then rises; below 5 the rows have collapsed",
                       5.0, None),
  "feature_rank": Meaning("RankMe of the pooled features of views, from 1 to their number; compares checkpoints of one "
                          "method", "rises after the first epochs"),
  "embedding_rank": Meaning("RankMe of the embeddings of views, from 1 to dim",
                            "rises after the first epochs; below 5 the embeddings have collapsed", 5.0, None),
  "lidar": Meaning("LiDAR: the number of directions in which images differ more than their own views do",
                   "rises after the first epochs; never read it alone"),
  "alignment": Meaning("mean squared distance of the embeddings of two views of an image, in [0, 4]",
                       "well below 2, the distance of two images, while uniformity is low"),
  "uniformity": Meaning("log of the mean of exp(-2 x squared distance) over pairs of images, from about -4 (spread "
                        "over the sphere) to 0 (a point)", "below -1"),
  "nearest_view": Meaning("share of the images of which another augmented view is the nearest neighbour, in [0, 1]",
                          "a quarter or more of the untrained network's mistakes are gone"),
}
"""The columns of metrics.jsonl."""

FIGURES = {
  "top1": Meaning("share of the held-out images whose class is predicted rightly, in [0, 1]"),
  "top5": Meaning("share of the held-out images whose class is among the five most probable ones, in [0, 1]"),
  "top1_by_k": Meaning("knn: top1 with other numbers of neighbours"),
  "mean_average_precision": Meaning("mean over the classes (svm, low_shot) or queries (retrieval) of the average "
                                    "precision, in [0, 1]"),
  "average_precision": Meaning("svm: average precision of each class, in [0, 1]"),
  "precision_at": Meaning("retrieval: share of the first 1, 5, 10, ... neighbours with the class of the query"),
  "mean_similarity_of_nearest": Meaning("retrieval: mean cosine of a query and its nearest neighbour, in [-1, 1]"),
  "matched": Meaning("invariance: distances between an image and its own transformed versions, in [0, 2]"),
  "mismatched": Meaning("invariance: distances between an image and transformed versions of another image, in [0, 2]"),
  "separation": Meaning("invariance: probability that a mismatched distance is larger than a matched one, in [0, 1]",
                        "above 0.5, which is chance"),
  "shots": Meaning("low_shot: average precision with 1, 2, 4, ... examples per class: mean, min, max and std "
                   "of the draws"),
  "fractions": Meaning("semi_supervised: the figures after fine-tuning on each share of the labels"),
  "layers": Meaning("the figures of each layer"),
  "further": Meaning("linear: the figures of the best layer on further sets, among the classes of each"),
  "best_layer": Meaning("the layer with the best figure"),
  "raw_pixels": Meaning("learning: kNN top-1 on the pixels themselves, in [0, 1]"),
  "untrained": Meaning("learning: kNN top-1 of the network before its first step, in [0, 1]"),
  "trained": Meaning("learning: kNN top-1 of the trained network, in [0, 1]", "above untrained and raw_pixels"),
  "k": Meaning("number of neighbours that was asked for"),
  "k_used": Meaning("number of neighbours that voted; fewer if there are fewer images"),
  "temperature": Meaning("tau of the neighbours' votes"),
  "layer": Meaning("the layer whose features are used"),
  "dim": Meaning("number of values of a feature"),
  "similarity": Meaning("how features are compared"),
  "features": Meaning("which features are used"),
  "gallery": Meaning("retrieval: what is searched, the features of the training images or the bank"),
  "labels": Meaning("retrieval: classes, or why there are none"),
  "queries": Meaning("retrieval: the images of the plot, with their neighbours"),
  "representation": Meaning("invariance: heads (f and g) or trunk"),
  "splits": Meaning("features: the files, one for each split"),
  "num_train": Meaning("number of training images used"),
  "num_test": Meaning("number of held-out images used"),
  "num_images": Meaning("number of images used"),
  "num_queries": Meaning("number of queries"),
  "num_gallery": Meaning("number of images that are searched"),
  "num_judged": Meaning("number of queries with an image of their class in the gallery"),
  "num_transforms": Meaning("number of random transforms of each image"),
  "num_folds": Meaning("svm: parts of the cross-validation"),
  "num_broken": Meaning("number of images that could not be read"),
  "num_broken_train": Meaning("number of training images that could not be read"),
  "num_broken_test": Meaning("number of held-out images that could not be read"),
  "num_broken_queries": Meaning("number of queries that could not be read"),
  "num_broken_gallery": Meaning("number of images of the gallery that could not be read"),
  "classes_left_out": Meaning("classes with too few examples"),
  "grid": Meaning("costs of the SVMs that were tried"),
  "seed": Meaning("of everything random in the evaluation"),
  "shots_left_out": Meaning("low_shot: numbers of examples that no class has"),
  "cost_choice": Meaning("low_shot: how the cost of the SVMs is chosen"),
  "num_draws": Meaning("low_shot: random draws of the examples"),
  "num_classes": Meaning("number of classes"),
  "num_labelled": Meaning("semi_supervised: number of training images with a label"),
  "steps": Meaning("linear: number of updates of the classifiers"),
  "settings": Meaning("the settings that were used, with the scaled learning rate"),
  "seconds": Meaning("time of the protocol, in seconds"),
  "written": Meaning("further files"),
}
"""The figures in results/*.json. A name may stand in the results of several protocols."""
