"""Fine-tuning of encoders on labelled texts.

Axes: B rows of a batch, T tokens of a row, C labels, n rows of a split.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeAlias, cast, get_args

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import RenderableType

from models import encoder
from models.encoder import EncoderConfig
from train.data import classifier_metrics, labelled
from train.engine import mesh as mesh_lib
from train.engine.task import Batch, Metrics, PyTree
from train.tasks.text import Text, TextTask

Logits: TypeAlias = Callable[[PyTree, Batch], jax.Array]


class TextClassification(TextTask):
  """Choosing a label for a text or a pair of texts, or predicting a number."""

  unit: ClassVar[str] = 'examples'
  holds: ClassVar[tuple[str, ...]] = ('labelled texts',)

  def __post_init__(self) -> None:
    """Raises ValueError if metric or tokenizer do not fit."""
    super().__post_init__()
    config = self.config
    check_metric(self.metric, self.model.num_labels)
    if config.checkpoint is None and config.tokenizer is None:
      raise ValueError(
        'a classifier needs a tokenizer.json: name a directory that has one '
        'with --checkpoint, or with --tokenizer to start from random weights'
      )

  @property
  def model(self) -> EncoderConfig:
    """The model."""
    return cast(EncoderConfig, self.config.resolved_model)

  @property
  def metric(self) -> labelled.Metric:
    """The metric that decides which validation is the best."""
    return cast(labelled.Labelled, self.config.corpus).metric

  @property
  def labels(self) -> labelled.Labels:
    """The classes."""
    return labelled.Labels(self.model.num_labels, self.model.labels)

  def inputs(self) -> Batch:
    """Returns the shapes of the largest batch.

    A row has at most as many tokens as the model has positions.
    """
    model = self.model
    rows = self.config.batch_size
    length = min(self.sequence_length, model.max_length)
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32)
    label = np.float32 if model.num_labels == 1 else np.int32
    shapes = {
      **dict.fromkeys(('inputs', 'types', 'segments'), tokens),
      'targets': jax.ShapeDtypeStruct((rows,), label),
      'weights': jax.ShapeDtypeStruct((rows,), np.float32),
    }
    if model.dropout > 0:
      shapes['noise'] = jax.ShapeDtypeStruct((rows, 2), np.uint32)
    return shapes

  def batches(self, data: Text) -> grain.DatasetIterator:
    """Returns batches of rows, without end."""
    config = self.config
    return labelled.batches(
      data.train,
      data.tokenizer,
      self.labels,
      batch_size=config.batch_size,
      sequence_length=self.sequence_length,
      seed=config.seed,
      noise=self.model.dropout > 0,
      put=mesh_lib.deal(config.mesh),
    )

  def evaluate(self, data: Text) -> Callable[[PyTree], Metrics]:
    """Returns a function that computes the loss and the metrics of a split."""
    config = self.config
    rows = labelled.validation_batches(
      data.validation,
      data.tokenizer,
      self.labels,
      batch_size=config.batch_size,
      sequence_length=self.sequence_length,
      num_batches=config.eval_batches,
    )
    return functools.partial(
      measure,
      mesh_lib.measure(self.stored_layers.logits, config.mesh),
      batches=rows,
      num_labels=self.model.num_labels,
    )

  def example(self, data: Text) -> RenderableType:
    """Returns the tokens and the label of an example."""
    return labelled.shown(
      data.train,
      data.tokenizer,
      self.labels,
      sequence_length=self.sequence_length,
      seed=self.config.seed,
    )

  def score(self, found: Metrics) -> float:
    """Returns the negated metric of the corpus."""
    return -found[self.metric]

  def export(self, run: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes the tokenizer."""
    from train.tasks import text_export

    text_export.write_tokenizer(run, directory)


def measure(
  logits: Logits, params: PyTree, *, batches: Iterable[Batch], num_labels: int
) -> Metrics:
  """Computes the loss and the metrics of a split, over all rows at once.

  Args:
    logits: `(parameters, batch) -> [B, C]`.
    params: the model's parameters.
    batches: the batches of the split; rows of weight 0 are padding.
    num_labels: C; 1 means that the model predicts a number.
  """
  found = [(logits(params, batch), batch) for batch in batches]
  rows = [
    (np.asarray(logits_BC), batch['targets'], batch['weights'] > 0)
    for logits_BC, batch in found
  ]
  logits_nC = np.concatenate([x[kept] for x, _, kept in rows])
  targets_n = np.concatenate([x[kept] for _, x, kept in rows])
  cost_n = np.asarray(
    encoder.cost(jnp.asarray(logits_nC), jnp.asarray(targets_n), num_labels)
  )
  metrics = {'loss': float(np.mean(cost_n, dtype=np.float64))}
  if num_labels == 1:
    return metrics | classifier_metrics.correlations(logits_nC[:, 0], targets_n)
  labels_n = np.argmax(logits_nC, axis=-1)
  return metrics | classifier_metrics.agreement(labels_n, targets_n)


def check_metric(metric: str, num_labels: int) -> None:
  """Raises ValueError unless a metric fits the number of labels.

  Correlations need a number to predict, all others need labels.
  """
  correlations = get_args(classifier_metrics.Correlation)
  if (metric in correlations) != (num_labels == 1):
    raise ValueError(
      f'corpus.metric must be {"one" if num_labels == 1 else "none"} of '
      f'{" and ".join(correlations)} for model.num_labels={num_labels}, got '
      f'{metric}'
    )
