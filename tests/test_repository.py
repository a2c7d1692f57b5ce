"What the repository promises about itself: one place for every fact, nothing that belongs to one machine."
import ast
import base64
import configparser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from gac.core.environment import requirements
from gac.core.files import root
from gac.core.parameters import check_value, notebook_parameters, read_notebook
from gac.runner.execute import strip_widgets
from gac.runner.layers import layer_violations
from gac.runner.page import render_readme
from gac.runner.profiles import check_parameters, load_profile, profiles

ROOT = root()
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
STAGES = [p for p in NOTEBOOKS if p.parent.name == 'nbs' and re.match(r'\d\d_', p.name)]
MODULES = sorted((ROOT/'gac').rglob('[!_]*.py'))
SKIP = {'.git', '.venv', '.pytest_cache', '.hypothesis', '__pycache__', '.ipynb_checkpoints', 'gac.egg-info', 'runs',
        'build', 'dist'}

def committed() -> list[Path]:
    "Return the files of the repository as git lists them, or all that are not ignored by name."
    done = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode == 0 and done.stdout:
        return [p for n in done.stdout.split('\0') if n and (p := ROOT/n).is_file()]
    found = (p for p in ROOT.rglob('*') if p.is_file() and not SKIP & set(p.relative_to(ROOT).parts))
    return [p for p in found if 'data/real' not in p.as_posix() and 'reports/smoke' not in p.as_posix()]

def settings() -> configparser.SectionProxy:
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    return ini['DEFAULT']

def canonical(name:str) -> str: return re.sub(r'[-_.]+', '-', re.split(r'[<>=!~;\[ ]', name)[0]).lower()

@pytest.fixture(scope='module')
def copy(tmp_path_factory) -> Path:
    "Export the modules from a copy of the notebooks and settings."
    new = tmp_path_factory.mktemp('copy')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT/name, new/name)
    shutil.copytree(ROOT/'nbs', new/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_*'))
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=new, check=True)
    return new

def test_export_in_sync(copy):
    kept, made = ({p.relative_to(at/'gac').as_posix(): p.read_text() for p in (at/'gac').rglob('*.py')}
                  for at in (ROOT, copy))
    assert sorted(kept) == sorted(made), 'run nbdev_export'
    for name in made.keys() - {n for n in made if n.endswith('__init__.py')}:
        assert kept[name] == made[name], f'gac/{name} is not what its notebook exports: run nbdev_export'
    others = [p.name for p in (ROOT/'gac').rglob('*')
              if p.is_file() and p.suffix != '.py' and p.parent.name not in ('__pycache__', 'templates')]
    assert all((p.parent/'__init__.py').exists() for p in MODULES), 'setup finds packages by their __init__.py'
    assert not others, f'gac/ holds exported modules and templates, nothing else: {others}'
    assert (copy/'pyproject.toml').read_text() == (ROOT/'pyproject.toml').read_text()

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(copy, path):
    assert path.read_text() == (copy/path.relative_to(ROOT)).read_text(), f'{path.name} is not clean: run nbdev_clean'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small_and_whole(path):
    assert path.stat().st_size < 1_000_000, f'{path.name} has {path.stat().st_size/1e6:.1f} MB'
    cells = json.loads(path.read_text())['cells']
    first = ''.join(cells[0]['source'])
    assert re.match(r'# .+\n+> .+', first), f'{path.name} begins with "# Name" and a "> summary"'
    for c in cells:
        assert not [o for o in c.get('outputs', []) if o['output_type'] == 'error'], f'{path.name} keeps an error'
        text = ' '.join(''.join(o.get('text', '')) for o in c.get('outputs', []))
        assert not re.search(r'\b0%\|', text), f'{path.name} keeps a bar that stands still'
    assert json.loads(path.read_text()) == strip_widgets(json.loads(path.read_text())), (
        f'{path.name} keeps widgets that are dead: study.still leaves their pictures')

class _Bound(ast.NodeVisitor):
    "Names that a cell binds at its top."
    def __init__(self): self.names = set()
    def visit_FunctionDef(self, node): self.names.add(node.name)
    visit_ClassDef = visit_FunctionDef
    def visit_Lambda(self, node): pass
    visit_ListComp = visit_DictComp = visit_SetComp = visit_GeneratorExp = visit_Lambda
    def visit_Name(self, node): self.names |= {node.id} if isinstance(node.ctx, ast.Store) else set()

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_the_names_it_exports(path):
    "A cell that binds the name of an exported function or of a parameter takes it from the cells below."
    exported = set()
    for c in read_notebook(path)['cells']:
        if c['cell_type'] != 'code': continue
        source = re.sub(r'(?m)^\s*[%!].*$', '', ''.join(c['source']))
        bound = _Bound()
        bound.visit(ast.parse(source))
        if 'parameters' in c['metadata'].get('tags', []):
            exported |= set(notebook_parameters(path))
            continue
        if source.startswith('#| export'):
            exported |= {n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        else:
            assert not bound.names & exported, (f'{path.name}, cell {c["id"]} binds {bound.names & exported}, '
                                                f'which the notebook exports or takes as a parameter')

@pytest.mark.parametrize('path', STAGES, ids=lambda p: p.stem)
def test_stage_parameters(path):
    declared = notebook_parameters(path)  # raises unless exactly one cell is tagged
    first = [(p.name, p.kind, p.default) for p in declared.values()][:5]
    assert (first == [('profile', 'str', 'smoke'), ('seed', 'int', 0), ('run_dir', 'str', ''),
                      ('reports_dir', 'str', ''), ('data', 'str', '')])
    for p in declared.values():
        assert p.help, f'{path.name}: {p.name} has no comment'
        assert check_value(p, p.default, path.name) == p.default

def test_profiles_fit_the_notebooks():
    declared = {p.stem: notebook_parameters(p) for p in STAGES}
    assert {'smoke', 'mini', 'paper'} <= set(profiles())
    for name in ('smoke', 'mini', 'paper'): check_parameters(declared, load_profile(name), where=f'{name}.yaml')

def test_modules_import_downhill():
    assert layer_violations() == {}
    for path in MODULES:
        source = path.read_text()
        stars = [n.module for n in ast.walk(ast.parse(source))
                 if isinstance(n, ast.ImportFrom) and n.names[0].name == '*']
        assert not stars, f'{path.name}: import * from {stars}'

def test_lock_follows_settings():
    pins = [line for line in (ROOT/'requirements.lock').read_text().splitlines() if line and not line.startswith('#')]
    assert all(re.match(r'[A-Za-z0-9_.-]+==[^ ]+( ; .+)?$', line) for line in pins), ('every line pins one package, '
                                                                                      'without an address')
    assert not [line for line in pins if re.match(r'nvidia-|cuda-|triton', line)], ('torch brings its own accelerator '
                                                                                    'runtime')
    from packaging.requirements import Requirement
    locked = {}
    for line in pins: locked.setdefault(canonical(line), []).append(re.split(r'==| ;', line)[1].strip())
    for r in map(Requirement, requirements()):
        assert canonical(r.name) in locked, f'{r.name} is not in requirements.lock: make lock'
        assert all(r.specifier.contains(v) for v in locked[canonical(r.name)]), (
            f'{r} against {locked[canonical(r.name)]}: make lock')

def test_environment_and_package_follow_settings():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())
    pip = next(d['pip'] for d in env['dependencies'] if isinstance(d, dict))
    assert pip == ['-r requirements.lock', '-e .']
    python = next(d for d in env['dependencies'] if isinstance(d, str) and d.startswith('python='))
    assert python == f'python={settings()["min_python"]}'
    assert settings()['version'] in (ROOT/'gac'/'__init__.py').read_text()
    assert f'version: {settings()["version"]}' in (ROOT/'CITATION.cff').read_text()
    assert settings()['allowed_cell_metadata_keys'] == 'tags'
    assert 'Apache License' in (ROOT/'LICENSE').read_text()

def test_imported_packages_are_required():
    "All imports of gac are named in settings.ini; planetary-computer is optional, and its absence is explained."
    required = {canonical(r) for r in requirements()}
    alias = {'yaml': 'pyyaml', 'sklearn': 'scikit-learn', 'odc': 'odc-stac'}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                     if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in {n.split('.')[0] for n in names} - set(sys.stdlib_module_names) - {'gac', 'numpy', 'requests',
                                                                                           'planetary_computer'}:
                assert canonical(alias.get(name, name)) in required, (f'{path.name} imports {name}, which settings.ini '
                                                                      f'does not name')

def test_readme_is_the_index_notebook():
    text = (ROOT/'README.md').read_text()
    assert text == render_readme(), 'README.md is not nbs/index.ipynb: make readme'
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        assert link.startswith('http') or (ROOT/link).exists(), f'README.md links {link}, which is not there'

def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT/'Makefile').read_text(), re.M))
    named = set(re.findall(r'make ([a-z]+(?:-[a-z]+)?)\b',
                           '\n'.join(re.findall(r'(?s)```.*?```|`[^`]+`', (ROOT/'README.md').read_text()))))
    assert named and named <= targets, named - targets
    assert 'make test' in (ROOT/'.ci'/'run').read_text() and os.access(ROOT/'.ci'/'run', os.X_OK)

# folders of a machine and addresses of package indices, written so that this file holds none
MACHINE = re.compile('|'.join([r'/(?:ho' r'me|Us' r'ers|ro' r'ot|op' r't|wo' r'rk)/[\w.-]+', r'/t' r'mp/\w',
                               r'[A-Z]:\\\\Us' r'ers', r'/va' r'r/folders', r'--(?:extra-)?ind' r'ex-url [^-\s]',
                               r'find-li' r'nks', r'file:/' r'//', r'site-pack' r'ages/']))

def test_nothing_of_one_machine():
    for path in committed():
        if path.suffix in ('.png', '.safetensors', '.npz', '.parquet'): continue
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.ipynb': text = re.sub(r'"image/(png|jpeg)": "[^"]*"', '', text)
        found = MACHINE.search(text)
        assert not found, f'{path.relative_to(ROOT)}: {text[max(0, found.start() - 40):found.end() + 20]!r}'

def test_weights_are_small_and_have_cards():
    files = [p for p in committed() if p.suffix in ('.safetensors', '.pt', '.ckpt', '.bin')]
    assert all(p.parent in (ROOT/'data'/'weights'/'mini', ROOT/'data'/'weights'/'next') and p.suffix == '.safetensors'
               for p in files), (files)
    for folder in ('mini', 'next'): assert sum(p.stat().st_size for p in files if p.parent.name == folder) <= 30e6
    for p in files: assert json.loads(p.with_suffix('.json').read_text()), f'{p.name} has no card'

def test_committed_files_are_few_and_known():
    "Nothing at the top that the house does not name."
    known = {'README.md', 'Makefile', 'settings.ini', 'setup.py', 'pyproject.toml', 'environment.yml',
             'requirements.lock', 'LICENSE', 'CITATION.cff', '.gitignore', 'nbs', 'gac', 'data', 'reports', 'tests',
             '.ci', '.github', 'docs'}
    assert {p.relative_to(ROOT).parts[0] for p in committed()} <= known
    folders = {p.relative_to(ROOT).parts[1] for p in committed() if p.relative_to(ROOT).parts[0] == 'data'
               and len(p.relative_to(ROOT).parts) > 2}
    assert folders <= {'weights'}

def test_torchvision_is_mended_only_where_it_is_broken():
    "gac decides whether `import torchvision` works here; another process has not been touched by this one."
    code = ("import gac\nimport torchvision, torch\nassert hasattr(torch.ops.torchvision, 'nms')\n"
            "from torchvision.transforms import functional as F\nprint(F.hflip(torch.arange(3)[None]).tolist())")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == '[[2, 1, 0]]', done.stderr

def test_study_imports_light():
    code = ("import sys; import gac.core.run, gac.runner.chain; print(sorted({'torch', 'pandas', 'matplotlib', "
            "'papermill'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == '[]'

@pytest.mark.parametrize('path', sorted(p for p in committed() if p.parent.name == 'notebooks'),
                         ids=lambda p: f'{p.parent.parent.name}-{p.stem}')
def test_pictures_of_an_executed_notebook_are_whole(path):
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        for out in cell.get('outputs', []):
            if 'image/png' in out.get('data', {}):
                Image.open(io.BytesIO(base64.b64decode(''.join(out['data']['image/png']).strip(),
                                                       validate=True))).verify()

@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'lib').rglob('[!.]*.ipynb')),
                         ids=lambda p: p.relative_to(ROOT/'nbs'/'lib').as_posix())
def test_links_of_the_library_lead_somewhere(path):
    text = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells']
                     if c['cell_type'] == 'markdown')
    lost = [t for t in re.findall(r'\]\(([^)#\s]+)\)', text) if '://' not in t and not (path.parent/t).exists()]
    assert not lost, f'{path.name} links {lost}'
