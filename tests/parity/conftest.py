"""Fixture that makes the PyTorch reference choose the same signs as we do."""

import pytest


@pytest.fixture
def signs_by_rule(monkeypatch):
  """Patches galore_torch to fix the signs of singular vectors with our rule.

  An SVD determines singular vectors only up to sign. Without the same rule, the
  two bases differ in sign and their moments after a refresh cannot be compared.
  """
  projector = pytest.importorskip('galore_torch.galore_projector')
  decompose = projector.GaLoreProjector.get_orthogonal_matrix

  def fixed(columns, old):
    peaks = columns.abs().argmax(dim=0, keepdim=True)
    reference = columns.gather(0, peaks)
    if old is not None:
      reference = (columns * old).sum(dim=0, keepdim=True)
    return columns * reference.sign()

  def signed(self, weights, rank, type):
    new, old = decompose(self, weights, rank, type), self.ortho_matrix
    if type == 'left':
      return fixed(new, old)
    if type == 'right':
      return fixed(new.T, None if old is None else old.T).T
    left, right = (None, None) if old is None else old
    return [
      fixed(new[0], left),
      fixed(new[1].T, None if right is None else right.T).T,
    ]

  monkeypatch.setattr(
    projector.GaLoreProjector, 'get_orthogonal_matrix', signed
  )
