"""The table of names: kind and axes of each leaf, by its path and shape.

`of` returns whether a leaf is an embedding, an output head, a norm or a bias, a
convolution, an attention kernel or another matrix, and which of its axes are
inputs and outputs of one matrix. `ROWS` contains the names in libraries for
JAX, and `STACKS` their names of stacked layers.

The kernel of a convolution is one matrix. Its inputs are the taps and the input
channels, and its outputs are the output channels: [kh, kw, in, out] is the
matrix [kh kw in, out]. Names decide, because experts [L, E, in, out] have the
same shape:

  [k, in, out], [kh, kw, in, out] and [kd, kh, kw, in, out] are kernels of one,
  two and three dimensions: all axes before the channels are taps.
  A module such as conv1d or Conv2D states the number of tap axes. Axes before
  them are batch.
  Inside a stack such as `blocks` or `layers`, without the index of a layer, the
  first axis of [L, kh, kw, in, out] is batch. Four axes are a kernel of two
  dimensions if the first two are equal, and a stack [L, k, in, out] otherwise.
  A grouped convolution stores [kh, kw, in / groups, out], which is one matrix.
  A depthwise convolution has one input channel for each output. It stays whole,
  and so does the first convolution of gray images, which has the same shape. A
  patch embedding with one input channel is a matrix, because it is never
  depthwise.

The names are those of these versions or commits:

  flax 0.12.8 (linen, nnx, examples lm1b, wmt, imagenet, gemma at 18f8f31)
  Tunix 0.1.7, dm-haiku 0.0.17, Equinox 0.13.8, haliax 1.3
  transformers 4.57.6 (the models in Flax)
  MaxText e591f30, EasyDeL 0.3.0 (090a03b), T5X cc342d4
  big_vision 0127fb6, Levanter 1.2 (9263f81)
  diffusers 044d75a (the models in Flax), Scenic 4a38d47, Bonsai 3628425
  jax-diffusion-transformer 821a7d6

For a model with other names pass `axes` and `targets` to `galore`.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal[
  'vector',
  'head',
  'convolution',
  'depthwise',
  'embedding',
  'attention',
  'matrix',
]
"""The kind of a leaf. A stack has the kind of its elements."""

Shape: TypeAlias = Sequence[int]


class Leaf(NamedTuple):
  """The result of a lookup in the table."""

  kind: Kind
  """Kind of the leaf."""
  label: str
  """The kind in words, for tables."""
  axes: tuple[tuple[int, ...], tuple[int, ...]]
  """Input axes and output axes of the leaf as a matrix, non-negative. All other
  axes are batch. Both are empty for a leaf with fewer than two axes."""
  taps: tuple[int, ...] = ()
  """The input axes that are taps of a convolution, not channels."""


class Row(NamedTuple):
  """A row of the table: names, and the kind of leaves with these names."""

  kind: Kind
  """Kind of these leaves."""
  label: str
  """The kind in words."""
  names: str
  """A regex that matches a whole path, as `_snake` writes it."""
  source: str
  """The projects that use the names."""
  layout: str = ''
  """The last axes of a leaf: 'i' input, 'o' output, 'b' batch, 't' tap of a
  convolution, '*' one or more taps. Taps are inputs too. Axes before them are
  batch. The row applies to leaves with at least as many axes. Without a layout
  it applies to all leaves, and the last two axes are input and output."""
  fits: Callable[[Shape], bool] | None = None
  """Whether the row applies to a shape, if the same names occur with others."""
  never_depthwise: bool = False
  """Whether these convolutions are not depthwise if they have one input."""


class Stack(NamedTuple):
  """Names of leaves that are stacks of layers, and the axis of the layers."""

  names: str
  """A regex that matches a whole path, as `_snake` writes it."""
  axis: int
  """The axis of the layers."""
  source: str
  """The project that uses the names."""


def _word(words: str) -> str:
  """Returns a regex for paths with a word; layer_norm_1 has layer and norm."""
  return rf'.*(?<![a-z])({words})(?![a-z]).*'


def _part(parts: str) -> str:
  """Returns a regex for paths with a component, such as 'lm_head'."""
  return rf'.*/({parts})(/.*)?'


def _first_is_longer(shape: Shape) -> bool:
  """Whether a kernel is [d, heads, head_dim] and not a stack [layers, in, out].

  A model is wider than it has heads, and a stack has fewer layers than inputs.
  """
  return shape[-3] > shape[-2]


def _joins_to_width(shape: Shape) -> bool:
  """Whether heads times head_dim is d in [heads, head_dim, d]."""
  return shape[-3] * shape[-2] == shape[-1]


def _heads_are_short(shape: Shape) -> bool:
  """Whether head_dim is at most half of d in [heads, head_dim, d].

  In a stack [layers, in, out] of output projections, the number of inputs is
  heads times head_dim, which is close to d.
  """
  return 2 * shape[-2] <= shape[-1]


def _taps_differ(shape: Shape) -> bool:
  """Whether the first axes of [L, k, in, out] are not a square of taps."""
  return shape[-4] != shape[-3]


def _last_taps_differ(shape: Shape) -> bool:
  """Whether the axes of [L, out, in, k] are not [out, in, k, k]."""
  return shape[-2] != shape[-1]


def _convolution(
  names: str,
  source: str,
  *,
  layout: str,
  fits: Callable[[Shape], bool] | None = None,
  never_depthwise: bool = False,
) -> Row:
  """Returns the row of a kernel of a convolution."""
  label = 'convolution'
  return Row(label, label, names, source, layout, fits, never_depthwise)


def _attention(
  names: str,
  source: str,
  *,
  layout: str,
  fits: Callable[[Shape], bool] | None = None,
) -> Row:
  """Returns the row of an attention kernel with a heads axis."""
  label = 'attention kernel, heads merged'
  return Row('attention', label, names, source, layout, fits)


_OUT = r'(out(/kernel)?|(o|out)_proj/(w|kernel))'
"""Matches the output projection of an attention module of flax or Tunix."""
_IN_ATTENTION = r'[^/]*att(n|ention)[^/]*/(.*/)?'
"""Matches an attention module and further parents of a leaf."""
_IN_STACKED = r'.*/(stacked|blocks/\d+)/(.*/)?'
"""Matches the parents of a leaf inside haliax's `Stacked` or `BlockSeq`."""
_ROOT = r'(/(params|model|module|network|net|transformer|decoder|lm|llm))*'
"""Matches the parents of a leaf that is not inside a layer."""
_LIST = r'([/._](layers/)?\d+)*'
"""Matches the indices of an element of a list of modules."""
_PATCHES = rf'.*/[^/]*patch_?embed[^/]*(/proj(ection)?)?{_LIST}'
"""Matches the module of a patch embedding."""
_CONVOLUTION = (
  r'.*/([^/]*(?<![a-z])[a-z]*conv(s|olutions?|transpose|d)?(?![a-z])[^/]*'
  rf'|stem|downsample(rs?)?(_layers)?){_LIST}'
)
"""Matches the module of a convolution, or an element of a list of them."""
_STATES_TAPS = r'.*/[^/]*(?<![a-z])[a-z]*conv_?{}_?d(?![a-z])[^/]*'
"""Matches the module of a convolution that states its number of tap axes."""
_IN_STACK = r'(?=.*/(blocks|layers|stack|scan[^/]*)/(?!\d|stacked/))'
"""Matches before a path inside a stack of layers, without an index."""
_LAST, _FIRST = '/(kernel|w)', '/weight'
"""Match the array of a convolution: channels last, or channels first."""

# The first row that applies to a leaf decides.
ROWS = (
  Row('vector', 'norm', _word('[a-z]*norm[a-z]*|ln|gn|bn'), 'all projects'),
  Row('vector', 'scale', _word('scale'), 'all projects'),
  Row('vector', 'bias', _word('bias'), 'all projects'),
  # A stack of these in hk.experimental.layer_stack has the shape of a matrix.
  Row(
    'vector',
    'bias',
    r'.*/(linear(_\d+)?|query|key|value|[^/]*conv[^/]*)/b',
    'dm-haiku',
  ),
  # `multi_head` is a module of attention, and `router_logits` a router.
  Row(
    'head',
    'output head',
    _part(
      r'(?!multi_head|router)(\w+_)?(head|logits?|logits?_?dense)'
      r'|unembed\w*|classifier'
    ),
    'flax lm1b: logitdense; T5X, MaxText: logits_dense; dm-haiku: logits;'
    ' transformers: lm_head, classifier; big_vision: head',
  ),
  Row(
    'head',
    'output head',
    r'.*/predictions/decoder(/.*)?',
    'transformers: FlaxBertForMaskedLM',
  ),
  # Inside a layer, BERT's attention/output/dense is a projection.
  Row(
    'head',
    'output head',
    _ROOT + r'/(output(_layer)?|proj_out)(/(kernel|w|weight))?',
    'EasyDeL: proj_out of Whisper; LLaMA: output',
  ),
  _convolution(
    _PATCHES + _LAST,
    'transformers: patch_embeddings/projection; Scenic: patch_embed.proj',
    layout='*io',
    never_depthwise=True,
  ),
  _convolution(
    _PATCHES + _FIRST,
    'Equinox, PyTorch',
    layout='oi*',
    never_depthwise=True,
  ),
  _convolution(
    rf'.*/[^/]*embed[^/]*(/proj(ection)?|{_LIST})/kernel',
    'big_vision: vit.py; Tunix: SigLIP; MaxText: Gemma 3; Scenic: ViT, ViViT;'
    ' Bonsai: pos_embeddings/projection, embedding_layer/layers/0',
    layout='**io',
    never_depthwise=True,
  ),
  _convolution(
    r'.*/[^/]*conv\d_d_transpose[^/]*/w',
    'dm-haiku: conv2_d_transpose',
    layout='*oi',
  ),
  # The name states the number of taps.
  *(
    _convolution(
      _STATES_TAPS.format(num) + array,
      'flax: conv1d; dm-haiku: conv1_d, conv2_d, conv3_d; Equinox: conv1d',
      layout=layout.format('t' * num),
    )
    for num in (1, 2, 3)
    for array, layout in ((_LAST, '{}io'), (_FIRST, 'oi{}'))
  ),
  # A stack of kernels with one tap axis has as many axes as a kernel with two.
  _convolution(
    _IN_STACK + _CONVOLUTION + _LAST, 'flax nn.scan, nnx.vmap', layout='b*tio'
  ),
  _convolution(
    _IN_STACK + _CONVOLUTION + _LAST,
    'flax nn.scan, nnx.vmap',
    layout='btio',
    fits=_taps_differ,
  ),
  _convolution(
    _IN_STACK + _CONVOLUTION + _FIRST,
    'Equinox: eqx.filter_vmap',
    layout='boi*t',
  ),
  _convolution(
    _IN_STACK + _CONVOLUTION + _FIRST,
    'Equinox: eqx.filter_vmap',
    layout='boit',
    fits=_last_taps_differ,
  ),
  _convolution(
    _CONVOLUTION + _LAST,
    'flax: Conv_0, conv_init; dm-haiku: initial_conv; big_vision: stem,'
    ' conv_root; transformers: convolution, conv1; EasyDeL: conv1; diffusers:'
    ' conv_in, conv_shortcut; Scenic: downsample_layers.1.1; Bonsai: dwconv,'
    ' downsample_layers/1, downsamplers',
    layout='*io',
  ),
  _convolution(_CONVOLUTION + _FIRST, 'Equinox, haliax, PyTorch', layout='oi*'),
  _convolution(
    r'.*/attentions_\d+/proj_(in|out)/kernel',
    'diffusers: FlaxTransformer2DModel',
    layout='**io',
  ),
  Row(
    'embedding',
    'embedding',
    _word('[a-z]*embed[a-z]*|embs?|posembs?|wte|wpe|vocab|vocabulary'),
    'flax, T5X, MaxText: embedding; Tunix, big_vision: input_embedding;'
    ' EasyDeL, transformers: embed_tokens, wte, wpe; flax lm1b: posembed_output'
    '; dm-haiku: pos_embs',
  ),
  # Key, query and value [d, heads, head_dim].
  _attention(
    r'.*/(query|key|value|qkv_proj|wq_b|wkv_b)(/kernel)?',
    'flax MultiHeadDotProductAttention, nnx.MultiHeadAttention, big_vision, T5X'
    '; MaxText: also qkv_proj, wq_b, wkv_b',
    layout='ioo',
    fits=_first_is_longer,
  ),
  _attention(
    r'.*/[qkv]_proj/(w|kernel)',
    'Tunix: Llama 3, Qwen 2, Qwen 3',
    layout='ioo',
    fits=_first_is_longer,
  ),
  # Key, query and value [heads, d, head_dim]; kv_einsum and qkv_einsum have a
  # further axis of 2 or 3 matrices in front.
  _attention(
    r'.*/(q|k|v|kv|qkv)_einsum(/(w|kernel))?',
    'Tunix: Gemma, Gemma 3, Gemma 4; flax gemma; big_vision: ppp/gemma.py',
    layout='oio',
  ),
  # Output projections [heads, head_dim, d].
  _attention(
    r'.*/attn_vec_einsum(/(w|kernel))?',
    'Tunix: Gemma, Gemma 3, Gemma 4; flax gemma; big_vision: ppp/gemma.py',
    layout='iio',
  ),
  _attention(
    '.*/' + _OUT,
    'flax MultiHeadDotProductAttention, nnx.MultiHeadAttention, big_vision, T5X'
    '; MaxText; Tunix: o_proj',
    layout='iio',
    fits=_joins_to_width,
  ),
  # If heads times head_dim is not d, three axes may also be a stack [layers,
  # in, out] with fewer inputs than outputs. A path with the index of a layer is
  # not a stack.
  _attention(
    rf'.*([_/]\d+/(.*/)?{_IN_ATTENTION}|/(self|cross|encoder_decoder)_attention'
    rf'[^/]*/){_OUT}',
    'MaxText: Gemma; Tunix: Qwen 3; flax MultiHeadDotProductAttention',
    layout='iio',
    fits=_heads_are_short,
  ),
  _attention(
    f'.*/{_IN_ATTENTION}{_OUT}',
    'flax MultiHeadDotProductAttention in a scan',
    layout='biio',
    fits=_heads_are_short,
  ),
  # haliax's Linear has the axes (*Out, *In), or (*In, *Out).
  _attention(
    _IN_STACKED + 'q_proj/weight',
    'Levanter: Llama, Qwen (kv_heads, heads of a group, head_dim, d)',
    layout='oooi',
  ),
  _attention(
    _IN_STACKED + '[qkv]_proj/weight',
    'Levanter: Whisper (d, heads, head_dim)',
    layout='ioo',
    fits=_first_is_longer,
  ),
  _attention(
    _IN_STACKED + '([qkv]|q_b|kv_b)_proj/weight',
    'Levanter: Llama, latent attention (heads, head_dim, d)',
    layout='ooi',
  ),
  _attention(
    _IN_STACKED + '(o|out)_proj/weight',
    'Levanter: Llama (d, heads, head_dim)',
    layout='oii',
    fits=_first_is_longer,
  ),
  _attention(
    _IN_STACKED + r'((o|out)_proj|[^/]*attn[^/]*/c_proj)/weight',
    'Levanter: Whisper, GPT-2 (heads, head_dim, d)',
    layout='iio',
  ),
  _attention(
    _IN_STACKED + 'c_attn/weight',
    'Levanter: GPT-2 (d, qkv, heads, head_dim)',
    layout='iboo',
  ),
  # Both kernels of a gated MLP in one array [d, 2, mlp].
  Row(
    'matrix',
    'matrix',
    r'.*/mlp/wi/kernel',
    'MaxText with fused_mlp',
    layout='ibo',
    fits=_first_is_longer,
  ),
)

DEPTHWISE = 'depthwise convolution: one input channel'
"""The label of a convolution with one input channel."""

_OTHER = Row('matrix', 'matrix', '.*', 'any other name')

_SCANNED = (
  r'(.*/)?(wi(_\d)?|wo|gate|query|key|value|out|qkv_proj|wq|w(q|kv)_[ab])'
  r'(/(kernel|bias))?|.*norm.*/(scale|bias)'
)
"""Matches a leaf of a layer of MaxText or T5X."""

STACKS = (
  Stack('.*/stacked/.*', 0, 'haliax: Stacked'),
  Stack('.*/__layer_stack[^/]*/.*', 0, 'dm-haiku: experimental.layer_stack'),
  Stack(
    r'.*/decoder/((dense|moe)_)?(layers|layers_outside_pipeline'
    rf'|scanned_blocks)/(?!\d+/)({_SCANNED})',
    1,
    'MaxText with param_scan_axis=1, the default',
  ),
  Stack(
    rf'.*/(encoder/encoder|decoder/decoder)/({_SCANNED})',
    1,
    'T5X: scalable_t5',
  ),
)


@functools.lru_cache(maxsize=100_000)
def of(path: str, shape: tuple[int, ...]) -> Leaf:
  """Returns the kind of a leaf, and its input and output axes.

  Args:
    path: path of the leaf, its keys joined by '/'.
    shape: shape of the leaf.

  >>> of('attn/q_proj/w', (2048, 32, 64)).axes
  ((0,), (1, 2))
  >>> of('Conv_0/kernel', (3, 3, 64, 128)).axes
  ((0, 1, 2), (3,))
  >>> of('conv/weight', (128, 64, 3, 3)).axes
  ((1, 2, 3), (0,))
  >>> of('blocks/conv/kernel', (12, 3, 3, 64, 128)).axes
  ((1, 2, 3), (4,))
  >>> of('dwconv/kernel', (7, 7, 1, 96)).kind
  'depthwise'
  >>> of('experts/up', (4, 8, 64, 128))
  Leaf(kind='matrix', label='matrix', axes=((2,), (3,)), taps=())
  """
  name = _snake(path)
  stack = _stack_axis(name, shape)
  free = [axis for axis in range(len(shape)) if axis != stack]
  rest = [shape[axis] for axis in free]
  for row in (*ROWS, _OTHER):
    if re.fullmatch(row.names, name) and _applies(row, rest):
      break
  if len(rest) < 2:
    # A stack of vectors has two axes: an option may select it as a matrix.
    free = list(range(len(shape)))
  axes = _axes(row.layout, free)
  if row.kind != 'convolution':
    return Leaf(row.kind, row.label, axes)
  taps = _axes_of('t*', row.layout, free)
  channels = [shape[axis] for axis in axes[0] if axis not in taps]
  if channels == [1] and not row.never_depthwise:
    return Leaf('depthwise', DEPTHWISE, axes, taps)
  return Leaf(row.kind, row.label, axes, taps)


def is_vector(path: str) -> bool:
  """Whether a path names a norm, a scale or a bias.

  >>> is_vector('blocks/attention/q_bias'), is_vector('biased/kernel')
  (True, False)
  """
  return _is_named(path, 'vector')


def is_head(path: str) -> bool:
  """Whether a path names the output head of a model.

  >>> is_head('lm_head/kernel'), is_head('heads/0')
  (True, False)
  >>> is_head('output/kernel'), is_head('layer/0/output/dense/kernel')
  (True, False)
  """
  return _is_named(path, 'head')


def is_embedding(path: str) -> bool:
  """Whether a path names an embedding.

  >>> is_embedding('wte/embedding'), is_embedding('mlp/up/kernel')
  (True, False)
  """
  return _is_named(path, 'embedding')


def _is_named(path: str, kind: Kind) -> bool:
  """Whether the names of a row of this kind match, whatever the shape is."""
  name = _snake(path)
  rows = [row for row in ROWS if row.kind == kind]
  return any(re.fullmatch(row.names, name) for row in rows)


def _snake(path: str) -> str:
  """Returns a path in snake case, with '/' in front.

  >>> _snake('LayerNorm_1/scale')
  '/layer_norm_1/scale'
  """
  return '/' + re.sub(r'(?<=[a-z])(?=[A-Z])', '_', path).lower()


def _applies(row: Row, shape: Shape) -> bool:
  """Whether a row whose names match applies to a leaf of this shape."""
  if len(shape) < len(row.layout):
    return False
  return row.fits is None or row.fits(shape)


def _stack_axis(name: str, shape: Shape) -> int | None:
  """Returns the axis of the layers, or None if no name states it."""
  for stack in STACKS:
    if len(shape) > stack.axis and re.fullmatch(stack.names, name):
      return None if stack.axis and _leads(name, shape) else stack.axis
  return None


def _leads(name: str, shape: Shape) -> bool:
  """Whether the axis of the layers is 0 although the names suggest 1.

  The layers of MaxText are on axis 0 if it is configured so. An output
  projection is [heads, layers, head_dim, d] or [layers, heads, head_dim, d].
  """
  if len(shape) == 4 and re.fullmatch('.*/out(/kernel)?', name):
    heads, layers, head_dim, width = shape
    return layers * head_dim == width != heads * head_dim
  return shape[0] < shape[1]


def _axes(
  layout: str, free: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns input and output axes among `free`, all axes but that of layers.

  >>> _axes('iio', (0, 2, 3))
  ((0, 2), (3,))
  """
  if len(free) < 2:
    return (), ()
  layout = layout or 'io'
  return _axes_of('it*', layout, free), _axes_of('o', layout, free)


def _axes_of(letters: str, layout: str, free: Sequence[int]) -> tuple[int, ...]:
  """Returns the axes among `free` that have some letters in a layout.

  >>> _axes_of('t*', '*io', (1, 2, 3, 4))
  (1, 2)
  """
  num = len(free)
  # The first '*' stands for all additional taps.
  layout = layout.replace('*', 't' * (num - len(layout) + 1), 1)
  found = zip(free, layout.rjust(num, 'b'), strict=True)
  return tuple(axis for axis, letter in found if letter in letters)
