"""Fine-tunes RoBERTa-base on MRPC: do two sentences mean the same?

Source, settings, command and memory are as in configs/glue_cola.py.
Expected result: F1 92.25 in the GaLore paper (Table 4).
Status: not run yet.
"""

from configs.glue_cola import glue

config = glue(
  'mrpc',
  examples=3668,
  labels=('not_equivalent', 'equivalent'),
  metric='f1',
  learning_rate=3e-5,
)
