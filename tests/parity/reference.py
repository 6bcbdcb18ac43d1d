"""Helper for tests that compare our models with those of transformers."""


def perturb(model):
  """Adds noise to norms and biases.

  They are initialized to ones and zeros, which would hide mistakes in their
  use.
  """
  import torch  # Only the parity environment has torch.

  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name.lower() or 'bias' in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
