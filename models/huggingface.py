"""Reads and writes checkpoint directories of Hugging Face's transformers.

Such a directory has config.json, weights in safetensors files, and the files of
a tokenizer. It stores one [out, in] matrix per layer, while the models of this
package have [in, out] matrices stacked over layers.
"""

import codecs
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from models import huggingface_config
from models.architecture import Architecture, Fields
from models.huggingface_config import architecture_of
from models.model import ModelConfig

PyTree: TypeAlias = Any

Flat: TypeAlias = dict[str, Any]
"""Leaves of a nested dict by their paths, such as 'blocks/mlp/up/kernel'."""

Part: TypeAlias = tuple[str, int | None]
"""Path of a parameter, and a layer's index if it is stacked over layers."""


class Tensor(Protocol):
  """A tensor of a checkpoint, such as a NumPy array, whose rows can be read."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor."""
    ...

  @property
  def dtype(self) -> Any:
    """Type of the tensor; `str` of it is NumPy's name."""
    ...

  def __getitem__(self, rows: slice, /) -> np.ndarray:
    """Returns some rows."""
    ...


_OTHERS = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
  'preprocessor_config.json',
)
"""Files that are copied with a checkpoint: those of the tokenizer, the
generation config and the preprocessing of images."""

_INDEX = 'model.safetensors.index.json'

_DTYPES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
}
"""Types of weights that can be read: safetensors' name to NumPy's name."""

_REMEDY = 'check num_hidden_layers and tie_word_embeddings in config.json'

_PIECE = 2**26
"""Maximum number of array entries that are read at once, except that at least
one row is read."""


def read_config(directory: str | pathlib.Path) -> ModelConfig:
  """Returns the model that a checkpoint's config.json describes.

  Activations and parameters have the type that the config names. float16 is
  replaced by float32, because the models do not support float16.

  Args:
    directory: Directory of the checkpoint.

  Raises:
    FileNotFoundError: config.json is missing.
    ValueError: The config requires a feature that is not implemented, or a
      field is invalid. The message names the field.
  """
  file = pathlib.Path(directory) / 'config.json'
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is missing: a checkpoint is a directory with config.json and '
      f'*.safetensors{_other_kind(file.parent)}'
    )
  config = _read(file, huggingface_config.parse)
  companion = architecture_of(config).companion
  if companion is None or not (file.parent / companion.name).is_file():
    return config
  read = functools.partial(companion.read, config)
  return _read(file.parent / companion.name, read)


def _read(
  file: pathlib.Path, read: Callable[[Fields], ModelConfig]
) -> ModelConfig:
  """Returns `read` of the fields in a file, which errors name."""
  fields = read_json(file)
  try:
    return read(fields)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f'{file}: a field has another form than transformers writes '
      f'({type(error).__name__}: {error}): fetch it again'
    ) from error


def load(
  directory: str | pathlib.Path,
  *,
  config: ModelConfig | None = None,
  shardings: PyTree = None,
  key: jax.Array | None = None,
  **overrides: Any,
) -> tuple[ModelConfig, PyTree]:
  """Reads a model from a checkpoint.

  Tensors are read and copied to their devices in pieces, so that host memory
  never holds a large part of the checkpoint.

  Args:
    directory: Directory with config.json, and with model.safetensors or an
      index of several such files.
    config: Configuration of the model, if it is not the one that config.json
      describes, for example because it has another number of labels.
    shardings: Shardings of the parameters: one for all of them or a tree, as
      for `jax.jit(out_shardings=)`, on a mesh whose axes are Auto. None is the
      default device.
    key: Random key that initializes the head of a classifier if the checkpoint
      has no head.
    **overrides: Fields of the configuration to replace, such as param_dtype.

  Returns:
    The configuration, and the parameters of the model as `jax.Array`s.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: The config requires a feature that is not implemented, or the
      tensors do not fit the config. The message names the field or the tensor.
  """
  if config is None:
    config = read_config(directory)
  config = dataclasses.replace(config, **overrides)
  tensors = _tensors(directory)
  try:
    return config, params_of(tensors, config, shardings, key)
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from error


def save(
  directory: str | pathlib.Path,
  config: ModelConfig,
  params: PyTree,
  *,
  source: str | pathlib.Path | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a checkpoint that transformers can load.

  Args:
    directory: Directory to write. It is created if necessary, and must not
      contain a checkpoint.
    config: Configuration of the model.
    params: Parameters of the model, on any devices.
    source: Directory of another checkpoint, or None. Its tokenizer's files are
      copied. Fields of its config.json that do not change the model, such as
      the ids of special tokens, are copied too.
    max_shard_bytes: Maximum size of the tensors in one file, all of which are
      in host memory while the file is written. A larger tensor gets its own
      file.

  Raises:
    FileExistsError: The directory contains a checkpoint.
    ValueError: The parameters do not fit the config, or transformers has no
      architecture for the model.
  """
  directory = pathlib.Path(directory)
  flat = _flatten(params)
  _check_params(flat, config)
  architecture = architecture_of(config)
  fields = huggingface_config.fields_of(config)
  fields |= _sourced(source, architecture)
  check_new(directory)
  directory.mkdir(parents=True, exist_ok=True)
  _write_shards(directory, flat, architecture, max_shard_bytes)
  if source is not None:
    copy(source, directory)
  _write_json(directory / 'config.json', fields)
  if (companion := architecture.companion) is not None:
    file = directory / companion.name
    before = read_json(file) if file.is_file() else {}
    _write_json(file, companion.write(config, before))


def check_new(directory: str | pathlib.Path) -> None:
  """Raises FileExistsError if a directory contains a checkpoint."""
  for pattern in ('config.json', '*.safetensors', '*.safetensors.index.json'):
    for file in pathlib.Path(directory).glob(pattern):
      raise FileExistsError(f'{file} exists; name another directory')


def copy(source: str | pathlib.Path, directory: str | pathlib.Path) -> None:
  """Copies config.json and the tokenizer's files, if they exist.

  A byte-order mark at the start of a text file is removed, because transformers
  rejects it.

  Args:
    source: Directory to copy from.
    directory: Directory to copy to, which is created if necessary.
  """
  pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
  for name in ('config.json', *_OTHERS):
    file = pathlib.Path(source) / name
    if not file.is_file():
      continue
    content = file.read_bytes()
    if file.suffix != '.model':
      content = content.removeprefix(codecs.BOM_UTF8)
    (pathlib.Path(directory) / name).write_bytes(content)


def params_of(
  tensors: Mapping[str, Tensor],
  config: ModelConfig,
  shardings: PyTree = None,
  key: jax.Array | None = None,
  *,
  remedy: str = _REMEDY,
) -> PyTree:
  """Converts a checkpoint's tensors to parameters of a model.

  Args:
    tensors: Tensors by their names in the checkpoint. Names that match the
      architecture's `ignored` are skipped. Any other name that is not part of
      the model raises an error.
    config: Configuration that the tensors must fit.
    shardings: As in `load`.
    key: As in `load`.
    remedy: Advice for the error message about missing or unexpected tensors.

  Returns:
    Nested dict of `jax.Array`s of type `config.param_dtype`.

  Raises:
    ValueError: The tensors do not fit the config. The message names a tensor.
  """
  architecture = architecture_of(config)
  init, shapes = config.layers().init, _shapes(config)
  places: Flat = dict.fromkeys(_flatten(shapes))
  if shardings is not None:
    places = _flatten(jax.tree.broadcast(shardings, shapes))
  shapes = _flatten(shapes)
  names = {path: _names(architecture, path, x) for path, x in shapes.items()}
  expected = {name for some in names.values() for name in some}
  _check_head(tensors, architecture, shapes)
  tensors = _named(tensors, architecture, expected)
  fresh = _fresh(tensors, names, architecture)
  names = {path: some for path, some in names.items() if path not in fresh}
  needed = {name for some in names.values() for name in some}
  _check_names(tensors, needed, remedy)
  for path, some in names.items():
    for name in some:
      shape = _checkpoint_shape(architecture, path, shapes[path].shape)
      _check_tensor(name, tensors[name], shape)
  if fresh and key is None:
    raise ValueError(
      f'the checkpoint has no {", ".join(sorted(fresh))}: give a key to draw '
      'them, or a checkpoint with a head'
    )

  def initial(key: jax.Array, path: str) -> jax.Array:
    return _flatten(init(key))[path]

  params = {}
  for path, leaf in shapes.items():
    if path in fresh:
      draw = functools.partial(initial, path=path)
      params[path] = jax.jit(draw, out_shardings=places[path])(key)
    else:
      stored = {name: tensors[name] for name in names[path]}
      num_leading = architecture.leading.get(path, 0)
      params[path] = _parameter(path, leaf, stored, places[path], num_leading)
  return flax.traverse_util.unflatten_dict(params, sep='/')


def tensors_of(params: PyTree, config: ModelConfig) -> dict[str, np.ndarray]:
  """Converts parameters to a checkpoint's tensors, the inverse of `params_of`.

  Args:
    params: Parameters of the model, on any device.
    config: Configuration of the model.

  Returns:
    Dict from checkpoint name to NumPy array, without `lm_head.weight` if the
    model is tied.
  """
  return _tensors_of(params, architecture_of(config))


def named_tensors(params: PyTree, kind: str) -> dict[str, np.ndarray]:
  """Converts some parameters to tensors with the names of an architecture.

  Args:
    params: Parameters, or a part of their tree, on any device.
    kind: The model_type whose names the tensors have.

  Returns:
    Dict from checkpoint name to NumPy array.
  """
  return _tensors_of(params, huggingface_config.ARCHITECTURES[kind])


def _tensors_of(
  params: PyTree, architecture: Architecture
) -> dict[str, np.ndarray]:
  flat = _flatten(params)
  parts = _parts(flat, architecture)
  return {
    name: _tensor(flat, part, architecture) for name, part in parts.items()
  }


@functools.lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> PyTree:
  """Returns the cached shapes of the parameters; do not change the dict."""
  return jax.eval_shape(config.layers().init, jax.random.key(0))


def _named(
  tensors: Mapping[str, Tensor], architecture: Architecture, expected: set[str]
) -> dict[str, Tensor]:
  """Returns tensors by the names of a model with a head, without ignored ones.

  Names of other versions of transformers are replaced. The architecture's
  prefix is added to the names of a checkpoint that was saved without a head.
  """
  named = {}
  for name, tensor in tensors.items():
    for before, now in architecture.renamed.items():
      name = re.sub(before, now, name)
    if architecture.prefix + name in expected:
      name = architecture.prefix + name
    if name in expected or not re.fullmatch(architecture.ignored, name):
      named[name] = tensor
  return named


def _fresh(
  tensors: Mapping[str, Tensor],
  names: Mapping[str, list[str]],
  architecture: Architecture,
) -> set[str]:
  """Returns the paths of the head's parameters that must be initialized.

  These are the parameters of modules of which the checkpoint has no tensor. If
  it has only some tensors of a module, a later check raises an error.
  """
  head, modules = architecture.head, {}
  for path in names:
    if head and path.startswith(head):
      modules.setdefault(path.rpartition('/')[0], []).append(path)
  return {
    path
    for paths in modules.values()
    for path in paths
    if not any(name in tensors for p in paths for name in names[p])
  }


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a safetensors file, whose rows are read on demand."""

  file: pathlib.Path
  """The file."""
  name: str
  """Name of the tensor in the file."""
  shape: tuple[int, ...]
  """Shape of the tensor."""
  dtype: str
  """NumPy's name of the type, or safetensors' name if it is not supported."""

  def __getitem__(self, rows: slice) -> np.ndarray:
    from safetensors import safe_open

    # The file is opened for each piece. A file that stays mapped would keep all
    # pages that were read in memory.
    with safe_open(self.file, 'np') as file:
      start, stop, _ = rows.indices(self.shape[0])
      return file.get_slice(self.name)[start:stop]


def _tensors(directory: str | pathlib.Path) -> dict[str, Tensor]:
  """Returns all tensors of a checkpoint by name, without reading their data."""
  tensors = {}
  for path, expected in _files(pathlib.Path(directory)).items():
    if not path.is_file():
      raise FileNotFoundError(
        f'{path}, which the index names, is missing: fetch it'
      )
    found = _stored(path)
    if missing := sorted(expected - found.keys()):
      raise ValueError(
        f'{path} must have the tensors that the index names, got none of the '
        f'name {missing[0]}: fetch both again'
      )
    tensors |= found
  return tensors


def _stored(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of one file by name, without reading their data."""
  from safetensors import SafetensorError, safe_open

  found = {}
  try:
    with safe_open(path, 'np') as file:
      for name in file.keys():
        rows = file.get_slice(name)
        shape, dtype = tuple(rows.get_shape()), str(rows.get_dtype())
        found[name] = _Stored(path, name, shape, _DTYPES.get(dtype, dtype))
  except SafetensorError as error:
    with open(path, 'rb') as file:
      pointer = file.read(30).startswith(b'version https://git-lfs')
    remedy = 'it is a pointer: git lfs pull' if pointer else 'fetch it again'
    raise ValueError(
      f'{path} must be a whole safetensors file ({error}): {remedy}'
    ) from error
  return found


def _files(directory: pathlib.Path) -> dict[pathlib.Path, set[str]]:
  """Returns a checkpoint's files, each with the tensors that its index lists.

  Without an index, the set of tensors is empty. Other files, such as
  consolidated*, are ignored.
  """
  whole, index = directory / 'model.safetensors', directory / _INDEX
  if whole.is_file():
    return {whole: set()}
  if not index.is_file():
    raise FileNotFoundError(
      f'{directory} must have {whole.name} or {_INDEX}{_other_kind(directory)}'
    )
  placed = read_json(index).get('weight_map')
  if not isinstance(placed, dict) or not placed:
    raise ValueError(
      f'{index} must have a weight_map, from tensors to files: fetch it again'
    )
  found = {}
  for tensor, name in placed.items():
    # Only the last component of the path is used, so that an index cannot refer
    # to files in other directories.
    file = directory / pathlib.PurePath(name).name
    found.setdefault(file, set()).add(tensor)
  return dict(sorted(found.items()))


def _other_kind(directory: pathlib.Path) -> str:
  """Returns advice for a directory with weights in another format, or ''."""
  if any(directory.glob('adapter_*')):
    return '; an adapter is no model: merge it into its own first'
  if file := next(directory.glob('*.gguf'), None):
    return f'; to convert a GGUF file: python -m models.gguf {file} NEW'
  if not any(directory.glob('*.bin')):
    return ''
  # These files are not read, because a pickle can execute any code.
  return (
    '; *.bin is not read. To convert it, if you trust it: python -c "from '
    'transformers import AutoModelForCausalLM as M; M.from_pretrained('
    f"'{directory}', torch_dtype='auto').save_pretrained('NEW')\""
  )


def _parameter(
  path: str,
  leaf: jax.ShapeDtypeStruct,
  tensors: Mapping[str, Tensor],
  sharding: Any,
  num_leading: int,
) -> jax.Array:
  """Copies a parameter to its devices, one piece of a tensor at a time."""
  is_stack = path.startswith('blocks/')
  put = _put(_is_table(path), is_stack, num_leading, sharding)
  whole = _zeros(leaf.shape, leaf.dtype, sharding)()
  for layer, (name, tensor) in enumerate(tensors.items()):
    rows = max(1, _PIECE // math.prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], rows):
      piece = tensor[start : start + rows]
      if piece.dtype == np.float16:
        # XLA cannot convert float16 on a CPU without F16C instructions.
        piece = piece.astype(np.float32)
      whole, finite = put(whole, piece, layer, start)
      # Without this, the next pieces would be read while this piece is still
      # in host memory.
      jax.block_until_ready(whole)
      if not finite:
        raise ValueError(
          f'{name} must be finite, got {piece[~np.isfinite(piece)][0]} among '
          'its numbers: the checkpoint is broken, take another one'
        )
  return whole


# The programs are cached, so that parameters of equal shapes and shardings are
# compiled once.
@functools.cache
def _zeros(
  shape: tuple[int, ...], dtype: Any, sharding: Any
) -> Callable[[], jax.Array]:
  """Returns a compiled function that creates a parameter of zeros."""
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _put(
  is_table: bool, is_stack: bool, num_leading: int, sharding: Any
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns a compiled function that writes rows of a tensor to a parameter.

  The function returns the parameter and whether all written numbers are finite.
  It donates the old parameter.

  Args:
    is_table: Whether the parameter has the tensor's layout. Otherwise, the axes
      are those of `_from_checkpoint`.
    is_stack: Whether the parameter is stacked over layers.
    num_leading: Number of axes of size 1 that the tensor has in front.
    sharding: Sharding of the parameter, or None.
  """
  outputs = sharding, None

  @functools.partial(jax.jit, out_shardings=outputs, donate_argnums=0)
  def put(
    whole: jax.Array, rows: jax.Array, layer: jax.Array, start: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    piece = rows.reshape(rows.shape[num_leading:]).astype(whole.dtype)
    if not is_table:
      piece = piece.transpose(_from_checkpoint(piece.ndim))
    at: list[int | jax.Array] = [0] * piece.ndim
    at[0 if is_table else -1] = start
    if is_stack:
      piece = piece[None]
      at = [layer, *at]
    whole = jax.lax.dynamic_update_slice(whole, piece, at)
    return whole, jnp.all(jnp.isfinite(rows))

  return put


def _write_shards(
  directory: pathlib.Path,
  flat: Flat,
  architecture: Architecture,
  max_bytes: int,
) -> None:
  """Writes parameters to one or more files of at most `max_bytes`.

  Several files get an index.
  """
  from safetensors import numpy as safetensors

  shards: list[dict[str, Part]] = [{}]
  sizes = [0]
  for name, part in _parts(flat, architecture).items():
    path, layer = part
    leaf = flat[path]
    size = leaf.nbytes if layer is None else leaf.nbytes // len(leaf)
    if shards[-1] and sizes[-1] + size > max_bytes:
      shards.append({})
      sizes.append(0)
    shards[-1][name] = part
    sizes[-1] += size
  count, weight_map = len(shards), {}
  for number, shard in enumerate(shards, 1):
    file = f'model-{number:05}-of-{count:05}.safetensors'
    file = file if count > 1 else 'model.safetensors'
    tensors = {
      name: _tensor(flat, part, architecture) for name, part in shard.items()
    }
    # transformers rejects a file whose metadata do not name a framework.
    safetensors.save_file(tensors, directory / file, {'format': 'pt'})
    weight_map |= dict.fromkeys(shard, file)
  if count > 1:
    index = {'metadata': {'total_size': sum(sizes)}, 'weight_map': weight_map}
    _write_json(directory / _INDEX, index)


def _parts(flat: Flat, architecture: Architecture) -> dict[str, Part]:
  """Returns the source of each tensor of the checkpoint, by the tensor's name.

  A source is the path of a parameter and a layer's index, or None if the
  parameter is not stacked over layers.
  """
  parts = {}
  for path, leaf in flat.items():
    stacked = path.startswith('blocks/')
    layers = range(len(leaf)) if stacked else [None]
    names = _names(architecture, path, leaf)
    parts |= {name: (path, i) for name, i in zip(names, layers, strict=True)}
  return parts


def _tensor(flat: Flat, part: Part, architecture: Architecture) -> np.ndarray:
  """Returns one tensor of the checkpoint as a NumPy array."""
  path, layer = part
  leaf = flat[path] if layer is None else flat[path][layer]
  if not _is_table(path):
    leaf = leaf.transpose(_to_checkpoint(leaf.ndim))
  leading = (1,) * architecture.leading.get(path, 0)
  return np.ascontiguousarray(leaf).reshape(leading + leaf.shape)


def _checkpoint_shape(
  architecture: Architecture, path: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
  """Returns the shape of a checkpoint's tensor, from our parameter's shape."""
  shape = shape[1:] if path.startswith('blocks/') else shape
  if not _is_table(path):
    shape = tuple(shape[axis] for axis in _to_checkpoint(len(shape)))
  return (1,) * architecture.leading.get(path, 0) + shape


def _to_checkpoint(ndim: int) -> tuple[int, ...]:
  """Returns the order of our axes in a tensor of a checkpoint.

  A kernel [in, out] becomes [out, in], and the kernel of a convolution
  [height, width, in, out] becomes [out, in, height, width].

  >>> _to_checkpoint(1), _to_checkpoint(2), _to_checkpoint(4)
  ((0,), (1, 0), (3, 2, 0, 1))
  """
  axes = range(ndim)
  return (*axes[-2:][::-1], *axes[:-2])


def _from_checkpoint(ndim: int) -> tuple[int, ...]:
  """Returns the inverse of `_to_checkpoint`.

  >>> _from_checkpoint(1), _from_checkpoint(2), _from_checkpoint(4)
  ((0,), (1, 0), (2, 3, 1, 0))
  """
  axes = range(ndim)
  return (*axes[2:], *axes[:2][::-1])


def _is_table(path: str) -> bool:
  """Returns whether a parameter is an embedding, which is not transposed."""
  return path.endswith('/embedding')


def _names(architecture: Architecture, path: str, leaf: Any) -> list[str]:
  """Returns the checkpoint's names of a parameter: one per layer if stacked."""
  name = architecture.names[path]
  if not path.startswith('blocks/'):
    return [name]
  return [name.format(layer) for layer in range(leaf.shape[0])]


def _check_names(
  tensors: Iterable[str], expected: set[str], remedy: str
) -> None:
  missing = sorted(expected - set(tensors))
  surplus = sorted(set(tensors) - expected)
  if missing or surplus:
    raise ValueError(
      'the tensors must be those of the configured model, got missing '
      f'{missing[:4]} and surplus {surplus[:4]} ({len(missing)} and '
      f'{len(surplus)} in all); {remedy}'
    )


def _check_tensor(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
  if tensor.shape != expected:
    raise ValueError(
      f'{name} must have the shape {expected} of the configured model, got '
      f'{tensor.shape}; check the config'
    )
  if str(tensor.dtype) not in _DTYPES.values():
    raise ValueError(
      f'{name} must be of {", ".join(_DTYPES.values())}, got {tensor.dtype}: '
      'quantized weights are not read; start from those before'
    )


def _check_head(
  tensors: Mapping[str, Tensor], architecture: Architecture, shapes: Flat
) -> None:
  """Raises ValueError if a tied model's checkpoint has a different head.

  Such a checkpoint may have a head only if it is equal to the embedding.
  """
  if architecture.tied is None or architecture.tied[0] in shapes:
    return
  head, table = (architecture.names[path] for path in architecture.tied)
  if head not in tensors or table not in tensors:
    return
  one, other = tensors[head], tensors[table]
  same = one.shape == other.shape
  rows = max(1, _PIECE // math.prod(one.shape[1:]))
  for start in range(0, one.shape[0] if same else 0, rows):
    piece = slice(start, start + rows)
    same = same and np.array_equal(one[piece], other[piece])
  if not same:
    raise ValueError(
      f'{head} must be {table} where tie_word_embeddings is true, got '
      'another; set it to false in config.json'
    )


def _check_params(flat: Flat, config: ModelConfig) -> None:
  shapes = _flatten(_shapes(config))
  if odd := sorted(shapes.keys() ^ flat.keys()):
    raise ValueError(f'params must be those of the config; check {odd[:4]}')
  for path, leaf in shapes.items():
    expected, got = (
      f'{np.dtype(x.dtype).name}{list(x.shape)}' for x in (leaf, flat[path])
    )
    if got != expected:
      raise ValueError(f'{path} must be {expected} by the config, got {got}')


def _sourced(
  source: str | pathlib.Path | None, architecture: Architecture
) -> Fields:
  """Returns the fields of a source's config.json for other programs."""
  if source is None:
    return {}
  file = pathlib.Path(source) / 'config.json'
  if not file.is_file():
    return {}
  return huggingface_config.for_others(read_json(file), architecture)


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in a file, which may begin with a byte-order mark.

  Raises:
    ValueError: the file does not contain a JSON object.
  """
  try:
    data = json.loads(file.read_bytes().decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{file} must be JSON ({error}): fetch it again'
    ) from error
  if not isinstance(data, dict):
    raise ValueError(f'{file} must be a JSON object, got {str(data)[:40]!r}')
  return data


def _write_json(file: pathlib.Path, data: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(data, indent=2) + '\n')


def _flatten(tree: PyTree) -> Flat:
  return dict(flax.traverse_util.flatten_dict(tree, sep='/'))
