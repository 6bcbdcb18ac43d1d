"""Tasks: a `Task` is a model together with the data that it learns from.

There are two, `language_model` and `classification`. `train.engine.step` makes
the step of a task and `train.engine.loop` repeats it; neither depends on the
kind of task.

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

from galore_optax import Group
from galore_optax.layerwise.weights import ARRAYS
from galore_optax.paths import paths
from galore_optax.presets.groups import assigned
from galore_optax.quantized.array import is_quantized
from models import encoder, huggingface, lowrank
from models.encoder import EncoderConfig
from models.llama import Layers, LlamaConfig
from train.config import Config, Layerwise
from train.data import labelled
from train.data.batches import batches, shown, validation_batches
from train.data.labelled import LabelledFiles, LabelledTfds
from train.data.tokenizer import AnyTokenizer
from train.engine import mesh as mesh_lib
from train.optimizers import adapter as adapter_lib
from train.tasks import text_metrics as classify

PyTree: TypeAlias = Any
Batch: TypeAlias = dict[str, Any]
Metrics: TypeAlias = dict[str, float]
Loss: TypeAlias = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]
Mask: TypeAlias = Callable[[PyTree], PyTree]

INPUTS = ('inputs', 'targets', 'weights', 'positions', 'segments')
"""The arrays of a batch that a language model reads."""


class Text(NamedTuple):
  """The data and the tokenizer of a run."""

  train: Any
  """The training split; `Documents` of a language model, `Examples` of a
  classifier, or None if nothing is trained."""
  validation: Any
  """The validation split, of the same type."""
  tokenizer: AnyTokenizer
  """The run's tokenizer."""


def everything(params: PyTree) -> PyTree:
  """Returns a mask of True for every weight: the default of `Task.trained`.

  >>> everything({'w': 1})
  {'w': True}
  """
  return jax.tree.map(lambda _: True, params, is_leaf=is_quantized)


def validation_loss(found: Metrics) -> float:
  """Returns the loss, as the score of a checkpoint."""
  return found['loss']


@dataclasses.dataclass(frozen=True)
class Task:
  """A model, its loss and its data; no weight is allocated and no file read."""

  init: Callable[[jax.Array], PyTree]
  """`key -> parameters`, as they are stored between steps."""
  layers: Any
  """The model as three functions on arrays, as `layerwise` reads it."""
  loss: Loss
  """`(parameters, batch) -> (loss, sums)`, on stored parameters. The loss is
  the mean over positions, each multiplied by its entry of batch['weights']. The
  sums are linear in these weights; the log uses their names."""
  batches: Callable[[Text], grain.DatasetIterator]
  """Returns the training batches, without end; their position can be saved."""
  evaluate: Callable[[Text], Callable[[PyTree], Metrics]]
  """Returns a function that computes the validation metrics of parameters."""
  example: Callable[[Text], Any]
  """Returns an example of the data that a rich console can print."""
  unit: str
  """What the weights of a batch count: 'tokens' or 'examples'."""
  score: Callable[[Metrics], float] = validation_loss
  """Returns a number from the validation metrics; the lowest is the best."""
  inputs: Callable[[], Batch] | None = None
  """Returns the shapes of the largest possible batch, which a plan needs."""
  read: Callable[[jax.Array], PyTree] | None = None
  """`key -> parameters`, read from the config's checkpoint. The key initializes
  weights that the checkpoint lacks."""
  large: tuple[str, ...] = ()
  """Paths of the weights that `Layerwise.slices` divides."""
  trained: Mask = everything
  """Returns a tree of bools: whether each parameter is trained. All others stay
  fixed, without gradient or optimizer state."""
  flops: Callable[[Batch], float] | None = None
  """Returns the flops of an update with a batch, as `model_flops` counts
  them."""


def task_of(config: Config) -> Task:
  """Builds the task of a config, whose model decides which task it is.

  Raises:
    ValueError: the corpus, or its metric, does not fit the model.
  """
  encodes = isinstance(config.model, EncoderConfig)
  if encodes != isinstance(config.corpus, LabelledFiles | LabelledTfds):
    expected = 'LabelledFiles or LabelledTfds' if encodes else 'one of texts'
    raise ValueError(
      f'the corpus of a {type(config.model).__name__} must be {expected}, got '
      f'{type(config.corpus).__name__}; --corpus takes another'
    )
  task = classification(config) if encodes else language_model(config)
  return dataclasses.replace(task, flops=counted(config, task))


def counted(config: Config, task: Task) -> Callable[[Batch], float]:
  """Returns a function that counts the flops of an update with a batch."""
  # Compute shapes at the first batch: plans and evaluations never count flops.
  shapes = functools.cache(lambda: array_shapes(config, task))
  return lambda batch: model_flops(
    config.resolved_model,
    shapes(),
    task.trained(shapes()),
    *batch['inputs'].shape,
  )


def model_flops(
  model: LlamaConfig | EncoderConfig,
  params: PyTree,
  trained: PyTree,
  rows: int,
  length: int,
) -> float:
  """Returns the flops that a model needs for an update.

  A multiply-add counts as two flops. A token is multiplied with N weights in
  the forward pass (2 N flops). In the backward pass its gradient is multiplied
  with these weights (2 N), and with its activations for the N_t trained weights
  (2 N_t). If all weights are trained, these are 6 N flops. Attention over a row
  of T tokens adds 12 L T D for each token, where D is the width of all heads:
  T^2 products in the forward pass and twice as many in the backward pass,
  masked ones included. Recomputation that saves memory does not count, nor does
  the optimizer.

  Args:
    model: the config of the model.
    params: its parameters or their shapes, with low-rank factors.
    trained: a tree of bools: whether each parameter is trained.
    rows: number of rows in the batch.
    length: T, the number of tokens in a row.

  References:
    Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022.
  """
  flat = zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
  is_llama = isinstance(model, LlamaConfig)
  rate = 0
  for path, (w, moves) in zip(paths(params), flat, strict=True):
    head = path == 'lm_head/kernel'
    tied = path == 'embed/embedding' and is_llama and model.tied
    # Layers are stacked, so their matrices have three axes. Embeddings are
    # looked up, not multiplied, unless they are also the output head.
    if head or tied or w.ndim > 2:
      rate += (6 if moves else 4) * w.size
  width = model.width
  seen = length
  if is_llama:
    width = model.num_heads * model.head_width
    seen = min(length, model.window or length)
  rate += 12 * model.num_layers * seen * width
  return float(rows * length * rate)


def language_model(config: Config) -> Task:
  """Returns the task of pre-training or fine-tuning a language model."""
  layers = layers_of(config)
  loss = stored_layers(config)
  return Task(
    init=lambda key: as_stored(config, layers.init(key), key),
    read=lambda key: as_stored(config, read_params(config, key), key),
    layers=layers,
    loss=loss,
    batches=lambda text: batches(
      text.train,
      text.tokenizer,
      batch_size=config.batch_size,
      sequence_length=config.sequence_length,
      seed=config.seed,
      window=config.window,
      put=mesh_lib.deal(config.mesh),
      log=mesh_lib.announce,
    ),
    evaluate=lambda text: functools.partial(
      perplexity,
      mesh_lib.measure(loss, config.mesh),
      batches=held_out(config, text),
    ),
    example=lambda text: shown(
      text.train,
      text.tokenizer,
      sequence_length=config.sequence_length,
      seed=config.seed,
    ),
    unit='tokens',
    inputs=lambda: text_shapes(config),
    # A tied model has only the first of them.
    large=('embed/embedding', 'lm_head/kernel'),
    trained=functools.partial(trained, config),
  )


def classification(config: Config) -> Task:
  """Returns the task of fine-tuning an encoder on labelled texts."""
  model = encoder_config(config)
  assert isinstance(config.corpus, LabelledFiles | LabelledTfds)
  metric = config.corpus.metric
  check_metric(metric, model.num_labels)
  if config.checkpoint is None and config.tokenizer is None:
    raise ValueError(
      'a classifier needs a tokenizer.json: name a directory that has one with '
      '--checkpoint, or with --tokenizer to start from random weights'
    )
  layers = layers_of(config)
  loss = stored_layers(config)
  labels = labelled.Labels(model.num_labels, model.labels)

  def evaluate(text: Text) -> Callable[[PyTree], Metrics]:
    return functools.partial(
      classify.measure,
      mesh_lib.measure(loss.logits, config.mesh),
      batches=labelled.validation_batches(
        text.validation,
        text.tokenizer,
        labels,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        num_batches=config.eval_batches,
      ),
      num_labels=model.num_labels,
    )

  return Task(
    init=lambda key: as_stored(config, layers.init(key), key),
    read=lambda key: as_stored(config, read_params(config, key), key),
    layers=layers,
    loss=loss,
    batches=lambda text: labelled.batches(
      text.train,
      text.tokenizer,
      labels,
      batch_size=config.batch_size,
      sequence_length=config.sequence_length,
      seed=config.seed,
      noise=model.dropout > 0,
      put=mesh_lib.deal(config.mesh),
    ),
    evaluate=evaluate,
    example=lambda text: labelled.shown(
      text.train,
      text.tokenizer,
      labels,
      sequence_length=config.sequence_length,
      seed=config.seed,
    ),
    unit='examples',
    inputs=lambda: labelled_shapes(config),
    score=lambda found: -found[metric],
    large=('embed/tokens/embedding',),
    trained=functools.partial(trained, config),
  )


def text_shapes(config: Config) -> Batch:
  """Returns the shapes of a language model's batch."""
  shape = config.batch_size, config.sequence_length
  tokens = dict.fromkeys(INPUTS, jax.ShapeDtypeStruct(shape, np.int32))
  return tokens | {'weights': jax.ShapeDtypeStruct(shape, np.float32)}


def labelled_shapes(config: Config) -> Batch:
  """Returns the shapes of a classifier's largest batch.

  A row has at most as many tokens as the model has positions.
  """
  model = encoder_config(config)
  rows = config.batch_size
  length = min(config.sequence_length, model.max_length)
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


def check_metric(metric: str, num_labels: int) -> None:
  """Raises ValueError unless a metric fits the number of labels.

  'pearson' and 'spearman' need a number to predict, all others need labels.
  """
  numbers = metric in ('pearson', 'spearman')
  if numbers != (num_labels == 1):
    raise ValueError(
      f'corpus.metric must be {"one" if num_labels == 1 else "none"} of '
      f'pearson and spearman for model.num_labels={num_labels}, got {metric}'
    )


def trained(config: Config, params: PyTree) -> PyTree:
  """Returns a tree of bools: which parameters of a config are trained.

  Raises:
    ValueError: a group matches no parameter that the adapter leaves trained,
      two groups match the same parameter, or the groups freeze all parameters.
      With layer-wise updates, also if the groups freeze all layers.
  """
  chosen = by_adapter(config, params)
  if not config.groups:
    return chosen
  marks, treedef = jax.tree.flatten(chosen)
  # A pattern must match a trained leaf, so hide the others from `assigned`.
  moving = treedef.unflatten([mark or None for mark in marks])
  groups = (*config.groups, Group('', 1.0))
  indices = iter(assigned(config.groups, moving))
  left = [mark and not groups[next(indices)].frozen for mark in marks]
  if not any(left):
    raise ValueError(
      'groups freeze every trained parameter: give one of them a rate above 0'
    )
  found = treedef.unflatten(left)
  if isinstance(config.update, Layerwise) and not any(
    jax.tree.leaves(found['blocks'])
  ):
    raise ValueError(
      'groups freeze every layer, and update Layerwise visits one layer after '
      'another: take --update WholeTree'
    )
  return found


def by_adapter(config: Config, params: PyTree) -> PyTree:
  """Returns a tree of bools: which parameters an adapter leaves trained."""
  adapter = config.adapter
  if adapter is None or (isinstance(adapter, lowrank.Lora) and adapter.lomo):
    return everything(params)
  chosen = lowrank.optimized(params, adapter)
  if 'head' in chosen:
    # The head starts from random weights; frozen, it would stay random.
    chosen |= {'head': everything(params['head'])}
  return chosen


def layers_of(config: Config) -> Layers | encoder.Layers:
  """Returns a config's model, with its adapter; it reads weights as arrays."""
  adapter = config.adapter
  hook = None if adapter is None else lowrank.hook(adapter)
  if config.mesh.size > 1:
    hook = mesh_lib.keeping_rows(hook)
  model = config.resolved_model
  if isinstance(model, EncoderConfig):
    return encoder.Layers(model, intercept=hook)
  return Layers(model, intercept=hook)


def encoder_config(config: Config) -> EncoderConfig:
  """Returns the model of a classifier's config."""
  assert isinstance(config.model, EncoderConfig)
  return config.model


def array_shapes(config: Config, task: Task) -> PyTree:
  """Returns the shapes of a task's parameters as arrays, not quantized."""
  read = config.weights().read

  def arrays(key: jax.Array) -> PyTree:
    return jax.tree.map(read, task.init(key), is_leaf=is_quantized)

  return jax.eval_shape(arrays, jax.random.key(0))


def stored_layers(config: Config) -> Layers | encoder.Layers:
  """Returns a config's model; it reads weights as they are stored.

  It converts the weights of one layer at a time, so that no more than one
  layer's weights exist as arrays.
  """
  layers = layers_of(config)
  weights = config.weights()
  if weights is ARRAYS:
    return layers

  def read(layer_params: PyTree) -> PyTree:
    return jax.tree.map(weights.read, layer_params, is_leaf=is_quantized)

  return dataclasses.replace(layers, read=read)


def as_stored(config: Config, params: PyTree, key: jax.Array) -> PyTree:
  """Converts initial weights to the stored form, and adds the adapter."""
  adapter = config.adapter
  if adapter is not None:
    params = lowrank.adapt(params, adapter, adapter_lib.first_key(key))
  store = config.weights().store

  def stored(path: tuple[Any, ...], w: jax.Array) -> PyTree:
    is_factor = path[-1].key in lowrank.FACTORS
    return store(w) if w.ndim > 2 and not is_factor else w

  blocks = jax.tree_util.tree_map_with_path(stored, params['blocks'])
  return params | {'blocks': blocks}


def read_params(config: Config, key: jax.Array) -> PyTree:
  """Reads the weights of a config's checkpoint, in the config's data type.

  If the checkpoint lacks a head, the key initializes one.
  """
  model = config.resolved_model
  given: dict[str, Any] = {'param_dtype': model.param_dtype}
  if isinstance(model, EncoderConfig):
    given |= {'num_labels': model.num_labels, 'labels': model.labels}
  assert config.checkpoint is not None
  plain = layers_of(dataclasses.replace(config, adapter=None))
  places = mesh_lib.of_params(
    jax.eval_shape(plain.init, key), mesh_lib.devices(config.mesh)
  )
  _, params = huggingface.load(
    config.checkpoint, key=key, shardings=places, **given
  )
  return params


def held_out(config: Config, text: Text) -> grain.IterDataset[Batch]:
  """Returns validation batches, each the size of one part of a training batch.

  The number of parts does not change the rows.
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
  """Computes the loss, the perplexity per token and the bits per byte.

  Every scored token has the same weight: the sum over all batches is divided
  once, by the number of scored tokens. All batches are queued on the device
  before the first result is read.
  """
  found = []
  num_bytes = 0.0
  for batch in batches:
    _, sums = loss(params, {name: batch[name] for name in INPUTS})
    found.append((sums['nll'], sums['weight']))
    num_bytes += float(np.sum(batch['weights'] * batch['bytes']))
  totals = np.array(jax.device_get(found), np.float64).sum(axis=0)
  nll, weight = totals.tolist()
  mean = nll / weight
  return {
    'loss': mean,
    'perplexity': math.exp(mean) if mean < 700 else math.inf,
    'bits_per_byte': nll / math.log(2) / num_bytes,
  }
