"""Chooses the pages of the site that `make docs` builds.

MkDocs calls `on_config` and `on_files`. Every page is a Markdown file of the
repository at its own path, so that relative links work as they do in the
repository, or a reference page made from the modules of a package.
"""

import ast
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]

READMES = {
  'Overview': 'README.md',
  'Library': 'galore_optax/README.md',
  'Training program': 'train/README.md',
  'Models': 'models/README.md',
  'Configs': 'configs/README.md',
  'Tests': 'tests/README.md',
}
"""Titles and paths, in the order of the navigation."""

PACKAGES = ('galore_optax', 'models', 'train')
"""Packages that have reference pages."""

LINK = re.compile(r'\]\((?!\w+:|#)([^)\s#]+)')
"""Target of a relative Markdown link or image."""


def texts():
  """Returns the Markdown files that become pages, by title."""
  results = sorted(
    [
      *ROOT.glob('configs/studies/results/*.md'),
      *ROOT.glob('tests/bench/results/*.md'),
    ],
    key=lambda path: path.stem,
  )
  return {
    **READMES,
    'Results': {path.stem: str(path.relative_to(ROOT)) for path in results},
    'Changelog': 'CHANGELOG.md',
  }


def modules(package):
  """Returns the dotted names of a package's modules, sorted."""
  paths = sorted((ROOT / package).rglob('*.py'))
  names = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in paths]
  return sorted(name.removesuffix('.__init__') for name in names)


def reference(name):
  """Returns the path of a module's page on the site."""
  return f'reference/{name}.md'


def page(name):
  """Returns the page of a module, with links to the names that it exports."""
  init = ROOT / name.replace('.', '/') / '__init__.py'
  links = [
    # Optional: a second name of a class has no entry on a page.
    f'<autoref identifier="{node.module}.{alias.name}" optional>'
    f'<code>{alias.asname}</code></autoref>'
    for node in (ast.parse(init.read_text()).body if init.exists() else ())
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.asname
  ]
  exported = f'Exported names: {", ".join(links)}.\n' if links else ''
  return f'# {name}\n\n::: {name}\n\n{exported}'


def entries(paths):
  """Returns titles and paths in the form of MkDocs' navigation."""
  return [{title: path} for title, path in paths.items()]


def on_config(config):
  """Sets the navigation, which follows the files of the repository."""
  pages = [
    {title: entries(found) if isinstance(found, dict) else found}
    for title, found in texts().items()
  ]
  api = [
    {package: entries({name: reference(name) for name in modules(package)})}
    for package in PACKAGES
  ]
  config.nav = [*pages, {'Reference': api}]
  return config


def on_files(files, config):
  """Adds the pages, and every other file that one of them links to."""

  def add(path):
    if path not in files.src_uris:
      source = str(ROOT / path)
      files.append(File.generated(config, path, abs_src_path=source))

  paths = [
    path
    for found in texts().values()
    for path in (found.values() if isinstance(found, dict) else [found])
  ]
  for path in paths:
    add(path)
  for path in paths:
    for link in LINK.findall((ROOT / path).read_text()):
      target = (ROOT / path).parent / link
      if target.is_file() and target.resolve().is_relative_to(ROOT):
        add(str(target.resolve().relative_to(ROOT)))
  for package in PACKAGES:
    for name in modules(package):
      text = page(name)
      files.append(File.generated(config, reference(name), content=text))
  return files
