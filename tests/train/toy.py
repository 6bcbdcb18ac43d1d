"""A model, a corpus and a task of images that train/ does not contain.

An image of 6 x 5 pixels has a bright stripe along one of three columns, and the
model finds the column.
"""

import dataclasses
import functools
from typing import ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np

from models.model import ModelConfig
from train.data.corpus import Corpus, RandomAccess
from train.engine import mesh
from train.engine.task import Task

SHAPE = (6, 5)


@dataclasses.dataclass(frozen=True)
class StripeNet(ModelConfig):
  """A network with a hidden layer."""

  task: ClassVar[str] = 'tests.train.toy:Stripes'

  width: int = 24
  """Size of the hidden layer."""
  num_columns: int = 3
  """Number of columns to choose from."""
  dtype: str = 'float32'
  param_dtype: str = 'float32'

  def layers(self, *, read=None, intercept=None):
    del read, intercept
    return StripeLayers(self)


@dataclasses.dataclass(frozen=True)
class StripeLayers:
  config: StripeNet

  def init(self, key):
    model = self.config
    sizes = (np.prod(SHAPE), model.width, model.num_columns)
    keys = jax.random.split(key)
    hidden, head = (
      jax.random.normal(k, shape) / shape[0] ** 0.5
      for k, shape in zip(keys, [sizes[:2], sizes[1:]], strict=True)
    )
    return {'hidden': {'kernel': hidden}, 'head': {'kernel': head}}

  def logits(self, params, batch):
    images = batch['inputs'].reshape(len(batch['inputs']), -1) / 255
    return (
      jnp.tanh(images @ params['hidden']['kernel']) @ (params['head']['kernel'])
    )

  def __call__(self, params, batch):
    chances = jax.nn.log_softmax(self.logits(params, batch))
    cost = -jnp.take_along_axis(chances, batch['targets'][:, None], 1)[:, 0]
    total = jnp.sum(batch['weights'] * cost)
    sums = {'cost': total, 'weight': jnp.sum(batch['weights'])}
    return total / batch['weights'].size, sums


@dataclasses.dataclass(frozen=True)
class StripeImages(Corpus):
  holds: ClassVar[str] = 'stripes'

  size: int = 60
  """Number of images in a split."""

  def open(self, split):
    rng = np.random.default_rng(len(split))
    rows = []
    for column in rng.integers(3, size=self.size):
      image = rng.integers(200, size=SHAPE, dtype=np.uint8)
      image[:, column] += 55
      rows.append({'inputs': image, 'targets': np.int32(column)})
    return RandomAccess(rows, dict)


class Stripes(Task):
  unit: ClassVar[str] = 'images'
  holds: ClassVar[tuple[str, ...]] = ('stripes',)

  def inputs(self):
    rows = self.config.batch_size
    return {
      'inputs': jax.ShapeDtypeStruct((rows, *SHAPE), np.uint8),
      'targets': jax.ShapeDtypeStruct((rows,), np.int32),
      'weights': jax.ShapeDtypeStruct((rows,), np.float32),
    }

  def _rows(self, examples, **order):
    rows = examples.stream(**order).batch(self.config.batch_size)
    ones = np.ones(self.config.batch_size, np.float32)
    return rows.map(
      lambda batch: batch | {'weights': ones[: len(batch['inputs'])]}
    )

  def batches(self, data) -> grain.DatasetIterator:
    rows = self._rows(data.train, seed=self.config.seed, repeat=True)
    return iter(rows.map(mesh.deal(self.config.mesh)))

  def evaluate(self, data):
    loss = mesh.measure(self.loss, self.config.mesh)
    rows = self._rows(data.validation, seed=0, repeat=False)
    return functools.partial(self._measure, loss, rows)

  def _measure(self, loss, rows, params):
    sums = [loss(params, batch)[1] for batch in rows]
    cost, weight = (
      sum(float(found[name]) for found in sums) for name in ('cost', 'weight')
    )
    return {'loss': cost / weight}
