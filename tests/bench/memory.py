"""Compares memory figures of papers with values computed from shapes.

`python -m tests.bench.memory` prints the tables and writes them to
tests/bench/results/memory.md. Nothing is measured or allocated. The column 'by
formula' multiplies numbers of elements by the paper's bytes per element. The
column 'here' has the exact bytes that this library stores, with weights in
bfloat16. If a paper's figure differs, the note under the table gives the
reason, or states that none was found.
"""

import functools
import math
import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from galore_optax import describe
from models import encoder
from models.llama import Layers, llama
from train.method import Galore, Galore8bit, Lomo, adam_8bit, adamw
from train.plan.account import Account, account, elements

PAGE = pathlib.Path(__file__).parent / 'results' / 'memory.md'

GB, GIB, MB = 10**9, 2**30, 10**6

RANKS = {'60m': 128, '130m': 256, '350m': 256, '1b': 512}
"""Rank of the GaLore paper's pre-training runs, by model; 7B has rank 1,024."""


class Row(NamedTuple):
  """One memory figure of a paper, and our values for it."""

  what: str
  """Name of the counted quantity."""
  paper: float
  """The figure that the paper prints."""
  formula: float
  """Number of elements times the paper's bytes per element."""
  here: float | None = None
  """Memory that this library needs, or None if it has no such method."""


class Section(NamedTuple):
  """The figures of one table of a paper."""

  title: str
  """The paper's table and the unit."""
  rows: list[Row]
  """Its figures."""
  note: str
  """Reasons for differences, printed under the table."""


class Sizes(NamedTuple):
  """Numbers of elements of a model and its optimizer state."""

  weights: int
  """All parameters."""
  low: int
  """GaLore's bases, its low-rank moments, and Adam's other moments."""
  factors: int
  """Both factors of rank r of all projected matrices."""
  rest: int
  """Parameters that are not projected."""


@functools.cache
def shapes(size: str) -> Any:
  """Returns the shapes of a LLaMA's parameters in bfloat16."""
  formats = {'dtype': 'bfloat16', 'param_dtype': 'bfloat16'}
  return initial(Layers(llama(size, **formats)))


@functools.cache
def roberta() -> Any:
  """Returns the shapes of RoBERTa-base with its head, in bfloat16."""
  config = encoder.EncoderConfig(
    vocab_size=50_265,
    width=768,
    mlp_width=3072,
    num_heads=12,
    num_layers=12,
    num_positions=514,
    family='roberta',
    num_types=1,
    pad_id=1,
    dtype='bfloat16',
    param_dtype='bfloat16',
  )
  return initial(encoder.Layers(config))


def initial(model: Any) -> Any:
  """Returns the shapes of a model's parameters."""
  return jax.eval_shape(model.init, jax.random.key(0))


def kept(params: Any, tx: Any) -> Account:
  """Returns the bytes of weights and optimizer state in this library."""
  return account(params, jax.eval_shape(tx.init, params))


def sizes(params: Any, rank: int, targets: Any = None) -> Sizes:
  """Returns the numbers of elements that the papers' formulas use."""
  tx = Galore(rank=rank, targets=targets).build(0.1)
  found = elements(params, jax.eval_shape(tx.init, params))
  rows = [row for row in describe(tx, params) if row.projected_shape]
  projected = sum(math.prod(row.shape) for row in rows)
  factors = sum(
    math.prod(row.shape[:-2]) * rank * sum(row.shape[-2:]) for row in rows
  )
  low = found.bases + found.moments
  return Sizes(found.weights, low, factors, found.weights - projected)


def split() -> list[Section]:
  """Returns the sections for GaLore's Table 6."""
  models = {size: shapes(size) for size in RANKS}
  counts = {size: sizes(models[size], rank) for size, rank in RANKS.items()}

  def rows(
    what: str,
    paper: Sequence[float],
    formula: Callable[[Sizes], int],
    here: Callable[[str], int] | None = None,
  ) -> list[Row]:
    return [
      Row(
        f'{what}, {size.upper()}',
        figure,
        formula(counts[size]) / GB,
        here and here(size) / GB,
      )
      for size, figure in zip(RANKS, paper, strict=True)
    ]

  def adam(size: str) -> int:
    return kept(models[size], adamw(0.1)).state

  def galore(size: str) -> int:
    return kept(models[size], Galore(rank=RANKS[size]).build(0.1)).state

  def weights(size: str) -> int:
    return 2 * counts[size].weights

  def factored(count: Sizes) -> int:
    return count.rest + count.factors

  table = "GaLore's Table 6"
  return [
    Section(
      f'{table}, full rank (GB)',
      [
        *rows(
          'weights', (0.12, 0.25, 0.68, 2.60), lambda x: 2 * x.weights, weights
        ),
        *rows('Adam', (0.23, 0.51, 1.37, 5.20), lambda x: 4 * x.weights, adam),
      ],
      'The formula has two bytes for a weight and four for its two moments. '
      'Moments are float32 here, so they take eight bytes. The paper counts '
      "1.30e9 elements at 1B, but its model's shape has 1.339e9. Its figures "
      'at 350M, and its weights at 130M, are in GiB.',
    ),
    Section(
      f'{table}, GaLore (GB)',
      rows('GaLore', (0.13, 0.28, 0.54, 1.78), lambda x: 2 * x.low, galore),
      "The paper's formula has m r + 2 n r elements of two bytes, and Adam's "
      'moments for all other weights. It gives more than the paper prints, and '
      'no reason was found: projecting the other side, counting in GiB, or '
      'projecting only the attention does not give its four figures. Moments '
      'are float32 here.',
    ),
    Section(
      f'{table}, low-rank factors (GB)',
      [
        *rows(
          'Low-Rank, weights',
          (0.08, 0.18, 0.36, 1.19),
          lambda x: 2 * factored(x),
        ),
        *rows(
          'Low-Rank and LoRA, Adam',
          (0.17, 0.37, 0.72, 2.38),
          lambda x: 4 * factored(x),
        ),
        *rows(
          'LoRA, weights',
          (0.20, 0.44, 1.04, 3.79),
          lambda x: 2 * (x.weights + factored(x)),
        ),
      ],
      "The paper's weights of LoRA are the sum of the full weights and those "
      'of Low-Rank, so embedding and head are counted twice. The other figures '
      'differ by as much as the model sizes above. The column in Table 2 is '
      'the sum of weights and optimizer state in Table 6.',
    ),
  ]


def largest() -> Section:
  """Returns the section for the memory that GaLore saves at 7B."""
  params = shapes('7b')
  count = sizes(params, 1024)
  adam = 4 * count.weights
  eight = kept(params, Galore8bit(rank=1024).build(0.1)).state
  packed = kept(params, Galore8bit(rank=1024, basis_bits=8).build(0.1)).state
  plain = kept(params, adam_8bit(0.1)).state
  one = 2 * max(math.prod(x.shape[-2:]) for x in jax.tree.leaves(params))

  def with_state(state: int) -> int:
    """Adds weights and the largest gradient of a layer-wise step."""
    return 2 * count.weights + one + state

  def saved(x: float, of: float) -> float:
    return 100 * (1 - x / of)

  rows = [
    Row(
      '8-bit GaLore compared with Adam in bf16: state',
      paper=82.5,
      formula=saved(count.low, adam),
      here=saved(eight, adam),
    ),
    Row(
      '8-bit GaLore compared with 8-bit Adam: state',
      paper=65.5,
      formula=saved(count.low, adam / 2),
      here=saved(eight, plain),
    ),
    Row(
      'layer-wise 8-bit GaLore compared with Adam in bf16: all but activations',
      paper=63.3,
      formula=saved(with_state(count.low), 2 * adam),
      here=saved(with_state(eight), 2 * adam),
    ),
  ]
  return Section(
    'LLaMA 7B at rank 1,024 (percent saved)',
    rows,
    "The paper's abstract counts one byte for each element of a basis. Its "
    'code stores two bytes, and so does this library by default. With '
    f'`basis_bits=8` the first two figures are {saved(packed, adam):.1f} and '
    f'{saved(packed, plain):.1f} here. The third figure of the paper compares '
    '22.0 GB with 59.9 GB, both with activations. Without weights, gradients '
    f'and state by formula, {59.9 - 2 * adam / GB:.1f} GB remain for Adam and '
    f'{22.0 - with_state(count.low) / GB:.1f} GB for GaLore. '
    '[plan.md](plan.md) has the memory of the whole step by the compiler.',
  )


def glue() -> Section:
  """Returns the section for GaLore's Table 4."""
  params, targets = roberta(), ['blocks/.*/kernel']
  adam = kept(params, adamw(0.1)).total / MB
  rows = [Row('Adam', 747, 6 * elements(params, ()).weights / MB, adam)]
  for rank, galore, lora in ((4, 253, 257), (8, 257, 264)):
    count = sizes(params, rank, targets)
    low = count.low - 2 * count.rest
    here = kept(params, Galore(rank=rank, targets=targets).build(0.1))
    whole = 2 * count.weights
    rows += [
      Row(
        f'GaLore, rank {rank}',
        galore,
        (whole + 4 * low) / MB,
        here.total / MB,
      ),
      Row(f'LoRA, rank {rank}', lora, (whole + 12 * count.factors) / MB),
    ]
  return Section(
    "GaLore's Table 4, RoBERTa-base (MB)",
    rows,
    'Weights and optimizer state. For Adam, six bytes per weight give the '
    'figure of the paper. For GaLore and LoRA, these are two bytes per weight, '
    'four per element of a basis or a low-rank moment, and twelve per element '
    "of a factor. The paper's figures for GaLore leave out Adam's moments of "
    'the weights that are not projected, mostly embeddings. The column *here* '
    'contains them, in float32.',
  )


def lomo_table() -> Section:
  """Returns the section for LOMO's Table 1."""
  params = shapes('7b')
  weights = elements(params, ()).weights
  one = max(math.prod(x.shape[-2:]) for x in jax.tree.leaves(params))
  adam = kept(params, adamw(0.1)).state / GIB
  rows = [
    Row('weights', 12.55, 2 * weights / GIB, 2 * weights / GIB),
    Row(
      'gradients, AdamW and SGD', 12.55, 2 * weights / GIB, 2 * weights / GIB
    ),
    Row('gradients, LOMO', 0.24, 2 * one / GIB, 2 * one / GIB),
    Row('state, AdamW', 75.31, 12 * weights / GIB, adam),
    Row('state, SGD', 25.10, 4 * weights / GIB),
    Row('state, LOMO', 0.0, 0.0, kept(params, Lomo().build(0.1)).state / GIB),
  ]
  return Section(
    "LOMO's Table 1, LLaMA 7B (GiB)",
    rows,
    'The formula gives the figures of the paper. Weights and gradients are '
    'bfloat16. AdamW has two moments and a master copy of the weights in '
    'float32; SGD has only the copy. LOMO holds the gradient of the largest '
    'tensor, the embedding. This library has no master copy; it can round sums '
    'stochastically instead. The paper adds 1.79 GiB of activations to each '
    'total.',
  )


def page() -> str:
  """Returns all tables as Markdown."""
  parts = [
    '# Memory figures of papers, compared with shapes\n\n'
    '`python -m tests.bench.memory` computes these tables; nothing is '
    "measured. *By\nformula* is the number of elements times the paper's "
    "bytes per element. *Off* is\nthe paper's figure relative to the formula. "
    '*Here* is the exact memory that this\nlibrary needs.'
  ]
  for section in (*split(), largest(), glue(), lomo_table()):
    note = textwrap.fill(section.note, 80, break_on_hyphens=False)
    parts += [f'## {section.title}', _table(section.rows), note]
  return '\n\n'.join(parts) + '\n'


def _table(rows: Sequence[Row]) -> str:
  lines = [
    'what | paper | by formula | off | here',
    '--- | --: | --: | --: | --:',
  ]
  for row in rows:
    off = f'{100 * (row.paper / row.formula - 1):+.1f}%' if row.formula else '-'
    here = '-' if row.here is None else f'{row.here:.2f}'
    lines.append(
      f'{row.what} | {row.paper:.2f} | {row.formula:.2f} | {off} | {here}'
    )
  return '\n'.join(f'| {line} |' for line in lines)


def main() -> None:
  """Prints the page and writes it."""
  found = page()
  print(found)
  PAGE.write_text(found)


if __name__ == '__main__':
  main()
