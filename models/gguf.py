"""Converts a GGUF file of llama.cpp to a checkpoint directory of transformers.

  python -m models.gguf FILE DIR

writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.
Programs that load a checkpoint directory of transformers can then load the
file's model. Quantized weights are dequantized, to float32 by default.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from models import huggingface
from models.llama import LlamaConfig

if TYPE_CHECKING:
  from gguf import GGUFReader, ReaderTensor

PyTree: TypeAlias = Any

Fields: TypeAlias = dict[str, Any]
"""Values of a GGUF file by key, or of a JSON file by name."""

# Names of a layer's modules in GGUF files and in transformers.
_LAYER = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_WHOLE = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}

# Fields of `LlamaConfig` to keys of a file, without the prefix 'llama.'.
_REQUIRED = {
  'width': 'embedding_length',
  'mlp_width': 'feed_forward_length',
  'num_layers': 'block_count',
  'num_heads': 'attention.head_count',
  'norm_eps': 'attention.layer_norm_rms_epsilon',
}
_OPTIONAL = {
  'num_kv_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'rope_theta': 'rope.freq_base',
}
_HARMLESS = {'context_length', 'vocab_size'}

# Keys that must have this value if they are present.
_NEUTRAL = {'rope.scaling.type': 'none', 'expert_count': 0}

_TOKEN_IDS = {
  'bos': 'tokenizer.ggml.bos_token_id',
  'eos': 'tokenizer.ggml.eos_token_id',
  'unk': 'tokenizer.ggml.unknown_token_id',
  'pad': 'tokenizer.ggml.padding_token_id',
}
_CONTROL, _USER_DEFINED = 3, 4
"""GGUF's types of tokens that are found in a text as a whole, before any merge:
control tokens, and tokens defined by the user."""

_TOKENS, _MERGES = 'tokenizer.ggml.tokens', 'tokenizer.ggml.merges'

_TAKE = (
  'take the tokenizer from the directory of transformers that the file was '
  'made from'
)
"""Advice for a file whose tokenizer cannot be read."""


def load(
  file: str | pathlib.Path, *, shardings: PyTree = None, **overrides: Any
) -> tuple[LlamaConfig, PyTree]:
  """Reads the model of a GGUF file.

  Tensors are dequantized and copied to their devices in pieces, so that host
  memory never holds a large part of the model.

  Args:
    file: A file whose general.architecture is llama: LLaMA, SmolLM, TinyLlama
      or Mistral. A GGUF file does not contain the attention window of Mistral;
      pass it as `window`.
    shardings: As in `models.huggingface.load`.
    **overrides: Fields of `LlamaConfig` to replace, such as param_dtype.

  Returns:
    The configuration, and the parameters of `models.llama` as `jax.Array`s.

  Raises:
    FileNotFoundError: The file does not exist.
    ImportError: The library gguf is not installed.
    ValueError: The file is not a GGUF file, or requires a feature that is not
      implemented. The message names the feature.
  """
  reader, fields = _open(file)
  return _load(file, reader, fields, shardings, overrides)


def convert(
  file: str | pathlib.Path, directory: str | pathlib.Path, **overrides: Any
) -> LlamaConfig:
  """Converts a GGUF file to a checkpoint directory of transformers.

  Args:
    file: As in `load`. Its tokenizer must be a byte-level BPE.
    directory: Directory for weights, config and tokenizer. It is created if
      necessary, and must not contain a checkpoint.
    **overrides: As in `load`.

  Returns:
    The configuration.

  Raises:
    FileExistsError: The directory contains a checkpoint.
    FileNotFoundError, ImportError, ValueError: As in `load`.
  """
  huggingface.check_new(directory)
  reader, fields = _open(file)
  try:
    # The architecture is checked first: the tokenizer of an unsupported one
    # would raise a less helpful error.
    _config(reader, fields)
    tokenizer, words = tokenizer_of(fields)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error
  config, params = _load(file, reader, fields, None, overrides)
  others = {f'{name}_token_id': i for name, i in _token_ids(fields).items()}
  length = fields.get('llama.context_length')
  with tempfile.TemporaryDirectory() as source:
    source = pathlib.Path(source)
    tokenizer.save(str(source / 'tokenizer.json'))
    (source / 'tokenizer_config.json').write_text(_text(words))
    others |= {'max_position_embeddings': length} if length else {}
    (source / 'config.json').write_text(_text(others))
    huggingface.save(directory, config, params, source=source)
  return config


def tokenizer_of(fields: Fields) -> tuple[Any, Fields]:
  """Builds the tokenizer that a file's fields describe.

  Args:
    fields: Values of the file by key. Only keys with 'tokenizer.' are used.

  Returns:
    The `tokenizers.Tokenizer`, and the fields of tokenizer_config.json: the
    special tokens and, if the file has one, the chat template.

  Raises:
    ImportError: The library tokenizers is not installed.
    ValueError: The file has another kind of tokenizer. The message names it.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise _no_library('tokenizers') from error

  before = _pre_tokenizers(fields, tokenizers.pre_tokenizers)
  for key in (_TOKENS, _MERGES):
    if key not in fields:
      raise ValueError(f'{key} is missing: {_TAKE}')
    if not isinstance(fields[key], list):
      raise ValueError(f'{key} must be a list, got {fields[key]!r}: {_TAKE}')
  tokens = fields[_TOKENS]
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = [tuple(x.split(' ', 1)) for x in fields[_MERGES]]
  try:
    model = tokenizers.models.BPE(vocab, merges)
  # The library raises plain `Exception`s.
  except Exception as error:
    raise ValueError(
      f'{_MERGES} must join tokens ({error}): {_TAKE}'
    ) from error
  for name, i in _token_ids(fields).items():
    if not 0 <= i < len(tokens):
      raise ValueError(
        f'{_TOKEN_IDS[name]} must be below {len(tokens)}, the number of '
        f'{_TOKENS}, got {i}: {_TAKE}'
      )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(before)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  kinds = fields.get('tokenizer.ggml.token_type', ())
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
      for token, kind in zip(tokens, kinds, strict=False)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )
  words = {f'{name}_token': tokens[i] for name, i in _token_ids(fields).items()}
  words |= {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'add_bos_token': False,
    'clean_up_tokenization_spaces': False,
  }
  if 'tokenizer.chat_template' in fields:
    words['chat_template'] = fields['tokenizer.chat_template']
  return tokenizer, words


def _pre_tokenizers(fields: Fields, pre_tokenizers: ModuleType) -> list[Any]:
  """Returns the pre-tokenizers, which split a text before the BPE's merges.

  Raises ValueError if the file's tokenizer is not one of the supported kinds.
  """
  known = {
    'gpt-2': (),
    'smollm': (pre_tokenizers.Digits(individual_digits=True),),
  }
  expected = {
    'tokenizer.ggml.model': ('gpt2',),
    'tokenizer.ggml.pre': tuple(known),
    'tokenizer.ggml.add_bos_token': (False, None),
    'tokenizer.ggml.add_space_prefix': (False, None),
  }
  for key, values in expected.items():
    if fields.get(key) not in values:
      raise ValueError(
        f'{key} must be {" or ".join(map(repr, values))}, got '
        f'{fields.get(key)!r}: {_TAKE}'
      )
  last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  return [*known[fields['tokenizer.ggml.pre']], last]


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a GGUF file, whose rows are dequantized on demand."""

  tensor: 'ReaderTensor'
  """The library's description of the tensor, with the file's bytes."""
  order: np.ndarray | None
  """Index in the file of each row in transformers' order (None: the same
  order)."""
  dtype: str = 'float32'
  """Type of the dequantized rows."""

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(self.tensor.shape))

  def __getitem__(self, rows: slice) -> np.ndarray:
    import gguf

    data = self.tensor.data
    stored = data[rows] if self.order is None else data[self.order[rows]]
    return gguf.dequantize(stored, self.tensor.tensor_type)


def _open(file: str | pathlib.Path) -> tuple['GGUFReader', Fields]:
  """Returns the library's reader of a file, and the file's values by key."""
  try:
    import gguf
  except ImportError as error:
    raise _no_library('gguf') from error

  if not pathlib.Path(file).is_file():
    raise FileNotFoundError(f'{file} must be a GGUF file, there is none')
  try:
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError) as error:
    # If a file ends early, the library's error is about its own arrays.
    raise ValueError(
      f'{file} must be a whole GGUF file ({error}); fetch it again'
    ) from error
  if fields.get('split.count', 1) > 1:
    raise ValueError(
      f'{file}: split.count must be 1, got {fields["split.count"]}: it is one '
      'part of a model. Fetch all parts and join them with '
      '`llama-gguf-split --merge FIRST_PART WHOLE` of llama.cpp'
    )
  return reader, fields


def _load(
  file: str | pathlib.Path,
  reader: 'GGUFReader',
  fields: Fields,
  shardings: PyTree,
  overrides: Mapping[str, Any],
) -> tuple[LlamaConfig, PyTree]:
  """Implements `load` for an open file."""
  try:
    config = dataclasses.replace(_config(reader, fields), **overrides)
    tensors = _tensors(reader, config)
    return config, huggingface.params_of(
      tensors, config, shardings, remedy='check llama.block_count in the file'
    )
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error


def _config(reader: 'GGUFReader', fields: Fields) -> LlamaConfig:
  """Returns the model that a file's fields and tensors describe."""
  kind = fields.get('general.architecture')
  if kind != 'llama':
    raise ValueError(
      f'general.architecture must be llama, got {kind!r}: no other is '
      'implemented; start from the directory of transformers that the file was '
      'made from'
    )
  prefix = 'llama.'
  given = {
    key.removeprefix(prefix): value
    for key, value in fields.items()
    if key.startswith(prefix)
  }
  if missing := [key for key in _REQUIRED.values() if key not in given]:
    raise ValueError(f'{prefix}{missing[0]} is missing')
  values = {
    ours: given.pop(theirs)
    for ours, theirs in (_REQUIRED | _OPTIONAL).items()
    if theirs in given
  }
  for ours, value in values.items():
    if not isinstance(value, (int, float)):
      key = (_REQUIRED | _OPTIONAL)[ours]
      raise ValueError(
        f'{prefix}{key} must be one number, the same for every layer, got '
        f'{value!r}'
      )
  # The file stores a float32, which cannot represent 1e-5 exactly. Its shortest
  # decimal is the intended number.
  values['norm_eps'] = float(str(np.float32(values['norm_eps'])))
  shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
  if 'token_embd.weight' not in shapes:
    raise ValueError('token_embd.weight is missing')
  config = LlamaConfig(
    vocab_size=int(shapes['token_embd.weight'][-1]),
    tied='output.weight' not in shapes,
    **values,
  )
  _check(given, config.head_width)
  return config


def _check(given: Fields, head_dim: int) -> None:
  """Raises ValueError if a field is not implemented."""
  neutral = _NEUTRAL | dict.fromkeys(
    ('rope.dimension_count', 'attention.value_length'), head_dim
  )
  for key, value in given.items():
    if key not in _HARMLESS and value != neutral.get(key):
      known = f'must be {neutral[key]!r}' if key in neutral else 'is not known'
      raise ValueError(
        f'llama.{key} {known}, got {value!r}: nothing else is implemented'
      )


def _tensors(reader: 'GGUFReader', config: LlamaConfig) -> dict[str, _Stored]:
  """Returns a file's tensors by transformers' names, with rows in its order."""
  import gguf

  heads = {'attn_q': config.num_heads, 'attn_k': config.kv_heads}
  tensors = {}
  for tensor in reader.tensors:
    try:
      gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
        f'{tensor.name} has the quantization {tensor.tensor_type.name}, which '
        'the library gguf does not decode; take a file of another one'
      ) from error
    name, part = _name(tensor.name)
    rows = int(tensor.shape[-1])
    order = _unpaired(rows, heads[part]) if part in heads else None
    tensors[name] = _Stored(tensor, order)
  return tensors


def _name(theirs: str) -> tuple[str, str | None]:
  """Returns transformers' name of a tensor, and the module of the layer.

  The module is a key of `_LAYER`, or None for a tensor outside of the layers.
  """
  if theirs in _WHOLE:
    return _WHOLE[theirs], None
  prefix, _, rest = theirs.partition('.')
  layer, _, rest = rest.partition('.')
  part, _, kind = rest.partition('.')
  if prefix != 'blk' or kind != 'weight' or part not in _LAYER:
    raise ValueError(
      f'the tensor {theirs} belongs to no model that is implemented (a LLaMA '
      'without biases, experts and scaled waves)'
    )
  return f'model.layers.{layer}.{_LAYER[part]}.weight', part


def _unpaired(rows: int, heads: int) -> np.ndarray:
  """Returns the order of the rows of a query or key matrix for transformers.

  The rotary embedding rotates pairs of dimensions. The two dimensions of a pair
  are neighbours in llama.cpp, and half a head apart in transformers.

  Args:
    rows: Number of rows of the matrix.
    heads: Number of heads that the rows are divided into.

  Returns:
    The index in the file of each row of transformers [rows].

  Example:
    >>> _unpaired(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
  """
  if rows % (2 * heads):
    raise ValueError(
      f'queries and keys must have whole heads, got {rows} rows of {heads}'
    )
  return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def _token_ids(fields: Fields) -> dict[str, int]:
  return {name: fields[k] for name, k in _TOKEN_IDS.items() if k in fields}


def _no_library(name: str) -> ImportError:
  return ImportError(
    f'a GGUF file needs the library {name}: pip install "galore-optax[gguf]"'
  )


def _text(fields: Fields) -> str:
  return json.dumps(fields, indent=2)


def main(arguments: list[str] | None = None) -> None:
  """Converts the file that the command line names.

  Args:
    arguments: The command line's arguments; None reads `sys.argv`.
  """
  parser = argparse.ArgumentParser(
    'python -m models.gguf', description=(__doc__ or '').split('\n\n')[0]
  )
  parser.add_argument('file', help='a GGUF file of a LLaMA')
  parser.add_argument('directory', help='where to write; made if not there')
  parser.add_argument(
    '--dtype',
    '-d',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='type of the weights that are written',
  )
  given = parser.parse_args(arguments)
  formats = {'dtype': given.dtype, 'param_dtype': given.dtype}
  try:
    config = convert(given.file, given.directory, **formats)
  except (OSError, ImportError, ValueError) as error:
    sys.exit(f'error: {error}')
  print(f'{given.directory}: {config}')


if __name__ == '__main__':
  main()
