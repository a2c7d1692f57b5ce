"Measure lengths of modules, functions and cells, parameters, docstrings, examples and studies: `python docs/house.py`."
import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# first words of a docstring that states no action
NO_VERB = re.compile(r'(What|Where|Whether|How|One|Every|All|A|An|The|No|Some|Which|Who|It|That|Those|These)\b')

def spread(values:list) -> str: # numbers
    "Return median, 90th percentile and maximum as text."
    values = sorted(values)
    return f'{statistics.median(values):g}, {values[int(.9*(len(values) - 1))]:g}, {values[-1]:g}'

def share(part:int, whole:int) -> str: return f'{part} of {whole} ({part/max(whole, 1):.1%})'

def modules() -> dict[str, str]: # name -> source
    "Return the exported modules."
    return {'.'.join(p.relative_to(ROOT/'gac').with_suffix('').parts): p.read_text(encoding='utf-8')
            for p in sorted((ROOT/'gac').rglob('[!_]*.py'))}

def of_modules() -> dict[str, str]: # measure -> value
    "Measure the modules and their functions."
    sources = modules()
    trees = {name: ast.parse(text) for name, text in sources.items()}
    public = {name: [n for n in t.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                     and not n.name.startswith('_')] for name, t in trees.items()}
    functions = [n for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.FunctionDef)]
    count = lambda f: len([a for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
                           if a.arg not in ('self', 'cls')])
    lines = [l for text in sources.values() for l in text.splitlines() if not l.startswith('__all__')]  # nbdev's own
    told = [n for ns in public.values() for n in ns if isinstance(n, ast.FunctionDef)]
    docs = [ast.get_docstring(n) or '' for n in told]
    return {'modules': str(len(sources)),
            'lines of a module (median, 90 %, max)': spread([len(s.splitlines()) for s in sources.values()]),
            'public definitions of a module': spread([len(ns) for ns in public.values()]),
            'lines of a function': spread([f.end_lineno - f.lineno + 1 for f in functions]),
            'parameters of a function': spread([count(f) for f in functions]),
            'functions of more than 12 parameters': share(sum(count(f) > 12 for f in functions), len(functions)),
            'lines over 120 columns': share(sum(len(l) > 120 for l in lines), len(lines)),
            'public functions with a docstring': share(sum(map(bool, docs)), len(docs)),
            'docstrings that begin with no verb': share(sum(bool(NO_VERB.match(d)) for d in docs), len(docs))}

def code_cells(path:Path) -> list[tuple]: # (source, tags, whether it shows a picture)
    "Return the code cells of a notebook."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    has_picture = lambda c: any(kind.startswith('image/') for o in c['outputs'] for kind in o.get('data', {}))
    return [(''.join(c['source']), c['metadata'].get('tags', []), has_picture(c)) for c in cells
            if c['cell_type'] == 'code']

def is_exported(source:str) -> bool: return bool(re.search(r'(?m)^#\|\s*export', source))

def of_notebooks() -> dict[str, str]: # measure -> value
    "Measure the cells, and the definitions that no example of their own notebook names."
    cells, exported, definitions, lacking = [], [], 0, 0
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        code = [source for source, *_ in code_cells(path)]
        shown = '\n'.join(s for s in code if not is_exported(s) and 'default_exp' not in s)
        cells += [len(s.splitlines()) for s in code]
        for s in filter(is_exported, code):
            exported.append(len(s.splitlines()))
            names = [n.name for n in ast.parse(s).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                     and not n.name.startswith('_')]
            definitions += len(names)
            lacking += sum(not re.search(rf'\b{n}\b', shown) for n in names)
    return {'lines of a code cell': spread(cells), 'lines of an exported cell': spread(exported),
            'public definitions without an example in their notebook': share(lacking, definitions)}

STUDY_LINES = 250  # lines of code after the parameters cell that a notebook of the study should not exceed

def of_study() -> dict[str, str]: # notebook -> exported lines, lines of the study, place of the first picture
    "Measure the notebooks of the study; the study is the code after the parameters cell that is not exported."
    found = {}
    for path in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb')):
        cells = code_cells(path)
        start = next(i for i, (_, tags, _) in enumerate(cells) if 'parameters' in tags)
        lines = lambda wanted, cells: sum(len(s.splitlines()) for s, *_ in cells if is_exported(s) == wanted)
        study = lines(False, cells[start + 1:])
        picture = next((f'{i + 1} of {len(cells)}' for i, (*_, shows) in enumerate(cells) if shows), 'none saved')
        found[path.stem] = (f'exported {lines(True, cells)}, study {study}{" (long)"*(study > STUDY_LINES)}, '
                            f'first picture at code cell {picture}')
    return found

if __name__ == '__main__':
    for name, value in (of_modules() | of_notebooks() | of_study()).items(): print(f'{name:56} {value}')
