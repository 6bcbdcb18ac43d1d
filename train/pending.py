"""Options that presets are about to take themselves, added here until then.

Each function is a preset of `galore_optax`, with an option that configs name.
Once the preset has the option, its function here goes.
"""

import inspect
from typing import Any, Literal

import optax

import galore_optax
from galore_optax.galore import names_options


def _adam(bits: int) -> optax.GradientTransformation:
  tx = galore_optax.scale_by_galore_adam()
  return galore_optax.quantize_state(tx) if bits == 8 else tx


@names_options(of=galore_optax.galore_adamw_8bit)
def galore_adamw_8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  basis_bits: Literal[4, 8] | None = None,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """`galore_adamw` with its moments in blocks of 8 bits.

  Args:
    learning_rate: a number, or a schedule of the step.
    basis_bits: bits of a stored basis; None keeps it in the weights' type.
    **options: those of `galore_adamw_8bit`.
  """
  tx = galore_optax.galore_adamw_8bit(learning_rate, **options)
  if basis_bits is None:
    return tx
  return galore_optax.quantize_bases(tx, bits=basis_bits)


@names_options('inner', 'b1', 'b2', 'eps', of=galore_optax.fira)
def fira(
  learning_rate: optax.ScalarOrSchedule,
  *,
  bits: Literal[8, 32] = 32,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore's Adam, and the rest of the gradient scaled as Adam scaled its part.

  Args:
    learning_rate: a number, or a schedule of the step.
    bits: of Adam's moments.
    **options: those of `fira`.
  """
  return galore_optax.fira(learning_rate, inner=_adam(bits), **options)


@names_options('inner', 'b1', 'b2', 'eps', of=galore_optax.apollo)
def apollo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  bits: Literal[8, 32] = 32,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """The raw gradient, scaled by channel as Adam scales a random sketch of it.

  Args:
    learning_rate: a number, or a schedule of the step.
    bits: of Adam's moments.
    **options: those of `apollo`.
  """
  return galore_optax.apollo(learning_rate, inner=_adam(bits), **options)


def _own(name: str, option: str, here: Any) -> Any:
  """Returns the library's preset where it has the option, else the one here."""
  preset = getattr(galore_optax, name)
  return preset if option in inspect.signature(preset).parameters else here


galore_adamw_8bit = _own('galore_adamw_8bit', 'basis_bits', galore_adamw_8bit)
fira = _own('fira', 'bits', fira)
apollo = _own('apollo', 'bits', apollo)
scale_sgd = getattr(galore_optax, 'scale_sgd', None)
galore_muon = getattr(galore_optax, 'galore_muon', None)
