"""Cost of a compiled program: arithmetic, memory traffic and kernels."""

from collections.abc import Callable
from typing import NamedTuple

from train.plan import program
from train.plan.cards import Gpu
from train.plan.program import Kernel


class Cost(NamedTuple):
  """The kernels of a program, and sums over them."""

  kernels: tuple[Kernel, ...]
  """The kernels that the program runs."""

  @property
  def flops(self) -> float:
    """Flops: two per multiply-add of a matmul, else one per output element.

    The flops inside library solvers are unknown and not counted.
    """
    return sum((k.half_flops + k.flops) * k.times for k in self.kernels)

  @property
  def bytes(self) -> int:
    """Bytes that kernels read and write. Caches may serve some of them."""
    return program.moved(self.kernels)

  @property
  def launches(self) -> int:
    """Number of launches. A kernel in a loop counts once per iteration."""
    return self.count(lambda kernel: True)

  @property
  def fusions(self) -> int:
    """Number of launches of kernels that XLA fused from several operations."""
    return self.count(lambda kernel: kernel.op == 'fusion')

  @property
  def copies(self) -> int:
    """Number of launches of kernels that only copy."""
    return self.count(lambda kernel: kernel.parts == {'copy'})

  @property
  def transposes(self) -> int:
    """Number of launches of kernels that transpose and do no arithmetic."""
    moves = {'transpose', 'copy', 'convert', *program.SLICES}
    return self.count(lambda kernel: 'transpose' in kernel.parts <= moves)

  def count(self, kind: Callable[[Kernel], bool]) -> int:
    """Returns the number of launches of kernels that satisfy `kind`."""
    return sum(kernel.times for kernel in self.kernels if kind(kernel))

  def seconds(self, gpu: Gpu) -> float:
    """Returns a lower bound of the time, used as an estimate.

    Each kernel takes the time of its arithmetic or of its memory traffic,
    whichever is longer, at the public figures of the GPU. Kernels do not
    overlap. The arithmetic rates are those of tensor cores.
    """
    return sum(
      kernel.times
      * max(
        kernel.half_flops / gpu.half_flops + kernel.flops / gpu.flops,
        kernel.bytes / gpu.bandwidth,
      )
      for kernel in self.kernels
    )

  def largest(self, count: int = 5) -> tuple[Kernel, ...]:
    """Returns the kernels that move the most bytes over all their launches."""
    order = sorted(self.kernels, key=lambda k: -k.bytes * k.times)
    return tuple(order[:count])

  def to_json(self) -> dict[str, float]:
    """Returns the sums by name."""
    names = ('flops', 'bytes', 'launches', 'fusions', 'copies', 'transposes')
    return {name: getattr(self, name) for name in names}


def cost_of(text: str) -> Cost:
  """Returns the cost of a program, from the text of `Compiled.as_text()`.

  A refresh of the optimizer's bases is not included; see
  `train.plan.program.kernels`.
  """
  return Cost(program.kernels(text))
