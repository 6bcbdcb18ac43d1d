"""Runs of an older version are read as before, or refused in one line.

The texts below are config.json as version 0.1.0 wrote it. Do not change them: a
field that a later version adds is missing in them and takes its default.
"""

import json
import pathlib
import re
import shutil
import tarfile

import pytest

from models.encoder import EncoderConfig
from models.llama import Llama3Scaling, LlamaConfig
from models.lowrank import Lora
from tests.train import program
from train import evaluate, export, pretrain, report, sample
from train.config import Config, Layerwise
from train.data.chats import Chats
from train.data.labelled import LabelledFiles
from train.data.tokenizer import load as read_tokenizer
from train.engine.command import load
from train.engine.config_json import flatten, from_json
from train.engine.run import Run
from train.method import Galore, Galore8bit
from train.tasks.text import stored_tokenizer

PRETRAINED = """
{"kind": "Config", "model": {"kind": "LlamaConfig", "vocab_size": 320,
"width": 16, "mlp_width": 40, "num_heads": 2, "num_layers": 2,
"num_kv_heads": null, "head_dim": null, "qkv_bias": false, "qk_norm": false,
"window": null, "rope_theta": 10000.0, "rope_scaling": null, "norm_eps": 1e-06,
"tied": false, "init_std": 0.02, "dtype": "float32", "param_dtype": "float32",
"remat": false, "loss_chunk": 512, "attention": "auto"}, "corpus": {"kind":
"TextFiles", "train": "corpus.txt", "validation": null, "separator": "\\n\\n",
"holdout": 0.2}, "optimizer": {"kind": "Galore", "b1": 0.9, "b2": 0.999, "eps":
1e-06, "weight_decay": 0.0, "rank": 4, "gap": 3, "scale": 0.25, "side": "std",
"subspace": "power", "moments": "keep", "targets": null}, "steps": 8,
"learning_rate": 0.01, "batch_size": 4, "sequence_length": 24, "checkpoint":
null, "update": {"kind": "WholeTree"}, "adapter": null, "microbatches": 2,
"warmup": 0.25, "final": 0.1, "cycles": 1, "clip_norm": 1.0, "tokenizer": null,
"norm_growth": null, "max_skipped": 10, "eval_every": 4, "eval_batches": 2,
"save_every": 5, "save_minutes": null, "save_best": false, "seed": 0, "mesh":
{"kind": "Mesh", "data": 1, "fsdp": 1, "tensor": 1}}
"""

TUNED = """
{"kind": "Config", "model": {"kind": "LlamaConfig", "vocab_size": 400,
"width": 16, "mlp_width": 24, "num_heads": 2, "num_layers": 2, "num_kv_heads":
1, "head_dim": null, "qkv_bias": false, "qk_norm": false, "window": 12,
"rope_theta": 500000.0, "rope_scaling": {"kind": "Llama3Scaling", "factor": 8.0,
"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192},
"norm_eps": 1e-05, "tied": true, "init_std": 0.02, "dtype": "bfloat16",
"param_dtype": "bfloat16", "remat": true, "loss_chunk": 512, "attention":
"auto"}, "corpus": {"kind": "Chats", "train": "chats.jsonl", "validation": null,
"holdout": 0.05, "score": "answers", "template": "plain"}, "optimizer": {"kind":
"Galore8bit", "b1": 0.9, "b2": 0.999, "eps": 1e-06, "weight_decay": 0.0,
"block_size": 256, "min_size": 4096, "basis_bits": null, "rank": 4, "gap": 200,
"scale": 1.0, "side": "std", "subspace": "power", "moments": "keep", "targets":
[".*/q/lora_a"]}, "steps": 300, "learning_rate": 1e-05, "batch_size": 8,
"sequence_length": 512, "checkpoint": "DIR", "update": {"kind": "Layerwise",
"clip": "exact", "slices": 1, "weights": "rounded", "accumulate": 1, "sums":
"float32"}, "adapter": {"kind": "Lora", "rank": 8, "alpha": 16.0, "dropout":
0.1, "targets": null, "rest": "frozen", "lomo": 0.0}, "microbatches": 1,
"warmup": 0.1, "final": 0.1, "cycles": 1, "clip_norm": 1.0, "tokenizer": null,
"norm_growth": null, "max_skipped": 10, "eval_every": 50, "eval_batches": null,
"save_every": 300, "save_minutes": 9.5, "save_best": true, "seed": 7, "mesh":
{"kind": "Mesh", "data": 1, "fsdp": 1, "tensor": 1}}
"""

CLASSIFIER = """
{"kind": "Config", "model": {"kind": "EncoderConfig", "vocab_size": 320,
"width": 16, "mlp_width": 32, "num_heads": 2, "num_layers": 2, "num_positions":
66, "family": "roberta", "num_types": 1, "num_labels": 2, "labels": ["bad",
"good"], "pad_id": 1, "dropout": 0.1, "norm_eps": 1e-05, "init_std": 0.02,
"dtype": "float32", "param_dtype": "float32", "remat": false, "attention":
"auto"}, "corpus": {"kind": "LabelledFiles", "train": "a.jsonl", "validation":
null, "texts": ["text"], "label": "label", "metric": "f1", "holdout": 0.1},
"optimizer": {"kind": "Galore", "b1": 0.9, "b2": 0.999, "eps": 1e-06,
"weight_decay": 0.0, "rank": 4, "gap": 500, "scale": 4.0, "side": "std",
"subspace": "svd", "moments": "keep", "targets": ["blocks/mlp/up/kernel"]},
"steps": 60, "learning_rate": 3e-05, "batch_size": 16, "sequence_length": 32,
"checkpoint": "DIR", "update": {"kind": "WholeTree"}, "adapter": null,
"microbatches": 1, "warmup": 0.0, "final": 0.0, "cycles": 1, "clip_norm": null,
"tokenizer": null, "norm_growth": null, "max_skipped": 10, "eval_every": 20,
"eval_batches": null, "save_every": 20, "save_minutes": null, "save_best": true,
"seed": 0, "mesh": {"kind": "Mesh", "data": 1, "fsdp": 1, "tensor": 1}}
"""

EXPECTED = {
  PRETRAINED: (LlamaConfig, Galore),
  TUNED: (LlamaConfig, Galore8bit),
  CLASSIFIER: (EncoderConfig, Galore),
}


def stored(data, prefix=''):
  """Yields the values of a stored config with their dotted names."""
  for name, value in data.items():
    if isinstance(value, dict):
      yield prefix + name, value['kind']
      yield from stored(value, f'{prefix}{name}.')
    elif name != 'kind':
      yield prefix + name, tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize('text', EXPECTED, ids=['text', 'chats', 'labels'])
def test_every_stored_value_is_read(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  config = Run(tmp_path).config()
  model, optimizer = EXPECTED[text]
  assert (type(config.model), type(config.optimizer)) == (model, optimizer)
  values = flatten(config)
  assert {name: values[name] for name, _ in stored(json.loads(text))} == dict(
    stored(json.loads(text))
  )


def test_nested_values_have_their_classes():
  config = from_json(Config, json.loads(TUNED))
  assert config.model.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
  assert config.update == Layerwise(weights='rounded')
  assert config.adapter == Lora(dropout=0.1)
  assert config.corpus == Chats('chats.jsonl', template='plain')
  labelled = from_json(Config, json.loads(CLASSIFIER))
  assert labelled.corpus == LabelledFiles(
    'a.jsonl', texts=('text',), metric='f1'
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'gone': 3}, "unexpected keyword argument 'gone'"),
    (
      {'optimizer': {'kind': 'Galore', 'old_rank': 4}},
      "unexpected keyword argument 'old_rank'",
    ),
    (
      {'optimizer': {'kind': 'GaloreOld'}},
      "optimizer must be of Galore, .*, got 'GaloreOld'",
    ),
    ({'corpus': {'kind': 'Wikipedia'}}, "corpus must be of .* got 'Wikipedia'"),
  ],
)
@pytest.mark.parametrize('name', ['evaluate', 'sample', 'export', 'report'])
def test_a_field_of_another_version_is_one_line(
  tmp_path, capsys, change, message, name
):
  run = tmp_path / 'run'
  run.mkdir()
  text = json.dumps(json.loads(PRETRAINED) | change)
  (run / 'config.json').write_text(text)
  with pytest.raises(SystemExit) as stop:
    {
      'evaluate': lambda: evaluate.main([str(run)]),
      'sample': lambda: sample.main([str(run), '--prompt', 'a']),
      'export': lambda: export.main([str(run), str(tmp_path / 'out')]),
      'report': lambda: report.main([str(run)]),
    }[name]()
  assert stop.value.code == 2
  out, err = capsys.readouterr()
  assert not out and err.count('\n') == 1
  assert f'{run}/config.json is no configuration of this version (' in err
  assert re.search(message, err) and 'the version that wrote it' in err


@pytest.mark.slow
def test_programs_read_a_run_of_an_older_version(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  path = program.write_config(tmp_path)
  options = '--run', 'new', '--steps', '8', '--window', '0'
  assert pretrain.main([path, *options]) == 0
  shutil.copytree('new', 'old')
  text = PRETRAINED.replace('corpus.txt', load(path).corpus.train)
  (tmp_path / 'old/config.json').write_text(text)
  assert Run(tmp_path / 'old').config() == Run(tmp_path / 'new').config()
  capsys.readouterr()
  printed = []
  for run in ('new', 'old'):
    evaluate.main([run])
    sample.main([run, '--prompt', 'the dog', '--num-tokens', '5'])
    export.main([run, f'{run}-out'])
    report.main([run])
    assert pretrain.main([path, '--run', run, '--resume']) == 0
    out, err = capsys.readouterr()
    assert err == ''
    printed.append(out.replace(run, 'RUN'))
  assert printed[0].splitlines()[:4] == printed[1].splitlines()[:4]
  one, other = (
    (tmp_path / f'{run}-out/model.safetensors').read_bytes()
    for run in ('new', 'old')
  )
  assert one == other


# A run of the config of `program`. The version that wrote it trained tokenizers
# with sentencepiece. Do not change it: the expected ids and texts are those of
# that version.
STORED = pathlib.Path(__file__).with_name('older_run.tar.xz')

ODD = 'a\u2581b \u00e9 \U0001f600\n\nZebra  </s> <s> x '

IDS_OF_ODD = (
  *(307, 264, 299, 199, 173, 299, 244, 163, 156, 132, 14, 14, 94, 300, 311),
  *(302, 307, 299, 299, 64, 51, 301, 66, 299, 64, 301, 66, 299, 124, 299),
)


def unpack(directory):
  with tarfile.open(STORED) as file:
    file.extractall(directory, filter='data')


def test_a_stored_sentencepiece_model_has_the_same_ids(tmp_path):
  unpack(tmp_path)
  tokenizer = stored_tokenizer(tmp_path / 'run')
  assert tuple(tokenizer.encode(ODD)) == IDS_OF_ODD
  assert tokenizer.decode(IDS_OF_ODD) == ODD.replace('\u2581', ' ')
  assert tokenizer.bytes_V[list(IDS_OF_ODD)].sum() == len(
    ODD.replace('\u2581', ' ').encode()
  )
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (
    1,
    2,
    320,
  )


@pytest.mark.slow
def test_programs_read_a_stored_run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  config = program.write_config(tmp_path)
  unpack(tmp_path)
  evaluate.main(['run'])
  sample.main(['run', '--prompt', 'the red house', '--num-tokens', '9'])
  assert capsys.readouterr() == (
    'validation: loss 5.2864, perplexity 197.6215, bits per byte 4.1260\n'
    'the red house r somev b r+> dogn\n',
    '',
  )
  export.main(['run', 'out'])
  exported = {file.name for file in pathlib.Path('out').iterdir()}
  assert {'model.safetensors', 'tokenizer.json', 'tokenizer.model'} < exported
  assert tuple(read_tokenizer('out').encode(ODD)) == IDS_OF_ODD
  assert pretrain.main([config, '--run', 'run', '--resume']) == 0
