"""Reads and writes the factors of LoRA as adapters of PEFT.

Such a directory has adapter_config.json and adapter_model.safetensors.
`models.lowrank` defines the factors.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from models import huggingface
from models.huggingface_config import linear_modules
from models.lowrank import FACTORS, Lora, Relora, flatten, unflatten

PyTree: TypeAlias = Any

_KIND = 'llama'
"""Architecture whose names of tensors an adapter has: it has every parameter of
`models.llama`."""

_PREFIX = 'base_model.model.'

_FILES = ('adapter_config.json', 'adapter_model.safetensors')

# Fields of PEFT's config that select variants of LoRA, which `Lora` does not
# implement.
_FOREIGN = (
  'use_dora',
  'use_rslora',
  'use_qalora',
  'use_bdlora',
  'lora_bias',
  'fan_in_fan_out',
  'rank_pattern',
  'alpha_pattern',
  'modules_to_save',
  'trainable_token_indices',
  'target_parameters',
  'layer_replication',
  'alora_invocation_tokens',
  'arrow_config',
  'kasa_config',
  'velora_config',
  'monteclora_config',
)

# Initializations of PEFT that also change the kernels which have factors.
_MOVED = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')


def save_adapter(
  directory: str | pathlib.Path,
  params: PyTree,
  adapter: Lora,
  *,
  base: str | None = None,
) -> None:
  """Writes only the factors, as an adapter that PEFT can load.

  Args:
    directory: Directory of the adapter. It is created if necessary, and must
      not contain an adapter.
    params: Parameters of `models.llama` with factors.
    adapter: The adapter that they were made with.
    base: Name or path of the base model's checkpoint, which is written to
      adapter_config.json.

  Raises:
    FileExistsError: The directory contains an adapter.
    ValueError: Other weights than the factors were trained as well.
  """
  from safetensors import numpy as safetensors

  if not isinstance(adapter, Lora) or not _trains_only_factors(adapter):
    raise ValueError(
      'an adapter is saved alone where nothing else is trained: a Lora with '
      f"rest='frozen' and lomo=0, got {adapter}; merge it, and save the model"
    )
  directory = pathlib.Path(directory)
  for name in _FILES:
    if (directory / name).exists():
      raise FileExistsError(
        f'{directory / name} exists; name another directory'
      )
  tensors = {}
  for factor, letter in zip(FACTORS, 'AB', strict=True):
    kernels = _factor_tree(params, factor)
    for name, tensor in huggingface.named_tensors(kernels, _KIND).items():
      tensors[_peft_name(name, letter)] = tensor
  modules = {name.split('.lora_')[0].split('.')[-1] for name in tensors}
  fields = {
    'peft_type': 'LORA',
    'bias': 'none',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': adapter.rank,
    'lora_alpha': adapter.alpha,
    'lora_dropout': adapter.dropout,
    'target_modules': sorted(modules),
  }
  directory.mkdir(parents=True, exist_ok=True)
  safetensors.save_file(tensors, directory / _FILES[1], {'format': 'pt'})
  (directory / _FILES[0]).write_text(json.dumps(fields, indent=2) + '\n')


def load_adapter(
  directory: str | pathlib.Path, params: PyTree
) -> tuple[PyTree, Lora]:
  """Adds the factors of an adapter in PEFT's format to parameters.

  Args:
    directory: Directory with adapter_config.json and adapter_model.safetensors.
    params: Parameters of `models.llama` without factors.

  Returns:
    The parameters with factors, and the `Lora` that describes them.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: The adapter uses a variant that `Lora` does not implement, or
      its tensors do not fit the model. The message names the field or tensor.
  """
  from safetensors import numpy as safetensors

  config, weights = (pathlib.Path(directory) / name for name in _FILES)
  for file in (config, weights):
    if not file.is_file():
      raise FileNotFoundError(f'{file} is missing; it is part of an adapter')
  fields = huggingface.read_json(config)
  _check_peft(config, fields)
  tensors = safetensors.load_file(weights)
  flat, targets = flatten(params), []
  for path, leaf in list(flat.items()):
    if not (path.startswith('blocks/') and path.endswith('/kernel')):
      continue
    layers = range(leaf.shape[0])
    names = [linear_modules(_KIND, layer)[path] for layer in layers]
    if not any(_peft_name(name, 'A') in tensors for name in names):
      continue
    targets.append(path)
    shape_a = (fields['r'], leaf.shape[1])
    for letter, factor, shape in (
      ('A', FACTORS[0], shape_a),
      ('B', FACTORS[1], (leaf.shape[2], fields['r'])),
    ):
      flat[f'{path.rpartition("/")[0]}/{factor}'] = jnp.stack(
        [
          _peft_tensor(tensors, _peft_name(name, letter), shape)
          for name in names
        ]
      )
  if tensors:
    raise ValueError(
      f'{weights} has tensors that the model has no place for: '
      f'{sorted(tensors)[:4]} ({len(tensors)} in all)'
    )
  adapter = Lora(
    rank=fields['r'],
    alpha=float(fields['lora_alpha']),
    dropout=float(fields['lora_dropout']),
    targets=tuple(map(re.escape, targets)),
  )
  return unflatten(flat), adapter


def _check_peft(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Raises ValueError if PEFT's config requires more than `Lora` implements."""
  for name, value in {'peft_type': 'LORA', 'bias': 'none'}.items():
    if fields.get(name) != value:
      raise ValueError(
        f'{file}: {name} must be {value!r}, got {fields.get(name)!r}; '
        'merge the adapter with PEFT, and load the model'
      )
  foreign = {name: fields[name] for name in _FOREIGN if fields.get(name)}
  first = fields.get('init_lora_weights')
  if isinstance(first, str) and first.lower().startswith(_MOVED):
    foreign['init_lora_weights'] = first
  if foreign:
    raise ValueError(
      f'{file}: plain LoRA has none of {foreign}; merge the adapter with PEFT, '
      'and load the model'
    )
  absent = {'r', 'lora_alpha', 'lora_dropout'} - fields.keys()
  if absent:
    raise ValueError(f'{file} must have {sorted(absent)}')


def _trains_only_factors(adapter: Lora) -> bool:
  """Returns whether only the factors are trained, and never merged."""
  merges = isinstance(adapter, Relora)
  return adapter.rest == 'frozen' and not adapter.lomo and not merges


def _factor_tree(params: PyTree, factor: str) -> PyTree:
  """Returns the tree of all A (or all B) factors, with the key 'kernel'."""
  flat = flatten(params)
  return unflatten(
    {
      path.replace(factor, 'kernel'): np.asarray(leaf, np.float32)
      for path, leaf in flat.items()
      if path.endswith(f'/{factor}')
    }
  )


def _peft_name(name: str, letter: str) -> str:
  """Returns PEFT's name of a factor, from the checkpoint's name of a weight."""
  return f'{_PREFIX}{name.removesuffix(".weight")}.lora_{letter}.weight'


def _peft_tensor(
  tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int]
) -> jax.Array:
  """Removes one layer's factor from PEFT's tensors and returns it transposed.

  The result has our layout: A [in, r] or B [r, out], in float32.
  """
  if name not in tensors:
    raise ValueError(
      f'{name} is missing: an adapter must have a kernel of all layers, or of '
      'none'
    )
  tensor = tensors.pop(name)
  if tensor.shape != shape:
    raise ValueError(f'{name} must have the shape {shape}, got {tensor.shape}')
  return jnp.asarray(tensor.T, jnp.float32)
