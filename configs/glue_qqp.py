"""Fine-tunes RoBERTa-base on QQP: do two questions mean the same?

Source, settings, command and memory are as in configs/glue_cola.py.
Expected result: accuracy 91.06 in the GaLore paper (Table 4).
Status: not run yet.
"""

from configs.glue_cola import glue

config = glue(
  'qqp',
  examples=363846,
  labels=('not_duplicate', 'duplicate'),
)
