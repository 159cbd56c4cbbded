"""Perplexity as an `evaluate` module that takes a loaded model: `evaluate.load(hf_prune.metric.__file__)` or `Perplexity()`."""

import datasets
import evaluate

from hf_prune.evaluation import perplexity


class Perplexity(evaluate.Metric):
    """`compute(predictions=texts, model=model, tokenizer=tokenizer, sequence_length=..., stride=...)`.

    The texts are joined by a blank line. Result: the fields of `hf_prune.Perplexity`.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Perplexity of texts under a loaded causal language model, in windows without overlap.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer, sequence_length=None, stride=None):
        return vars(perplexity(model, tokenizer, predictions, sequence_length=sequence_length, stride=stride))
