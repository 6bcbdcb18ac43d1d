"""What is trained: a `Task`, and the language model, which is the first one.

`train.step` makes an update of a task and `train.loop` repeats it. Neither
knows what is inside; a second task is a second function that returns a `Task`.

Axes: B sequences of a batch, T tokens of a sequence.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import grain
import jax
import numpy as np

from galore_optax.layerwise.weights import ARRAYS, is_stored
from models import huggingface, lowrank
from models.llama import Layers
from train import adapter as adapter_lib
from train.config import Config
from train.data.batches import batches, validation_batches
from train.data.corpus import Documents
from train.data.tokenizer import Tokenizer

PyTree: TypeAlias = Any
Batch: TypeAlias = dict[str, Any]
Metrics: TypeAlias = dict[str, float]
Loss: TypeAlias = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]
Mask: TypeAlias = Callable[[PyTree], PyTree]

INPUTS = ('inputs', 'targets', 'weights', 'positions', 'segments')
"""What a language model reads of a batch."""


class Text(NamedTuple):
  """A corpus, opened, and the tokenizer of the run."""

  train: Documents | None  # None where nothing is trained
  validation: Documents
  tokenizer: Tokenizer


def everything(params: PyTree) -> PyTree:
  """Returns the mask of a task that trains all its weights.

  >>> everything({'w': 1})
  {'w': True}
  """
  return jax.tree.map(lambda _: True, params, is_leaf=is_stored)


@dataclasses.dataclass(frozen=True)
class Task:
  """A model and what it learns from; nothing of it exists yet."""

  init: Callable[[jax.Array], PyTree]
  """`key -> parameters`, as they are stored between steps."""
  layers: Any
  """The model one layer at a time, on arrays, as `layerwise` wants it."""
  loss: Loss
  """`(parameters, batch) -> (loss, sums)`, on stored parameters: a mean over
  the positions of a batch, each times its entry of batch['weights']; and sums
  that are linear in these weights, by the name that the log gives them."""
  batches: Callable[[Text], grain.DatasetIterator]
  """Data to batches without end, whose position can be saved."""
  evaluate: Callable[[Text], Callable[[PyTree], Metrics]]
  """Data to `parameters -> metrics` of what is held out."""
  unit: str
  """What a weight of 1 counts."""
  score: Callable[[Metrics], float] = lambda found: found['loss']
  """A number of a validation; the lowest is the best."""
  read: Callable[[jax.Array], PyTree] | None = None
  """As `init`, from the config's checkpoint; what that lacks is drawn."""
  large: tuple[str, ...] = ()
  """Paths of the weights that `Layerwise.slices` cuts."""
  trained: Mask = everything
  """Parameters to the same tree of whether each is trained; the others stay as
  they are, without gradient or optimizer state."""


def language_model(config: Config) -> Task:
  """Returns the pre-training of a LLaMA on a corpus."""
  layers, loss = layers_of(config), stored_layers(config)
  return Task(
    init=lambda key: as_stored(config, Layers(config.model).init(key), key),
    read=lambda key: as_stored(config, read_params(config), key),
    layers=layers,
    loss=loss,
    batches=lambda text: batches(
      text.train,
      text.tokenizer,
      batch_size=config.batch_size,
      sequence_length=config.sequence_length,
      seed=config.seed,
    ),
    evaluate=lambda text: functools.partial(
      perplexity, jax.jit(loss), batches=held_out(config, text)
    ),
    unit='tokens',
    # A tied model has one of them.
    large=('embed/embedding', 'lm_head/kernel'),
    trained=functools.partial(trained, config),
  )


def trained(config: Config, params: PyTree) -> PyTree:
  """Returns which parameters of a config are trained."""
  adapter = config.adapter
  if adapter is None or getattr(adapter, 'lomo', 0):
    return everything(params)
  return lowrank.optimized(params, adapter)


def layers_of(config: Config) -> Layers:
  """Returns the model of a config, with its adapter, on arrays."""
  adapter = config.adapter
  hook = None if adapter is None else lowrank.hook(adapter)
  return Layers(config.model, intercept=hook)


def array_shapes(config: Config, task: Task) -> PyTree:
  """Returns the shapes of a task's parameters as arrays, as gradients are."""
  read = config.weights().read
  arrays = lambda key: jax.tree.map(read, task.init(key), is_leaf=is_stored)
  return jax.eval_shape(arrays, jax.random.key(0))


def stored_layers(config: Config) -> Layers:
  """Returns the model that reads its weights as a config stores them.

  Layer by layer: no more than one layer of them exists as arrays.
  """
  layers, weights = layers_of(config), config.weights()
  if weights is ARRAYS:
    return layers
  read = lambda tree: jax.tree.map(weights.read, tree, is_leaf=is_stored)
  return dataclasses.replace(layers, read=read)


def as_stored(config: Config, params: PyTree, key: jax.Array) -> PyTree:
  """Returns a model's weights as a config stores them, with its adapter."""
  store, adapter = config.weights().store, config.adapter
  if adapter is not None:
    params = lowrank.adapt(params, adapter, adapter_lib.first_key(key))
  is_factor = lambda path: path[-1].key in lowrank.FACTORS
  blocks = jax.tree_util.tree_map_with_path(
    lambda path, w: store(w) if w.ndim > 2 and not is_factor(path) else w,
    params['blocks'],
  )
  return params | {'blocks': blocks}


def read_params(config: Config) -> PyTree:
  """Returns the weights of a config's checkpoint, of the config's type."""
  _, params = huggingface.load(
    config.checkpoint, param_dtype=config.model.param_dtype
  )
  return params


def held_out(config: Config, text: Text) -> grain.IterDataset[Batch]:
  """Returns the validation batches of a config, in parts as in training.

  The rows are the same, however many parts there are.
  """
  num_batches = config.eval_batches
  if num_batches is not None:
    num_batches *= config.parts
  return validation_batches(
    text.validation,
    text.tokenizer,
    batch_size=config.batch_size // config.parts,
    sequence_length=config.sequence_length,
    num_batches=num_batches,
  )


def perplexity(
  loss: Loss, params: PyTree, *, batches: Iterable[Batch]
) -> Metrics:
  """Returns the loss, the perplexity per token and the bits per byte.

  Every scored token counts the same, whichever batch it falls into, and the
  sum is divided by their number and nothing else. Nothing waits for the device
  before all batches are in its queue.
  """
  found, num_bytes = [], 0.0
  for batch in batches:
    _, sums = loss(params, {name: batch[name] for name in INPUTS})
    found.append((sums['nll'], sums['weight']))
    num_bytes += float(np.sum(batch['weights'] * batch['bytes']))
  nll, weight = np.sum(jax.device_get(found), axis=0, dtype=np.float64)
  mean = float(nll / weight)
  return {
    'loss': mean,
    'perplexity': math.exp(mean) if mean < 700 else math.inf,
    'bits_per_byte': float(nll) / math.log(2) / num_bytes,
  }
