"""CoLA: is a sentence acceptable? And what GLUE's other seven tasks share.

Source: Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Table 4
and Appendix D: RoBERTa-base, rank 4, 30 epochs, batch 16, 512 tokens.
Command: python -m train.finetune configs/glue_cola.py --checkpoint DIR
  with DIR a directory of roberta-base, and glue/cola as TFDS prepares it.
Expected memory: 747 MB of weights and AdamW's states, 253 MB with GaLore of
rank 4 (the paper's figures).
Expected number: Matthews' correlation 60.35 (the paper's).
Our number: not yet run, for want of the weights and of the data.
"""

from train.config import Classifier, Config
from train.data.labelled import LabelledTfds, Metric
from train.method import Galore

EPOCHS = 30

TARGETS = (
  *(rf'blocks/attention/{name}/kernel' for name in 'qkvo'),
  *(rf'blocks/mlp/{name}/kernel' for name in ('up', 'down')),
)
"""Query, key, value, intermediate dense and both output dense kernels."""


def glue(
  task: str,
  *,
  examples: int,
  labels: tuple[str, ...] | None,
  metric: Metric = 'accuracy',
  validation: str = 'validation',
  batch_size: int = 16,
  learning_rate: float = 1e-5,
) -> Config:
  """Returns the fine-tuning of a task as in Table 4.

  Args:
    task: as TFDS names it.
    examples: that it is trained on; steps are counted by them.
    labels: their names in order; None is a number to predict.
    metric: of the task, by which the best epoch is found.
    validation: the split to measure.
    batch_size: 16, and 32 for CoLA.
    learning_rate: 1e-5, and 3e-5 for MRPC and CoLA.
  """
  epoch = -(-examples // batch_size)
  return Config(
    model=Classifier(num_labels=len(labels or ['number']), labels=labels),
    corpus=LabelledTfds(f'glue/{task}', validation=validation, metric=metric),
    optimizer=Galore(rank=4, gap=500, scale=4.0, targets=TARGETS),
    steps=EPOCHS * epoch,
    learning_rate=learning_rate,
    batch_size=batch_size,
    sequence_length=512,
    warmup=0.0,
    final=0.0,
    clip_norm=None,
    eval_every=epoch,
    save_every=epoch,
    save_best=True,
  )


config = glue(
  'cola',
  examples=8551,
  labels=('unacceptable', 'acceptable'),
  metric='matthews',
  batch_size=32,
  learning_rate=3e-5,
)
