"""Weights from and to the names and layouts of transformers' checkpoints.

A checkpoint holds one (out, in) matrix for each layer; the models here hold
(in, out) matrices stacked over layers.
"""

import pathlib

import flax.traverse_util
import jax
import numpy as np

from models import llama

_NAMES = {
  'embed/embedding': 'model.embed_tokens.weight',
  'blocks/attention_norm/scale': 'model.layers.{}.input_layernorm.weight',
  'blocks/attention/q/kernel': 'model.layers.{}.self_attn.q_proj.weight',
  'blocks/attention/k/kernel': 'model.layers.{}.self_attn.k_proj.weight',
  'blocks/attention/v/kernel': 'model.layers.{}.self_attn.v_proj.weight',
  'blocks/attention/o/kernel': 'model.layers.{}.self_attn.o_proj.weight',
  'blocks/mlp_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
  'blocks/mlp/gate/kernel': 'model.layers.{}.mlp.gate_proj.weight',
  'blocks/mlp/up/kernel': 'model.layers.{}.mlp.up_proj.weight',
  'blocks/mlp/down/kernel': 'model.layers.{}.mlp.down_proj.weight',
  'norm/scale': 'model.norm.weight',
  'lm_head/kernel': 'lm_head.weight',
}


def llama_params(tensors, config):
  """Parameters of `models.llama` from a LlamaForCausalLM's tensors.

  Args:
    tensors: Dict from checkpoint name to NumPy array. A tied model's
      `lm_head.weight` and the rotary frequencies that old checkpoints carry
      are ignored; any other name that the model lacks is an error.
    config: The `LlamaConfig` that the tensors must fit.

  Returns:
    Nested dict of NumPy arrays of type `config.param_dtype`.
  """
  shapes = jax.eval_shape(llama.Layers(config).init, jax.random.key(0))
  shapes = flax.traverse_util.flatten_dict(shapes, sep='/')
  names = {path: _names(path, config.num_layers) for path in shapes}
  _check_names(tensors, {name for some in names.values() for name in some})
  params = {}
  for path, leaf in shapes.items():
    shape = leaf.shape[1:] if path.startswith('blocks/') else leaf.shape
    layers = [_fit(tensors[name], name, shape) for name in names[path]]
    stack = np.stack(layers, dtype=leaf.dtype, casting='unsafe')
    params[path] = stack.reshape(leaf.shape)
  return flax.traverse_util.unflatten_dict(params, sep='/')


def llama_tensors(params):
  """A LlamaForCausalLM's tensors from parameters: `llama_params` undone.

  Args:
    params: Parameters of `models.llama`, on any device.

  Returns:
    Dict from checkpoint name to NumPy array, without `lm_head.weight` if the
    model is tied.
  """
  tensors = {}
  for path, leaf in flax.traverse_util.flatten_dict(params, sep='/').items():
    array = np.asarray(leaf)
    layers = array if path.startswith('blocks/') else array[None]
    for name, layer in zip(_names(path, len(layers)), layers, strict=True):
      tensors[name] = np.ascontiguousarray(layer.T)
      if path == 'embed/embedding':
        tensors[name] = layer
  return tensors


def read_safetensors(path):
  """All tensors of a safetensors file, or of all such files in a directory."""
  from safetensors import numpy as safetensors

  path = pathlib.Path(path)
  files = sorted(path.glob('*.safetensors')) if path.is_dir() else [path]
  if not files:
    raise ValueError(
      f'expected a .safetensors file or a directory with some, got {path}; '
      'convert other formats with save_pretrained first'
    )
  tensors = {}
  for file in files:
    tensors.update(safetensors.load_file(file))
  return tensors


def write_safetensors(path, tensors):
  """Writes tensors as one file that transformers reads."""
  from safetensors import numpy as safetensors

  # transformers refuses a file that does not say which framework's layouts
  # it holds.
  safetensors.save_file(tensors, path, metadata={'format': 'pt'})


def _names(path, num_layers):
  """The checkpoint's names for a parameter, layer by layer."""
  if not path.startswith('blocks/'):
    return [_NAMES[path]]
  return [_NAMES[path].format(layer) for layer in range(num_layers)]


def _check_names(tensors, expected):
  missing = sorted(expected - set(tensors))
  ignored = {'lm_head.weight'} | {
    name for name in tensors if name.endswith('rotary_emb.inv_freq')
  }
  surplus = sorted(set(tensors) - expected - ignored)
  if missing or surplus:
    raise ValueError(
      'the tensors must be those of the configured model, got missing '
      f'{missing[:4]} and surplus {surplus[:4]} ({len(missing)} and '
      f'{len(surplus)} in all); check num_layers and tied'
    )


def _fit(tensor, name, shape):
  """The tensor as (in, out), of the shape that the model has."""
  matrix = tensor if 'embed_tokens' in name else tensor.T
  if matrix.shape != shape:
    raise ValueError(
      f'{name} must have the shape {shape} of the configured model (kernels '
      f'as (in, out)), got {matrix.shape}; check the config'
    )
  return matrix
