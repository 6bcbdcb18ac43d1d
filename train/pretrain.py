"""Pre-trains a model: `python -m train.pretrain configs/quickstart.py`.

`train.engine.training` does the work. Finally, the model continues three texts.
"""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import itertools
import json
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from models.llama import Layers, LlamaConfig
from train.engine import training
from train.engine.command import Launch
from train.engine.step import State
from train.engine.task import stored_layers
from train.engine.training import Setup
from train.sample import continuations


def main(argv: Sequence[str] | None = None) -> int:
  """Pre-trains a model; returns the exit code."""
  return training.main(
    sys.argv[1:] if argv is None else argv,
    Launch,
    before=check,
    after=show_samples,
  )


def check(setup: Setup, console: Console) -> None:
  """Raises ValueError unless the model is a language model."""
  del console
  if not isinstance(setup.config.model, LlamaConfig):
    raise ValueError(
      'train.pretrain is for models that write text, got '
      f'{type(setup.config.model).__name__}; train.finetune is for classifiers'
    )


def show_samples(setup: Setup, state: State, console: Console) -> None:
  """Prints how the model continues the beginnings of three held-out texts."""
  config = setup.config
  text = setup.text
  if jax.process_count() > 1:  # each process has only a part of the weights
    return
  documents = text.validation.stream(seed=config.seed, repeat=False)
  prompts = [document[:60] for document in itertools.islice(documents, 3)]
  layers = stored_layers(config)
  assert isinstance(layers, Layers)
  texts = continuations(
    layers,
    state.params,
    text.tokenizer,
    prompts,
    window=config.sequence_length,
    seed=config.seed,
  )
  pairs = list(zip(prompts, texts, strict=True))
  setup.run.samples_path.write_text(json.dumps(pairs, indent=2) + '\n')
  for prompt, said in pairs:
    console.rule('sample', align='left')
    console.print(prompt, style='bold', end='', markup=False, highlight=False)
    console.print(said, markup=False, highlight=False)
  console.rule()


if __name__ == '__main__':
  sys.exit(main())
