"""Fine-tunes RoBERTa-base on STS-B: how similar are two sentences, 0 to 5?

Source, settings, command and memory are as in configs/glue_cola.py.
Expected result: Pearson correlation 90.73 in the GaLore paper (Table 4).
Status: not run yet.
"""

from configs.glue_cola import glue

config = glue(
  'stsb',
  examples=5749,
  labels=None,
  metric='pearson',
)
