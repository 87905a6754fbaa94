"""Metrics of the recipes: `evaluate.Metric`s whose code is here, so that they need no network."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score, recall_score

# How many classes, by logit, `best_classes` leaves to `compute_metrics`.
KEPT_CLASSES = 5


class Accuracy(evaluate.Metric):
    """The share of samples whose label is among the k classes with the highest logits."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: the best classes of each sample, best first; "
            "references: its label",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references, k: tuple[int, ...] = (1,)) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {
            "accuracy" if n == 1 else f"top{n}_accuracy": float(hits[:, :n].any(1).mean())
            for n in k
        }


def _of_classes(description: str) -> evaluate.MetricInfo:
    """Of a metric of predicted classes and labels."""
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions: the predicted class of each sample; references: its label",
        features=datasets.Features(
            {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        ),
    )


class MacroF1(evaluate.Metric):
    """The mean F1 score of the classes that are predicted or present. Rare ones count the same."""

    def _info(self) -> evaluate.MetricInfo:
        return _of_classes(self.__doc__)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro"))}


class BalancedAccuracy(evaluate.Metric):
    """The mean over the classes that are present of the share classified correctly."""

    def _info(self) -> evaluate.MetricInfo:
        return _of_classes(self.__doc__)

    def _compute(self, predictions, references) -> dict[str, float]:
        # balanced_accuracy_score warns if a class is predicted that is not present.
        present = np.unique(references)
        recall = recall_score(references, predictions, labels=present, average="macro")
        return {"balanced_accuracy": float(recall)}


def best_classes(logits, labels):
    """For `preprocess_logits_for_metrics`: the (B, 5) best classes of (B, C) logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(KEPT_CLASSES, logits.shape[-1]), dim=-1).indices


def accuracy_of(*k: int):
    """For `compute_metrics`: the top-k accuracies of several k."""
    metric = Accuracy(keep_in_memory=True)

    def compute(prediction) -> dict[str, float]:
        return metric.compute(
            predictions=prediction.predictions, references=prediction.label_ids, k=k
        )

    return compute


def accuracy_and_balance(*k: int):
    """For `compute_metrics`: the top-k accuracies of several k, and the balanced accuracy."""
    accuracy, balanced = accuracy_of(*k), BalancedAccuracy(keep_in_memory=True)

    def compute(prediction) -> dict[str, float]:
        best, labels = prediction.predictions, prediction.label_ids
        return {
            **accuracy(prediction),
            **balanced.compute(predictions=best[:, 0], references=labels),
        }

    return compute


def accuracy_and_f1():
    """For `compute_metrics`: accuracy and macro-F1."""
    accuracy, macro_f1 = Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)

    def compute(prediction) -> dict[str, float]:
        best, labels = prediction.predictions, prediction.label_ids
        return {
            **accuracy.compute(predictions=best, references=labels),
            **macro_f1.compute(predictions=best[:, 0], references=labels),
        }

    return compute
