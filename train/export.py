"""Exports a run for transformers: `python -m train.export RUN DIR`."""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from galore_optax.quantized.array import is_quantized
from models import huggingface, lowrank
from models.llama import LlamaConfig
from train.data.chats import has_answers
from train.data.pretrained import CLOCK, TEMPLATE
from train.data.tokenizer import AnyTokenizer
from train.engine import checkpoint
from train.engine.command import add_flag, user_errors
from train.engine.run import Run
from train.engine.task import task_of


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the weights of a run as a directory that transformers reads."""
  parser = argparse.ArgumentParser(
    'python -m train.export', description=main.__doc__
  )
  parser.add_argument('run', type=pathlib.Path, help='directory of the run')
  parser.add_argument('directory', type=pathlib.Path, help='directory to write')
  add_flag(
    parser,
    'newest',
    help='export the newest checkpoint (default: the best one, if any was '
    'validated)',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help="data type of the weights (default: the run's)",
  )
  add_flag(
    parser,
    'adapter',
    help="write only the factors of a LoRA, in PEFT's format (default: merge "
    'them into the weights)',
  )
  args = parser.parse_args(argv)
  with user_errors():
    if args.adapter and args.dtype:
      raise ValueError(
        f'--dtype {args.dtype} is of weights, and --adapter writes none: leave '
        'out one of the two'
      )
    export(
      Run(args.run),
      args.directory,
      best=not args.newest,
      dtype=args.dtype,
      factors=args.adapter,
    )
  print(f'written: {args.directory}')


def export(
  run: Run,
  directory: pathlib.Path,
  *,
  best: bool,
  dtype: str | None = None,
  factors: bool = False,
) -> None:
  """Writes config.json, the weights as safetensors, and the tokenizer's files.

  Low-rank factors are merged into the weights. generation_config.json lists all
  tokens that end a text. If the run was trained on chats, the tokenizer's EOS
  is the token that ends an answer.

  Args:
    run: the run.
    directory: where to write; it must not contain a checkpoint.
    best: whether to export the checkpoint with the best validation instead of
      the newest one.
    dtype: data type of the weights; None keeps the run's.
    factors: whether to write only the factors, in PEFT's format.

  Raises:
    FileNotFoundError: the run does not exist, or has no checkpoint.
    FileExistsError: the directory contains a checkpoint.
    ValueError: the run has no factors that could be written by themselves.
  """
  config = run.config()
  adapter = config.adapter
  writes_text = isinstance(config.model, LlamaConfig)
  lora = adapter if writes_text and isinstance(adapter, lowrank.Lora) else None
  if factors and lora is None:
    raise ValueError(
      f'{run.directory} has no factors beside the weights of a language model; '
      'leave out --adapter'
    )
  if not factors:
    huggingface.check_new(directory)
  params = checkpoint.restore_params(
    run.checkpoints_path, task_of(config), best=best
  )
  model = config.resolved_model
  params = jax.tree.map(config.weights().read, params, is_leaf=is_quantized)
  if factors and lora is not None:
    lowrank.save_adapter(directory, params, lora, base=config.checkpoint)
    return
  if adapter is not None:
    params = lowrank.merge(params, adapter)
  if dtype is not None:
    model = dataclasses.replace(model, param_dtype=dtype)
    params = jax.tree.map(lambda w: w.astype(dtype), params)
  huggingface.save(directory, model, params, source=run.source())
  tokenizer = run.tokenizer()
  if run.source() is None:
    tokenizer.save(directory)
    # Remove the run's fixed date: other programs render chats with today's.
    (directory / CLOCK).unlink(missing_ok=True)
  elif writes_text:
    # The run's template may differ from the template of the checkpoint.
    template = tokenizer.files.get(TEMPLATE)
    if template is not None:
      (directory / TEMPLATE).write_bytes(template)
  if writes_text:
    write_ends(directory, tokenizer, is_chat=has_answers(config.corpus))


def write_ends(
  directory: pathlib.Path, tokenizer: AnyTokenizer, *, is_chat: bool
) -> None:
  """Writes the tokens that end a text to the files that list them.

  Args:
    directory: an exported checkpoint.
    tokenizer: the run's tokenizer.
    is_chat: whether the run was trained on answers of chats.
  """
  ids = list(tokenizer.stop_ids)
  template = tokenizer.chat_template
  end = template.end_of_turn if is_chat and template is not None else None
  if end is not None:
    first = tokenizer.specials[end]
    ids = [first, *(i for i in ids if i != first)]
    name = 'tokenizer_config.json'
    change(directory / name, {'eos_token': end}, make=end != eos_of(tokenizer))
    change(directory / 'special_tokens_map.json', {'eos_token': end})
    if first not in ids_of(directory / 'config.json'):
      change(directory / 'config.json', {'eos_token_id': first})
  path = directory / 'generation_config.json'
  if set(ids) != ids_of(path):
    found = ids if len(ids) > 1 else ids[0]
    change(path, {'eos_token_id': found}, make=True)


def eos_of(tokenizer: AnyTokenizer) -> str | None:
  """Returns the text of the tokenizer's EOS token."""
  for text, token in tokenizer.specials.items():
    if token == tokenizer.eos_id:
      return text
  return None


def ids_of(path: pathlib.Path) -> set[int]:
  """Returns the token ids that end a text, according to a JSON file."""
  found = fields_of(path).get('eos_token_id')
  if found is None:
    return set()
  return set(found) if isinstance(found, list) else {found}


def fields_of(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of a JSON file; none if the file does not exist."""
  return json.loads(path.read_bytes()) if path.is_file() else {}


def change(
  path: pathlib.Path, fields: Mapping[str, Any], *, make: bool = False
) -> None:
  """Changes fields of a JSON file; does not write the file if nothing changes.

  Args:
    path: the file.
    fields: new values. If the old value is an object that describes a token,
      only its text changes.
    make: whether to add missing fields, and to create a missing file.
  """
  found = fields_of(path)
  new = {}
  for name, value in fields.items():
    old = found.get(name)
    if isinstance(old, dict) and isinstance(value, str):
      value = {**old, 'content': value}
    if value != old and (name in found or make):
      new[name] = value
  if new:
    path.write_text(json.dumps(found | new, indent=2) + '\n')


if __name__ == '__main__':
  main()
