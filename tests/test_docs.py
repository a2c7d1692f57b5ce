"The documentation: every command it names exists, nothing is left out, and the site is built without a warning and without a broken link."
import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from gac.cli import COMMANDS, parser
from gac.cli.study import yaml_pairs
from gac.core.files import root
from gac.core.parameters import notebook_parameters
from gac.runner.layers import all_modules
from gac.runner.plan import chain_notebooks
from gac.runner.profiles import check_parameters, load_profile, profiles

ROOT = root()
PAGES = [ROOT/'README.md', *sorted((ROOT/'docs').rglob('*.md'))]
STAGES = {p.stem: notebook_parameters(p) for p in chain_notebooks(ROOT/'nbs')}

def collect():
    "docs/collect.py, which is no module of the package."
    spec = importlib.util.spec_from_file_location('collect', ROOT/'docs'/'collect.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def commands(text:str) -> list[str]:
    "The `gac …` commands of fenced blocks, whole."
    blocks = '\n'.join(re.findall(r'(?ms)^```sh\n(.*?)^```', text)).replace('\\\n', ' ')
    return re.findall(r"(?m)(?<![\w=./-])(?:\.venv/bin/)?gac ([^#&|;'\n]+)", blocks)

def leaf(words:list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    "The parser of the command the words begin with, and what follows."
    p = parser()
    while words and (sub := next((a for a in p._actions if isinstance(a, argparse._SubParsersAction)), None)):
        if words[0] not in sub.choices: break
        p, words = sub.choices[words[0]], words[1:]
    return p, words

def check_sets(words:list[str], where:str) -> None:
    "Parameters given with --set are declared, and their values fit."
    sets = [words[i + 1] for i, w in enumerate(words) if w == '--set']
    check_parameters(STAGES, {}, yaml_pairs([s for s in sets if '=' in s]), where)

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_exist(page, capsys):
    text = page.read_text(encoding='utf-8')
    for line in commands(text):
        words = shlex.split(re.sub(r'\$\w+', '1', line))
        try: args = parser().parse_args(words)
        except SystemExit as e: assert not e.code, f'{page.name}: gac {line}: {capsys.readouterr().err}'
        else:
            if getattr(args, 'profile', ''): load_profile(args.profile)
        check_sets(words, page.name)
    for span in re.findall(r'`(?:\.venv/bin/)?gac ([a-z][^`…]*)`', re.sub(r'(?ms)^```.*?^```', '', text)):
        p, rest = leaf(shlex.split(span))
        assert p.prog != 'gac', f'{page.name}: `gac {span}` is no command'
        unknown = [w for w in rest if w.startswith('--') and w not in p._option_string_actions]
        assert not unknown, f'{page.name}: `gac {span}` has no option {unknown}'
        check_sets(rest, page.name)

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_options_exist(page):
    "Options that stand by themselves belong to some command."
    known = {o for f, options in COMMANDS.values() for names, _ in options
             for o in names} | {'--help', '--no-early-stopping', '--help-notebook', '--config'}
    named = {w for span in re.findall(r'`(--[^`]+)`', page.read_text(encoding='utf-8')) for w in span.split()
             if w.startswith('--')}
    assert named <= known, named - known

@pytest.mark.parametrize('page', [*PAGES, ROOT/'.github'/'workflows'/'test.yml'], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_make_targets_exist(page):
    targets = set(re.findall(r'(?m)^([a-z-]+):', (ROOT/'Makefile').read_text(encoding='utf-8')))
    text = page.read_text(encoding='utf-8')
    places = [text] if page.suffix == '.yml' else re.findall(r'(?s)```sh.*?```|`[^`]+`', text)
    named = {t for p in places for t in re.findall(r'(?m)(?:^|[`:\n]) ?make ([a-z][a-z-]*)', p)}
    assert named <= targets, named - targets

def test_profiles_named_exist():
    for page in PAGES:
        for name in re.findall(r'[Pp]rofiles? `([a-z]+)`', page.read_text(encoding='utf-8')):
            assert name in profiles(), f'{page.name}: {name}'

def test_workflow_runs_the_tests_and_the_documentation():
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yml').read_text(encoding='utf-8'))['jobs']
    assert [s['run'] for s in jobs['test']['steps'] if 'run' in s] == ['make test']
    assert [s['run'] for s in jobs['docs']['steps'] if 'run' in s] == ['make docs']
    assert jobs['test']['strategy']['matrix']['python'] == ['3.11', '3.12', '3.13']

def test_every_notebook_and_module_has_its_place():
    def listed(page, folder, names): # a row of a table of contents may end in *
        rows = re.findall(rf'(?m)^{folder}/([\w./*]+)$', (ROOT/'docs'/page).read_text(encoding='utf-8'))
        found = [n for row in rows for n in sorted(names) if fnmatchcase(n, row)]
        assert set(rows) <= {r for r in rows if any(fnmatchcase(n, r) for n in names)}, f'{page}: a row names nothing'
        return found
    notebooks = {p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in collect().notebooks()} - {'index'}
    found = listed('tutorial.md', 'nbs', notebooks)
    assert set(found) == notebooks
    assert [n for n in found if n in STAGES] == list(STAGES), 'reading order is run order'
    assert listed('api.md', 'api', all_modules()) == all_modules(), 'every module once, by layer'
    pages = {p.stem for p in (ROOT/'docs'/'howto').glob('*.md')}
    assert set(listed('howto.md', 'howto', pages)) == pages

def test_api_pages_say_what_comments_say():
    make = collect()
    for name in all_modules():
        page, module = make.api_page(name), make.Module(name)
        missing = [n for n in module.public if not re.search(rf'(?m)^`+\{{py:\w+\}} {n}\b', page)]
        assert not missing, f'gac.{name}: {missing}'
    page = make.api_page('stages.refiner')
    assert '(B, 4, H, W) reflectance, any size' in page and 'peak learning rate' in make.api_page('training.settings')

def test_hidden_cells_and_directives_are_left_out():
    cell = lambda source, *tags: dict(cell_type='code', source=source, metadata=dict(tags=list(tags)))
    kept = collect().clean(dict(metadata={}, cells=[cell('#| default_exp x'), cell('#| export\nx = 1'), cell('y', 'hide'),
                                                    cell('z', 'hide_input')]))['cells']
    assert [c['source'] for c in kept] == ['x = 1', 'z'] and 'remove-input' in kept[1]['metadata']['tags']

class Links(HTMLParser):
    "Anchors of a page, and what it links."
    def __init__(self, text:str):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key == 'id' or (key, tag) == ('name', 'a'): self.ids.add(value)
            if key in ('href', 'src') and value: self.links.add(value)

@pytest.mark.slow
def test_site_is_whole(tmp_path):
    "Built as `make docs` builds it: no warning, and every link inside the site ends at a file and an anchor that are there."
    source, html = tmp_path/'source', tmp_path/'html'
    collect().collect(source)
    subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-E', '-b', 'html', '-c', ROOT/'docs', source, html], check=True)
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in html.rglob('*.html')}
    broken = []
    for page, found in pages.items():
        for link in found.links:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            to = (page.parent/unquote(url.path)).resolve() if url.path else page
            if not to.exists() or (url.fragment and to in pages and unquote(url.fragment) not in pages[to].ids):
                broken.append(f'{page.relative_to(html)}: {link}')
    assert not broken, broken
    assert {p.relative_to(html).as_posix() for p in pages} >= {'index.html', 'claims.html',
                                                               *(f'api/{n}.html' for n in all_modules())}
    assert not [link for found in pages.values() for link in found.links if re.match(r'https?://[^/]*cdn', link)], 'the pages need no other server'
