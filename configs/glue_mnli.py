"""Fine-tunes RoBERTa-base on MNLI: is a hypothesis implied or contradicted?

Source, settings, command and memory are as in configs/glue_cola.py.
Expected result: accuracy 87.00 in the GaLore paper (Table 4).
Status: not run yet.
"""

from configs.glue_cola import glue

config = glue(
  'mnli',
  examples=392702,
  labels=('entailment', 'neutral', 'contradiction'),
  validation='validation_matched',
)
