"""End-of-text tokens in the files of an exported checkpoint."""

import json

import pytest

from tests.train.data.tiny import CHATML, VICUNA, write
from train.data.tokenizer import load
from train.tasks.text_export import write_ends

IDS = {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}


def make(tmp_path, template=CHATML, files=()):
  """Writes a tokenizer and further JSON files, and returns the tokenizer."""
  write(tmp_path, template)
  for name, fields in dict(files).items():
    (tmp_path / name).write_text(json.dumps(fields))
  return load(tmp_path)


def fields(path):
  return json.loads(path.read_text())


def test_an_answers_end_is_the_eos(tmp_path):
  token = {'content': '<|endoftext|>', 'lstrip': False}
  files = {
    'generation_config.json': {'eos_token_id': 0, 'top_k': 3},
    'special_tokens_map.json': {'eos_token': token, 'pad_token': 'x'},
    'config.json': {'eos_token_id': 0, 'model_type': 'llama'},
  }
  write_ends(tmp_path, make(tmp_path, CHATML, files), is_chat=True)
  assert fields(tmp_path / 'generation_config.json') == {
    **{'eos_token_id': [2, 0], 'top_k': 3}
  }
  assert fields(tmp_path / 'special_tokens_map.json') == {
    **{'eos_token': {**token, 'content': '<|im_end|>'}, 'pad_token': 'x'}
  }
  assert fields(tmp_path / 'tokenizer_config.json')['eos_token'] == '<|im_end|>'
  assert fields(tmp_path / 'config.json')['eos_token_id'] == 2


def test_a_run_of_texts_keeps_its_eos(tmp_path):
  write_ends(tmp_path, make(tmp_path), is_chat=False)
  config = fields(tmp_path / 'tokenizer_config.json')
  assert config['eos_token'] == '<|endoftext|>'
  # Sampling from the run stops at either token.
  ends = fields(tmp_path / 'generation_config.json')['eos_token_id']
  assert set(ends) == {0, 2}


@pytest.mark.parametrize('known', [2, [0, 2], [2, 0]])
def test_files_that_are_right_stay_as_they_are(tmp_path, known):
  files = {
    'generation_config.json': {'eos_token_id': [0, 2]},
    'config.json': {'eos_token_id': known},
  }
  tokenizer = make(tmp_path, CHATML, files)
  config = tmp_path / 'tokenizer_config.json'
  settings = {**fields(config), 'eos_token': '<|im_end|>'}
  config.write_text(json.dumps(settings, indent=7))
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  write_ends(tmp_path, tokenizer, is_chat=True)
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_token_behind_an_answer_changes_nothing(tmp_path):
  write_ends(tmp_path, make(tmp_path, VICUNA), is_chat=True)
  assert fields(tmp_path / 'generation_config.json') == {'eos_token_id': 0}
  config = fields(tmp_path / 'tokenizer_config.json')
  assert config['eos_token'] == '<|endoftext|>'
