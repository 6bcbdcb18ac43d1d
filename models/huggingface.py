"""Checkpoints of transformers, in and out: directories with config.json,
safetensors and a tokenizer's files.

A checkpoint holds one (out, in) matrix for each layer; the models here hold
(in, out) matrices stacked over layers.
"""

import codecs
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from models import encoder, huggingface_config, llama
from models.huggingface_config import AnyConfig

PyTree: TypeAlias = Any

# As the first BERTs say it.
_RENAMED = {
  'LayerNorm.gamma': 'LayerNorm.weight',
  'LayerNorm.beta': 'LayerNorm.bias',
}

_OTHERS = (
  *('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'),
  *('special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt'),
  *('chat_template.jinja', 'chat_template.json', 'generation_config.json'),
)
"""What a checkpoint has beside config.json and its weights: the tokenizer."""

_INDEX = 'model.safetensors.index.json'

_DTYPES = {
  **{'F64': 'float64', 'F32': 'float32'},
  **{'F16': 'float16', 'BF16': 'bfloat16'},
}
"""Types of weights that are read, by the names of safetensors."""

_REMEDY = 'check num_hidden_layers and tie_word_embeddings in config.json'

_PIECE = 2**26
"""Numbers that are read at a time."""


def read_config(directory: str | pathlib.Path) -> AnyConfig:
  """Returns the model that a checkpoint's config.json describes.

  Its numbers are of the checkpoint's type; of float16, which the model does
  not have, they are float32.

  Raises:
    FileNotFoundError: there is no config.json.
    ValueError: it asks for what is not implemented; the message names it.
  """
  file = pathlib.Path(directory) / 'config.json'
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is missing: a checkpoint is a directory with config.json and '
      f'*.safetensors{_other_kind(file.parent)}'
    )
  fields = read_json(file)
  try:
    return huggingface_config.parse(fields)
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
  shardings: PyTree = None,
  key: jax.Array | None = None,
  **overrides,
) -> tuple[AnyConfig, PyTree]:
  """Reads a checkpoint piece by piece, with little of it in host memory.

  Args:
    directory: config.json, and model.safetensors or an index of such files.
    shardings: where parameters go, one for all or a tree of them as
      `jax.jit(out_shardings=)` takes it, on a mesh whose axes are Auto; None is
      the default device.
    key: draws the head of an encoder whose checkpoint has none.
    **overrides: fields of the configuration to set to something else, such as
      param_dtype.

  Returns:
    The configuration, and the parameters of `models.llama` or `models.encoder`
    as `jax.Array`s.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the config asks for what is not implemented, or the tensors are
      not those of the config; the message names the field or the tensor.
  """
  config = dataclasses.replace(read_config(directory), **overrides)
  tensors = _tensors(directory)
  try:
    return config, params_of(tensors, config, shardings, key)
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from error


def save(
  directory: str | pathlib.Path,
  config: AnyConfig,
  params: PyTree,
  *,
  source: str | pathlib.Path | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a checkpoint that transformers reads.

  Args:
    directory: made if it is not there; must have no checkpoint in it.
    config: the model.
    params: its parameters, on any devices.
    source: a directory whose tokenizer's files are copied, and from whose
      config.json comes what the model does not depend on, such as the ids of
      special tokens.
    max_shard_bytes: tensors in a file, all of which are in host memory while it
      is written; a larger tensor has a file of its own.

  Raises:
    FileExistsError: the directory has a checkpoint.
    ValueError: the parameters are not the config's, or no architecture has
      such a model.
  """
  directory = pathlib.Path(directory)
  flat = _flatten(params)
  _check_params(flat, config)
  fields = huggingface_config.fields_of(config)
  fields |= _sourced(source, fields['model_type'])
  check_new(directory)
  directory.mkdir(parents=True, exist_ok=True)
  parts = _parts(flat, _row(config))
  _write_shards(directory, parts, flat, max_shard_bytes)
  if source is not None:
    copy(source, directory)
  _write_json(directory / 'config.json', fields)


def check_new(directory: str | pathlib.Path) -> None:
  """Raises FileExistsError for a directory that has a checkpoint."""
  for pattern in ('config.json', '*.safetensors', '*.safetensors.index.json'):
    for file in pathlib.Path(directory).glob(pattern):
      raise FileExistsError(f'{file} exists; name another directory')


def copy(source: str | pathlib.Path, directory: str | pathlib.Path) -> None:
  """Copies config.json and the tokenizer's files, as far as they exist.

  Text is written without its byte-order mark, which transformers refuses.
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
  tensors: Mapping[str, Any],
  config: AnyConfig,
  shardings: PyTree = None,
  key: jax.Array | None = None,
  *,
  remedy: str = _REMEDY,
) -> PyTree:
  """Parameters of a model from a checkpoint's tensors.

  Args:
    tensors: NumPy arrays by the checkpoint's names, or what has a shape and
      gives such rows as are asked for. What an architecture's row calls ignored
      is; any other name that the model lacks is an error.
    config: The `LlamaConfig` or `EncoderConfig` that the tensors must fit.
    shardings: as in `load`.
    key: as in `load`.
    remedy: for missing and surplus tensors, in the error's message.

  Returns:
    Nested dict of `jax.Array`s of type `config.param_dtype`.
  """
  row = _row(config)
  init, shapes = _layers(config).init, _shapes(config)
  places = dict.fromkeys(_flatten(shapes))
  if shardings is not None:
    places = _flatten(jax.tree.broadcast(shardings, shapes))
  shapes = _flatten(shapes)
  names = {path: _names(row, path, config.num_layers) for path in shapes}
  expected = {name for some in names.values() for name in some}
  _check_head(tensors, row, shapes)
  tensors = _named(tensors, row, expected)
  fresh = _fresh(tensors, names, row)
  names = {path: some for path, some in names.items() if path not in fresh}
  needed = {name for some in names.values() for name in some}
  _check_names(tensors, needed, remedy)
  for path, some in names.items():
    for name in some:
      expected = _theirs(path, shapes[path].shape)
      _check_tensor(name, tensors[name], expected)
  if fresh and key is None:
    raise ValueError(
      f'the checkpoint has no {", ".join(sorted(fresh))}: give a key to draw '
      'them, or a checkpoint with a head'
    )
  params = {}
  for path, leaf in shapes.items():
    if path in fresh:
      draw = lambda key, path=path: _flatten(init(key))[path]
      params[path] = jax.jit(draw, out_shardings=places[path])(key)
    else:
      stored = {name: tensors[name] for name in names[path]}
      params[path] = _parameter(path, leaf, stored, places[path])
  return flax.traverse_util.unflatten_dict(params, sep='/')


def tensors_of(params: PyTree, config: AnyConfig) -> dict[str, np.ndarray]:
  """A checkpoint's tensors from parameters: `params_of` undone.

  Args:
    params: Parameters of the model, on any device.
    config: The model.

  Returns:
    Dict from checkpoint name to NumPy array, without `lm_head.weight` if the
    model is tied.
  """
  return _tensors_of(params, _row(config))


def llama_tensors(params: PyTree) -> dict[str, np.ndarray]:
  """The same of any model of `models.llama`, or of a part of its parameters."""
  return _tensors_of(params, huggingface_config.ARCHITECTURES['llama'])


def _tensors_of(params, row):
  flat = _flatten(params)
  parts = _parts(flat, row)
  return {name: _tensor(flat, part) for name, part in parts.items()}


def _row(config):
  """What there is to say about a model's architecture."""
  kind = huggingface_config.model_type(config)
  return huggingface_config.ARCHITECTURES[kind]


def _layers(config):
  """The model of a configuration."""
  kinds = {
    llama.LlamaConfig: llama.Layers,
    encoder.EncoderConfig: encoder.Layers,
  }
  return kinds[type(config)](config)


@functools.lru_cache(maxsize=8)
def _shapes(config: AnyConfig) -> PyTree:
  """Shapes of the parameters; callers must not change the dict."""
  return jax.eval_shape(_layers(config).init, jax.random.key(0))


def _named(tensors, row, expected):
  """Tensors by the names of a whole model, without those to be ignored."""
  named = {}
  for name, tensor in tensors.items():
    for before, now in _RENAMED.items():
      if name.endswith(before):
        name = name.removesuffix(before) + now
    if row.prefix + name in expected:
      name = row.prefix + name
    if name in expected or not re.fullmatch(row.ignored, name):
      named[name] = tensor
  return named


def _fresh(tensors, names, row):
  """Paths of the head's modules of which a checkpoint has no tensor."""
  modules = {}
  for path in names:
    if row.head and path.startswith(row.head):
      modules.setdefault(path.rpartition('/')[0], []).append(path)
  return {
    path
    for paths in modules.values()
    for path in paths
    if not any(name in tensors for p in paths for name in names[p])
  }


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a file; rows of it are read when they are asked for."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str

  def __getitem__(self, rows: slice) -> np.ndarray:
    from safetensors import safe_open

    # Opened each time: pages of a file that stays mapped would add up.
    with safe_open(self.file, 'np') as file:
      start, stop, _ = rows.indices(self.shape[0])
      return file.get_slice(self.name)[start:stop]


def _tensors(directory):
  """All tensors of a checkpoint, by name."""
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


def _stored(path):
  """The tensors of one file, by name."""
  from safetensors import SafetensorError, safe_open

  found = {}
  try:
    with safe_open(path, 'np') as file:
      for name in file.keys():
        rows = file.get_slice(name)
        shape, dtype = tuple(rows.get_shape()), rows.get_dtype()
        found[name] = _Stored(path, name, shape, _DTYPES.get(dtype, dtype))
  except SafetensorError as error:
    with open(path, 'rb') as file:
      pointer = file.read(30).startswith(b'version https://git-lfs')
    remedy = 'it is a pointer: git lfs pull' if pointer else 'fetch it again'
    raise ValueError(
      f'{path} must be a whole safetensors file ({error}): {remedy}'
    ) from error
  return found


def _files(directory):
  """The files of a checkpoint, and the tensors that an index says of each.

  Others, as consolidated*, are ignored.
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
    # The name alone: an index has no say in other directories.
    file = directory / pathlib.PurePath(name).name
    found.setdefault(file, set()).add(tensor)
  return dict(sorted(found.items()))


def _other_kind(directory):
  """What to do with a directory that has weights of another kind."""
  if any(directory.glob('adapter_*')):
    return '; an adapter is no model: merge it into its own first'
  if file := next(directory.glob('*.gguf'), None):
    return f'; to convert a GGUF file: python -m models.gguf {file} NEW'
  if not any(directory.glob('*.bin')):
    return ''
  # A pickle runs what it likes.
  return (
    '; *.bin is not read. To convert it, if you trust it: python -c "from '
    'transformers import AutoModelForCausalLM as M; M.from_pretrained('
    f"'{directory}', torch_dtype='auto').save_pretrained('NEW')\""
  )


def _parameter(path, leaf, tensors, sharding):
  """A parameter, on its devices; of its tensors a piece at a time is here."""
  put = _put(_is_table(path), path.startswith('blocks/'), sharding)
  whole = _zeros(leaf.shape, leaf.dtype, sharding)()
  for layer, (name, tensor) in enumerate(tensors.items()):
    rows = max(1, _PIECE // math.prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], rows):
      piece = tensor[start : start + rows]
      if piece.dtype == np.float16:
        # XLA cannot convert it on a CPU without F16C instructions.
        piece = piece.astype(np.float32)
      whole, finite = put(whole, piece, layer, start)
      # Else the next pieces would be read before this one has left the host.
      jax.block_until_ready(whole)
      if not finite:
        raise ValueError(
          f'{name} must be finite, got {piece[~np.isfinite(piece)][0]} among '
          'its numbers: the checkpoint is broken, take another one'
        )
  return whole


# Parameters of equal shapes and places share their programs.
@functools.cache
def _zeros(
  shape: tuple[int, ...], dtype: Any, sharding: Any
) -> Callable[[], jax.Array]:
  """A program that makes a parameter of zeros on its devices."""
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _put(
  is_table: bool, is_stack: bool, sharding: Any
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """A program that writes rows of a tensor into a parameter."""
  outputs = sharding, None

  @functools.partial(jax.jit, out_shardings=outputs, donate_argnums=0)
  def put(
    whole: jax.Array, rows: jax.Array, layer: jax.Array, start: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    piece = (rows if is_table else rows.T).astype(whole.dtype)
    at = [0] * piece.ndim
    at[0 if is_table else -1] = start
    if is_stack:
      piece, at = piece[None], [layer, *at]
    whole = jax.lax.dynamic_update_slice(whole, piece, at)
    return whole, jnp.all(jnp.isfinite(rows))

  return put


def _write_shards(directory, parts, flat, max_bytes):
  """Writes tensors in files of at most so many bytes, and their index."""
  from safetensors import numpy as safetensors

  shards, sizes = [{}], [0]
  for name, part in parts.items():
    leaf, layer = flat[part[0]], part[1]
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
    tensors = {name: _tensor(flat, part) for name, part in shard.items()}
    # transformers refuses a file that does not say which framework's layouts
    # it holds.
    safetensors.save_file(tensors, directory / file, {'format': 'pt'})
    weight_map |= dict.fromkeys(shard, file)
  if count > 1:
    index = {'metadata': {'total_size': sum(sizes)}, 'weight_map': weight_map}
    _write_json(directory / _INDEX, index)


def _parts(flat, row):
  """By the checkpoint's names: a parameter's path, and the layer or None."""
  parts = {}
  for path, leaf in flat.items():
    stacked = path.startswith('blocks/')
    layers = range(len(leaf)) if stacked else [None]
    names = _names(row, path, len(leaf))
    parts |= {name: (path, i) for name, i in zip(names, layers, strict=True)}
  return parts


def _tensor(flat, part):
  """One tensor of the checkpoint, in host memory."""
  path, layer = part
  leaf = flat[path] if layer is None else flat[path][layer]
  return np.ascontiguousarray(_turned(path, leaf))


def _turned(path, matrix):
  """Our layout from theirs, or theirs from ours."""
  return matrix if _is_table(path) else matrix.T


def _theirs(path, shape):
  """The shape of a checkpoint's tensor, from that of our parameter."""
  shape = shape[1:] if path.startswith('blocks/') else shape
  return shape if _is_table(path) else shape[::-1]


def _is_table(path):
  """Whether rows are looked up: such a matrix is stored as we have it."""
  return path.endswith('/embedding')


def _names(row, path, num_layers):
  """The checkpoint's names for a parameter, layer by layer."""
  if not path.startswith('blocks/'):
    return [row.names[path]]
  return [row.names[path].format(layer) for layer in range(num_layers)]


def _check_names(tensors, expected, remedy):
  missing = sorted(expected - set(tensors))
  surplus = sorted(set(tensors) - expected)
  if missing or surplus:
    raise ValueError(
      'the tensors must be those of the configured model, got missing '
      f'{missing[:4]} and surplus {surplus[:4]} ({len(missing)} and '
      f'{len(surplus)} in all); {remedy}'
    )


def _check_tensor(name, tensor, expected):
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


def _check_head(tensors, row, shapes):
  """Raises ValueError where a tied model comes with a head of its own."""
  table, head = (
    row.names.get(x) for x in ('embed/embedding', 'lm_head/kernel')
  )
  if 'lm_head/kernel' in shapes or head not in tensors or table not in tensors:
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


def _check_params(flat, config):
  shapes = _flatten(_shapes(config))
  if odd := sorted(shapes.keys() ^ flat.keys()):
    raise ValueError(f'params must be those of the config; check {odd[:4]}')
  for path, leaf in shapes.items():
    expected, got = (
      f'{np.dtype(x.dtype).name}{list(x.shape)}' for x in (leaf, flat[path])
    )
    if got != expected:
      raise ValueError(f'{path} must be {expected} by the config, got {got}')


def _sourced(source, kind):
  """What a source's config.json has for other programs."""
  file = source and pathlib.Path(source) / 'config.json'
  if not file or not file.is_file():
    return {}
  return huggingface_config.for_others(read_json(file), kind)


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


def _write_json(file, data):
  file.write_text(json.dumps(data, indent=2) + '\n')


def _flatten(tree):
  return flax.traverse_util.flatten_dict(tree, sep='/')
