"""Tasks: a `Task` is a model together with the data that it learns from.

The engine and the plans depend only on the class `Task`. `train.tasks` has its
subclasses. The model of a config decides which of them is used.
"""

import abc
import dataclasses
import functools
import pathlib
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import grain
import jax
from rich.console import RenderableType

from galore_optax import Group
from galore_optax.layerwise.weights import ARRAYS
from galore_optax.presets.groups import assigned
from galore_optax.quantized.array import is_quantized
from models import huggingface, lowrank
from models.model import ModelConfig, Read
from train.config import Config, Layerwise
from train.engine import mesh as mesh_lib
from train.optimizers import adapter as adapter_lib
from train.tasks import TASKS

PyTree: TypeAlias = Any
Batch: TypeAlias = dict[str, Any]
Metrics: TypeAlias = dict[str, float]
Loss: TypeAlias = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]
Mask: TypeAlias = Callable[[PyTree], PyTree]


def everything(params: PyTree) -> PyTree:
  """Returns a mask of True for every weight.

  >>> everything({'w': 1})
  {'w': True}
  """
  return jax.tree.map(lambda _: True, params, is_leaf=is_quantized)


@dataclasses.dataclass(frozen=True)
class Data:
  """The opened data of a run. A task may return a subclass with more fields."""

  train: Any
  """The training split; None if nothing is trained."""
  validation: Any
  """The validation split."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
  """A model, its loss and its data.

  The base class derives the model and its parameters from the config. A
  subclass defines the data, the batches, the validation and, if there are any,
  the samples and the other files of a run, such as a tokenizer.

  Creating a task allocates no weight and reads no file.
  """

  config: Config
  """The experiment."""

  unit: ClassVar[str]
  """What the weights of a batch count, in the plural, such as 'tokens'."""
  holds: ClassVar[tuple[str, ...]]
  """What the corpus of a config may hold; see `train.data.corpus.Corpus`."""
  sampler: ClassVar[str | None] = None
  """Module whose function `main(argv)` runs the program `train.sample`; None if
  the model has nothing to sample."""
  loss_label: ClassVar[str] = 'loss'
  """Label of the loss in pictures."""

  def __post_init__(self) -> None:
    """Raises ValueError if the corpus does not fit the model."""
    corpus = self.config.corpus
    if corpus.holds not in self.holds:
      raise ValueError(
        f'the corpus of a {type(self.config.model).__name__} must hold '
        f'{" or ".join(self.holds)}, got {type(corpus).__name__}, which holds '
        f'{corpus.holds}; --corpus takes another'
      )
    model = self.config.resolved_model
    if isinstance(self.config.update, Layerwise) and not model.is_stacked:
      raise ValueError(
        'update Layerwise needs a model whose layers are stacked, got '
        f'{type(model).__name__}: take --update WholeTree'
      )

  @abc.abstractmethod
  def inputs(self) -> Batch:
    """Returns the shapes of the largest possible batch, which a plan needs."""

  @property
  def length(self) -> int | None:
    """Number of tokens in a row of the largest batch; None without tokens."""
    return None

  def describe_batch(self) -> str:
    """Returns the shape of the largest batch as text."""
    return f'{self.config.batch_size} {self.unit}'

  @abc.abstractmethod
  def batches(self, data: Any) -> grain.DatasetIterator:
    """Returns the training batches, without end; the position can be saved.

    A batch is a dict of arrays whose first axis is the rows. Its 'weights' has
    a number for each element of the loss.
    """

  @abc.abstractmethod
  def evaluate(self, data: Any) -> Callable[[PyTree], Metrics]:
    """Returns a function that computes the validation metrics of parameters."""

  def open(self, run: pathlib.Path | None) -> Data:
    """Opens the data, and whatever else belongs to them.

    Args:
      run: directory of an existing run, whose files replace those that the
        config names; None starts a new run.

    Raises:
      ValueError, OSError, ImportError: the data do not exist or do not fit.
    """
    del run
    corpus = self.config.corpus
    return Data(corpus.open('train'), corpus.open('validation'))

  def held_out(self, run: pathlib.Path) -> Data:
    """Opens the validation split, to validate a run's checkpoint."""
    del run
    return Data(None, self.config.corpus.open('validation'))

  def warnings(self, data: Any) -> list[str]:
    """Returns warnings about data that would not be learned as intended."""
    del data
    return []

  def example(self, data: Any) -> RenderableType:
    """Returns an example of the data that a rich console can print."""
    del data
    return ''

  def save(self, data: Any, directory: pathlib.Path) -> None:
    """Writes other files of a run, such as a tokenizer; `open` reads them."""
    del data, directory

  def identity(self, data: Any) -> bytes:
    """Returns bytes that must be the same in all processes of a cluster."""
    del data
    return b''

  def score(self, found: Metrics) -> float:
    """Returns a number from the validation metrics; the lowest is the best."""
    return found['loss']

  def samples(
    self, params: PyTree, data: Any, run: pathlib.Path
  ) -> list[RenderableType]:
    """Writes samples of a trained model into the directory of its run.

    `train.report` shows the pairs of texts in samples.json and the picture
    samples.png.

    Returns:
      Renderables to print. It is empty, and no file is written, if the model
      has no samples.
    """
    del params, data, run
    return []

  def export(self, run: pathlib.Path, directory: pathlib.Path) -> None:
    """Adds files to an export, such as a tokenizer."""
    del run, directory

  # The model. Subclasses need not change any of the following.

  @functools.cached_property
  def layers(self) -> Any:
    """The model as `models.model.Layers`, with its adapter.

    It reads weights as arrays, as a layer-wise update passes them.
    """
    return layers_of(self.config)

  @functools.cached_property
  def stored_layers(self) -> Any:
    """The model, which reads weights as they are stored between steps.

    It converts the weights of one layer at a time, so that no more than one
    layer's weights exist as arrays.
    """
    weights = self.config.weights()
    if weights is ARRAYS:
      return self.layers

    def read(layer_params: PyTree) -> PyTree:
      return jax.tree.map(weights.read, layer_params, is_leaf=is_quantized)

    return layers_of(self.config, read)

  @property
  def loss(self) -> Loss:
    """`(parameters, batch) -> (loss, sums)`, on stored parameters.

    The loss is the mean over the elements of batch['weights'], each multiplied
    by its weight. The sums are linear in these weights; the log uses their
    names.
    """
    return self.stored_layers

  def init(self, key: jax.Array) -> PyTree:
    """Returns initial parameters, as they are stored between steps."""
    return as_stored(self.config, self.layers.init(key), key)

  def read(self, key: jax.Array) -> PyTree:
    """Returns parameters of the config's checkpoint, as they are stored.

    The key initializes weights that the checkpoint lacks.
    """
    return as_stored(self.config, read_params(self.config, key), key)

  def trained(self, params: PyTree) -> PyTree:
    """Returns a tree of bools: whether each parameter is trained.

    All others stay fixed, without gradient or optimizer state.
    """
    return trained(self.config, params)

  @functools.cached_property
  def shapes(self) -> PyTree:
    """Shapes of the parameters as arrays, not quantized."""
    read = self.config.weights().read

    def arrays(key: jax.Array) -> PyTree:
      return jax.tree.map(read, self.init(key), is_leaf=is_quantized)

    return jax.eval_shape(arrays, jax.random.key(0))

  def flops(self, batch: Batch) -> float | None:
    """Returns the flops of an update with a batch, if the model counts them."""
    # Plans and evaluations never count flops, so they never compute the mask.
    return self.config.resolved_model.flops(self.shapes, self._mask, batch)

  @functools.cached_property
  def _mask(self) -> PyTree:
    return self.trained(self.shapes)


def task_of(config: Config) -> Task:
  """Builds the task of a config, which its model names.

  Raises:
    ValueError: the corpus, or its metric, does not fit the model.
  """
  return task_class(config.resolved_model)(config)


def task_class(model: ModelConfig) -> type[Task]:
  """Returns the task that a model learns.

  Raises:
    ValueError: `model.task` names no task.
  """
  if model.task in TASKS:
    return pkgutil.resolve_name(TASKS[model.task])
  try:
    return pkgutil.resolve_name(model.task)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f'{type(model).__name__}.task must be one of {", ".join(TASKS)}, or '
      f"'module:class' of a Task, got {model.task!r} ({error})"
    ) from error


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


def layers_of(config: Config, read: Read | None = None) -> Any:
  """Returns a config's model, with its adapter.

  Args:
    config: the experiment.
    read: converts stored weights of one layer; None reads weights as arrays.
  """
  adapter = config.adapter
  hook = None if adapter is None else lowrank.hook(adapter)
  if config.mesh.size > 1:
    hook = mesh_lib.keeping_rows(hook)
  return config.resolved_model.layers(read=read, intercept=hook)


def as_stored(config: Config, params: PyTree, key: jax.Array) -> PyTree:
  """Converts initial weights to the stored form, and adds the adapter."""
  adapter = config.adapter
  if adapter is not None:
    params = lowrank.adapt(params, adapter, adapter_lib.first_key(key))
  if 'blocks' not in params:
    return params
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
  assert config.checkpoint is not None
  plain = layers_of(dataclasses.replace(config, adapter=None))
  places = mesh_lib.of_params(
    jax.eval_shape(plain.init, key), mesh_lib.devices(config.mesh)
  )
  _, params = huggingface.load(
    config.checkpoint,
    config=config.resolved_model,
    key=key,
    shardings=places,
  )
  return params
