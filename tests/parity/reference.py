"""What the models of transformers are compared with have in common."""


def perturb(model):
  """Moves norms and biases, which begin where nothing shows a mistake."""
  import torch  # of the parity environment alone

  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name.lower() or 'bias' in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
