"""Compares kernels counted from a program's text with known costs."""

import jax
import jax.numpy as jnp
import pytest

from train.plan.cards import GPUS
from train.plan.cost import Cost, cost_of
from train.plan.program import Kernel

L, M, K = 5, 32, 48


def compiled(f, *shapes, **options):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(f, **options).lower(*arguments).compile()


def product_flops(text):
  """Returns the flops of the kernels with matmuls."""
  return sum(
    (k.half_flops + k.flops) * k.times
    for k in cost_of(text).kernels
    if k.parts & {'dot', 'custom-call'}
  )


def test_a_loop_counts_as_often_as_it_goes_round():
  def chain(x, ws):
    return jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, ws)[0]

  text = compiled(chain, (M, K), (L, K, K)).as_text()
  assert product_flops(text) == L * 2 * (2 * M * K * K)


def test_loops_in_loops():
  def nested(x, w):
    inner = lambda x, _: (x @ w, None)
    outer = lambda x, _: (jax.lax.scan(inner, x, length=3)[0], None)
    return jax.lax.scan(outer, x, length=4)[0]

  text = compiled(nested, (M, K), (K, K)).as_text()
  assert product_flops(text) == 12 * 2 * M * K * K


def test_without_loops_it_is_what_xla_counts():
  f = lambda x, w: jnp.sum(jnp.exp(x @ w) * 2.0 + x @ w, axis=0)
  program = compiled(f, (M, K), (K, K))
  theirs, ours = program.cost_analysis(), cost_of(program.as_text())
  # XLA counts exponentials separately from flops.
  flops = theirs['flops'] + theirs.get('transcendentals', 0)
  assert ours.flops == pytest.approx(flops, rel=0.02)
  assert ours.bytes == pytest.approx(theirs['bytes accessed'], rel=0.02)


def test_a_slice_of_a_stack_is_no_stack():
  def add(stack, x):
    return jax.lax.fori_loop(0, L, lambda i, s: s.at[i].add(x), stack)

  text = compiled(add, (L, 256, 256), (256, 256), donate_argnums=0).as_text()
  layer = 4 * 256 * 256
  # Each iteration reads and writes a layer and reads x. The rest are counters.
  assert L * 3 * layer <= cost_of(text).bytes < 1.05 * L * 3 * layer


def test_of_a_conditional_the_cheaper_branch():
  def either(due, x):
    return jax.lax.cond(due, lambda: x @ x @ x @ x, lambda: x)

  program = jax.jit(either).lower(True, jnp.zeros((M, M))).compile()
  assert product_flops(program.as_text()) == 0


def test_copies_and_transposes():
  program = compiled(lambda x: (x.T, x), (M, K))
  cost = cost_of(program.as_text())
  # There is one of each, and newer versions of XLA add another copy.
  assert cost.copies + cost.transposes == cost.launches >= 2
  assert cost.bytes == cost.launches * 2 * 4 * M * K


ATTENTION = """
HloModule attention

ENTRY %main (q: bf16[4,256,8,64]) -> bf16[4,8,256,64] {
  %q = bf16[4,256,8,64]{3,2,1,0} parameter(0)
  %y = (bf16[4,8,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={\
"cudnn_fmha_backend_config": {"fmha_scale": 0.125, \
"intermediate_tensor_shape": {"element_type": "BF16", \
"dimensions": ["4", "8", "256", "256"], "tuple_shapes": []}}}
  ROOT %out = bf16[4,8,256,64]{3,1,2,0} get-tuple-element(%y), index=0
}
"""


def test_the_kernel_of_attention():
  (kernel,) = cost_of(ATTENTION).kernels
  # The products Q K^T and P V, of which a causal mask skips half.
  assert kernel.half_flops == 2 * 2 * (4 * 8 * 256 * 256 * 64) / 2
  assert kernel.flops == 0
  assert kernel.bytes == 2 * 2 * (4 * 256 * 8 * 64)


def test_a_kernel_takes_the_longer_of_its_times():
  gpu = GPUS['h100']
  made = lambda half, size: Kernel(
    'x', 'fusion', frozenset(), 'f32[]', half, 0, size, 2
  )
  arithmetic = made(gpu.half_flops, 1)
  memory = made(1, int(3 * gpu.bandwidth))
  assert Cost((arithmetic,)).seconds(gpu) == pytest.approx(2)
  assert Cost((arithmetic, memory)).seconds(gpu) == pytest.approx(2 + 6)


def test_rates_of_float32_are_the_vendor_s():
  known = {'rtx4090': 82.6e12, 'rtx3090': 35.6e12, 'h100': 494.7e12}
  known |= dict.fromkeys(('a100-40', 'a100-80'), 156e12)
  for name, flops in known.items():
    assert GPUS[name].flops == pytest.approx(flops, rel=0.01)
