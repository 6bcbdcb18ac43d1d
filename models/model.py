"""The interface by which programs train a model.

A model is a frozen dataclass that subclasses `ModelConfig`, such as
`models.llama.LlamaConfig`. Its method `layers` returns the model as pure
functions of a tree of parameters.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias

import jax

from models import attention
from models.architecture import Architecture
from models.attention import Call, Kind

PyTree: TypeAlias = Any

Dtype: TypeAlias = Literal['float32', 'bfloat16']
"""Data type of activations or parameters."""

Params: TypeAlias = Mapping[str, Any]
"""Nested dict of parameters."""

Batch: TypeAlias = Mapping[str, Any]
"""Arrays of a batch by their names, or their shapes. The first axis of each
array is the rows. 'weights' has one number for each element of the loss."""

Activations: TypeAlias = Any
"""Input of a layer, and output of the layer before."""

Sums: TypeAlias = dict[str, jax.Array]
"""Sums over a batch that are linear in its weights, by the names in the log."""

Read: TypeAlias = Callable[[Any], Any]
"""Converts the stored parameters of one layer to arrays."""

Intercept: TypeAlias = Callable[..., Any]
"""A linen interceptor, as `flax.linen.intercept_methods` takes it."""


class Layers(Protocol):
  """A model as pure functions of its parameters."""

  def init(self, key: jax.Array) -> Params:
    """Returns random initial parameters."""
    ...

  def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss and its sums.

    The loss is sum(weights * cost) / weights.size. One of the sums is 'weight',
    the sum of the weights.
    """
    ...


class StackedLayers(Layers, Protocol):
  """A model whose layers are stacked, as a layer-wise update needs it.

  params['blocks'] has the parameters of all layers, with the layers as the
  first axis.
  """

  def embed(self, params: Params, batch: Batch) -> Activations:
    """Returns the input of the first layer."""
    ...

  def block(self, layer_params: Params, x: Activations) -> Activations:
    """Applies one layer to the output of the layer before."""
    ...

  def loss(
    self, params: Params, x: Activations, batch: Batch
  ) -> tuple[jax.Array, Sums]:
    """Returns the loss and its sums from the output of the last layer."""
    ...


class ModelConfig(abc.ABC):
  """The configuration of a model; subclasses are frozen dataclasses."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
  """Declares to type checkers that a configuration is a dataclass."""
  task: ClassVar[str]
  """The task that the model learns: a key of `train.tasks.TASKS`, such as
  'language', or the name 'module:class' of a subclass of `Task`."""
  is_stacked: ClassVar[bool] = False
  """Whether `layers` returns `StackedLayers`."""
  large: ClassVar[tuple[str, ...]] = ()
  """Paths of large weights that are not in a layer, such as an embedding. A
  layer-wise update may divide them into slices."""
  has_peft_names: ClassVar[bool] = False
  """Whether low-rank factors of the model can be written in PEFT's format."""
  dtype: Dtype
  """Type of the activations and of the matmuls."""
  param_dtype: Dtype
  """Type of the parameters and of their gradients."""

  @abc.abstractmethod
  def layers(
    self, *, read: Read | None = None, intercept: Intercept | None = None
  ) -> Any:
    """Returns the model as pure functions: `Layers`, or `StackedLayers`.

    Args:
      read: converts the stored parameters of one layer to arrays. Functions
        that run the whole model call it once per layer; `block` does not call
        it. A model that is not stacked ignores it.
      intercept: a linen interceptor under which everything is computed.
    """

  @classmethod
  def architectures(cls) -> Mapping[str, Architecture]:
    """Returns the formats of the model's checkpoints, by model_type.

    The model_type is the name in config.json of transformers. If a model fits
    several of them, it is written as the first one that it fits. To be read,
    the model must also be in `models.huggingface_config.MODELS`.
    """
    return {}

  def flops(
    self, params: PyTree, trained: PyTree, batch: Batch
  ) -> float | None:
    """Returns the flops that the model needs for an update, if it counts them.

    Recomputation that saves memory does not count, nor does the optimizer.

    Args:
      params: the parameters or their shapes, with low-rank factors.
      trained: a tree of bools: whether each parameter is trained.
      batch: the batch or its shapes.
    """
    del params, trained, batch

  def kept_bytes(self, batch: Batch) -> int:
    """Returns the bytes of the layers' inputs that the backward pass needs.

    Args:
      batch: the batch, or the shapes, that one backward pass computes.
    """
    del batch
    return 0

  def on_gpu(self, batch: Batch) -> Self:
    """Returns the model with implementations chosen as on an NVIDIA GPU.

    Args:
      batch: the shapes of a batch.
    """
    del batch
    return self

  @property
  def attention_kind(self) -> str:
    """Implementation of attention, or 'none'."""
    return 'none'

  def tensor_sizes(self) -> dict[str, int]:
    """Returns the fields that the mesh axis 'tensor' must divide, by name."""
    return {}


class AttentionConfig(ModelConfig):
  """The configuration of a model with attention."""

  attention: Kind
  """Implementation of attention: 'cudnn' is cuDNN's kernel, 'blockwise' is
  plain JAX in blocks of time steps. 'auto' is 'cudnn' on a GPU if cuDNN has a
  kernel for the arrays, else 'blockwise'."""

  @abc.abstractmethod
  def attention_calls(self, batch: Batch) -> Sequence[Call]:
    """Returns the sizes of each attention in the model.

    Args:
      batch: the batch or its shapes.
    """

  def on_gpu(self, batch: Batch) -> Self:
    """Returns the model with attention 'auto' resolved as on an NVIDIA GPU.

    The result is 'cudnn' only if cuDNN has a kernel for each attention of the
    model.

    Args:
      batch: the shapes of a batch.
    """
    calls = dict.fromkeys(self.attention_calls(batch))
    if self.attention != 'auto' or not calls:
      return self
    dtype = self.dtype
    refused = any(
      attention.refusal(
        jax.ShapeDtypeStruct((1, x.length, x.num_heads, x.head_width), dtype),
        jax.ShapeDtypeStruct((1, x.length, x.kv_heads, x.head_width), dtype),
        x.window,
        x.causal,
      )
      for x in calls
    )
    kind = 'blockwise' if refused else 'cudnn'
    return dataclasses.replace(self, attention=kind)

  @property
  def attention_kind(self) -> str:
    """Implementation of attention."""
    return self.attention
