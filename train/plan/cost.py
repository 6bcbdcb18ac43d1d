"""What a compiled program costs: arithmetic, memory traffic, kernels."""

from typing import Any, NamedTuple

from train.plan import program
from train.plan.cards import Gpu
from train.plan.program import Kernel


class Cost(NamedTuple):
  """The kernels of a program, and what they come to."""

  kernels: tuple[Kernel, ...]

  @property
  def flops(self) -> float:
    """Two for each pair of numbers that meet in a product, else one a result.

    What a solver of a library does is not known, and not among them.
    """
    return sum((k.half_flops + k.flops) * k.times for k in self.kernels)

  @property
  def bytes(self) -> int:
    """Read and written by kernels; caches may hold some of it."""
    return program.moved(self.kernels)

  @property
  def launches(self) -> int:
    """Kernels that run, one in a loop as often as it goes round."""
    return self.count(lambda kernel: True)

  @property
  def fusions(self) -> int:
    """Kernels that XLA made of several operations."""
    return self.count(lambda kernel: kernel.op == 'fusion')

  @property
  def copies(self) -> int:
    """Kernels that do nothing but copy."""
    return self.count(lambda kernel: kernel.parts == {'copy'})

  @property
  def transposes(self) -> int:
    """Kernels that do nothing but transpose, type and place apart."""
    moves = {'transpose', 'copy', 'convert', *program.SLICES}
    return self.count(lambda kernel: 'transpose' in kernel.parts <= moves)

  def count(self, kind: Any) -> int:
    """Returns how often kernels run of which kind(kernel) is true."""
    return sum(kernel.times for kernel in self.kernels if kind(kernel))

  def seconds(self, gpu: Gpu) -> float:
    """Returns an estimate: no kernel can be quicker, nor two at once.

    A kernel takes the time of its arithmetic or that of its bytes, whichever
    is longer, at the card's public figures, which are tensor cores' rates.
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
    """Returns the kernels that move most bytes, all their times together."""
    order = sorted(self.kernels, key=lambda k: -k.bytes * k.times)
    return tuple(order[:count])

  def to_json(self) -> dict[str, float]:
    """Returns the sums by name."""
    names = ('flops', 'bytes', 'launches', 'fusions', 'copies', 'transposes')
    return {name: getattr(self, name) for name in names}


def cost_of(text: str) -> Cost:
  """Returns the cost of an optimized program, `Compiled.as_text()` of JAX's.

  Between two refreshes of an optimizer; see `train.plan.program.kernels`.
  """
  return Cost(program.kernels(text))
